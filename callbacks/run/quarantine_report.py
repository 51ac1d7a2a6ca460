"""Writes the list of items a data set had to leave out into the run folder."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer


class QuarantineReport(Callback):
    """Writes ``quarantine.csv`` into the run folder once the data set is set up.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the list, where the data set keeps one."""
        quarantine = getattr(getattr(trainer, "datamodule", None), "quarantine", None)
        if quarantine is not None and trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            quarantine.write(self.folder)
