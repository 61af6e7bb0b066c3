"""Which of the adapters that some trainer saved is to be kept."""
