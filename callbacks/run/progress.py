"""The progress bar of a run: epochs and rounds are counted from 1, as in files and messages."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

from mtmedformer.protocols import RunsRounds


class RunBar(TQDMProgressBar):
    """Lightning's bar with the number of the epoch from 1 to ``max_epochs``; in a federation that of the round."""

    def __init__(self) -> None:
        super().__init__(leave=True)

    def on_train_epoch_start(self, trainer: Trainer, *args: LightningModule) -> None:
        """Put the number before the bar."""
        super().on_train_epoch_start(trainer, *args)
        run_callbacks: list[object] = trainer.callbacks  # type: ignore[attr-defined]
        rounds = any(one.runs_rounds for one in run_callbacks if isinstance(one, RunsRounds))
        end = f"/{trainer.max_epochs}" if (trainer.max_epochs or -1) > 0 else ""
        text = f"{'Round' if rounds else 'Epoch'} {trainer.current_epoch + 1}{end}"
        self.train_progress_bar.set_description(text)
