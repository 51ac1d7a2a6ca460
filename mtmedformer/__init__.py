"""MTMedFormer: one transformer that classifies, detects and segments in the same medical image."""

__version__ = "0.1.0"
