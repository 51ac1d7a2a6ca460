"""Checks of a data set: near-duplicates, shortcuts, statistics."""
