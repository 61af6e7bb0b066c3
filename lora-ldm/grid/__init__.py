"""Pictures of saved LoRAs side by side: drawn with one base, measured, put on one page."""
