"""mtmedformer/losses."""
