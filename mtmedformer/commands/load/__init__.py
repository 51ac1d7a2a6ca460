"""``mtmedformer.load``: load a trained model without running code from its files, and predict from images."""
