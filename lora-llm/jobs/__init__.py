"""The parts of multi_lora.py: many adapters trained at once over one base."""
