"""Predictions: tiling, results per image, Grad-CAM."""
