"""Callbacks that keep a run: its folder, its checkpoints, its record in W&B."""
