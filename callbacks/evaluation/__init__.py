"""Callbacks that measure a model: per-image results and calibration."""
