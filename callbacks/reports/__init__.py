"""Callbacks that present results: tables, overlays, HTML reports, the model card. They change no training."""
