"""Decode each image once: preprocessing, the entries of the cache, unusable images and labels."""
