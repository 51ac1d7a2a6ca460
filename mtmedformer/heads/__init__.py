"""mtmedformer/heads."""
