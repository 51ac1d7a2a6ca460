"""federation/aggregators."""
