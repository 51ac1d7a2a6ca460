"""Permutation symmetries of networks, and how to undo them."""
