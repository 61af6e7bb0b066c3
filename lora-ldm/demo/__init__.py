"""The parts of demo_app.py: run folders, trainings in the background, pictures to compare."""
