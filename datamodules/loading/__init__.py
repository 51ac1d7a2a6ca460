"""Records to batches: splits, samplers, datasets."""
