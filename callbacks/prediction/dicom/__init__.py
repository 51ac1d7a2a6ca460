"""DICOM objects of predictions: segmentations and structured reports."""
