"""Checks of a data set: plausibility of labels, near-duplicates, shortcuts, statistics."""
