"""Callbacks that present results and change none: tables, overlays, HTML reports, the model card."""
