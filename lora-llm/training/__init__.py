"""One training run: the trainer, its losses, its scores, its checkpoints and its results."""
