"""What is trained over a base: LoRA, LyCORIS, the full U-Net; folding it in, and its files."""
