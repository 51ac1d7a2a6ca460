"""Overlays, heat maps and the HTML page toolkit of the reports."""
