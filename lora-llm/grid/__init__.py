"""Answers of saved LoRAs side by side: generated over one base, measured, put on one page."""
