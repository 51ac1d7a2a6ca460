"""Curvature, posteriors and what is computed from them."""
