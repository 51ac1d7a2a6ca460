"""Load a stored model without running code from its files."""
