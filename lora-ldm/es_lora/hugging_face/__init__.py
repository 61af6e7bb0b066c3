"""What a Hugging Face Trainer of a PEFT model needs: its tensors and layers, its processes."""
