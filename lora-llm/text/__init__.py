"""Training text: where it comes from, its formats, and how it becomes token batches."""
