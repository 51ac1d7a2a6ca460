"""Output of ``predict``: tables, masks, pictures, heat maps and DICOM objects, in pixels of the original image."""
