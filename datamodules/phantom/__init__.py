"""Generated films with known truth, written as DICOM files."""
