"""LoRA adapters over a base: put on, fused for many at once, saved and loaded."""
