"""Callbacks that measure a model: tables, per-image results, calibration, overlays."""
