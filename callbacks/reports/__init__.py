"""Reports in one HTML file: of a federation and of a test, and the model card."""
