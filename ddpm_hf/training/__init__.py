"""What any training needs, and nothing of diffusion: flags, keyed randomness, checkpoints, the loop."""
