"""Predictions: tiling, results by image, Grad-CAM."""
