"""mtmedformer/metrics."""
