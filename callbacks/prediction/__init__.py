"""What ``predict`` writes: tables, masks, pictures, maps and DICOM objects, in the frame of the original image."""
