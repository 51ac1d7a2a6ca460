"""``mtmedformer sweep``: a W&B sweep file run without W&B, by Optuna, one training after the other or side by side."""

from mtmedformer.commands.sweep.command import main

__all__ = ["main"]
