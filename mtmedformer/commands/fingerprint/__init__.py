"""Describe a data set before training."""
