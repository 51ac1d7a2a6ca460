"""Callbacks that run a federation and use its posterior."""
