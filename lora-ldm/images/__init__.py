"""Training pictures: folders, captions, buckets, cached latents, batches."""
