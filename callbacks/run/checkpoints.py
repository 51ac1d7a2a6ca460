"""A checkpoint to resume from at every moment: before the first step, after Ctrl-C, after a crash."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info


class ResumePoint(Callback):
    """Keeps ``checkpoints/last.ckpt`` valid from the first step on, and stops cleanly on the first Ctrl-C.

    The first Ctrl-C (or SIGTERM handled as one) lets the running step finish, saves, and stops; a second one stops at
    once. A resumed run goes on with the very next batch, so that it ends in the same weights as an uninterrupted one.

    Args:
        folder: Folder of the checkpoints.
    """

    def __init__(self, folder: str) -> None:
        self.file = Path(folder, "last.ckpt")
        self._stop = False
        self._handler: Any = None

    @property
    def stopping(self) -> bool:
        """Whether Ctrl-C was pressed and the run is about to stop; what runs within a step may stop at once."""
        return self._stop

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the starting point and listen for Ctrl-C."""
        self._stop = False
        # Lightning gives the loader its state back only if nothing (such as the schedule) has asked for it before
        trainer.fit_loop._load_combined_loader_states()
        if not getattr(trainer, "fast_dev_run", False) and trainer.global_step == 0:
            trainer.save_checkpoint(self.file, weights_only=False)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._handler = signal.signal(signal.SIGINT, self._interrupt)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop where Ctrl-C was pressed in the last step of the epoch before, which is saved by now."""
        if self._stop:
            self._restore_handler()
            raise KeyboardInterrupt

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Save and stop where Ctrl-C was pressed during this step; after an epoch's last step, validate first."""
        if self._stop and not trainer.is_last_batch:
            trainer.save_checkpoint(self.file, weights_only=False)
            self._restore_handler()
            raise KeyboardInterrupt

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give Ctrl-C back its usual meaning."""
        self._restore_handler()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give Ctrl-C back its usual meaning and say where to resume."""
        self._restore_handler()
        if self.file.exists() and trainer.training:
            rank_zero_info(f"Stopped at epoch {trainer.current_epoch}. Resume with: --ckpt_path {self.file}")

    def _interrupt(self, *args: Any) -> None:
        if self._stop:
            self._restore_handler()
            raise KeyboardInterrupt
        self._stop = True
        rank_zero_info("\nCtrl-C: finishing this step, then saving. Press again to stop at once.")

    def _restore_handler(self) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            self._handler = None


class LastCheckpoint(ModelCheckpoint):
    """Writes ``last.ckpt`` after every epoch.

    A ``ModelCheckpoint`` that monitors a metric writes its ``save_last`` only in epochs that set a new best, so that a
    run stopped later would resume from long ago.

    Args:
        folder: Folder of the checkpoints.
    """

    def __init__(self, folder: str) -> None:
        super().__init__(folder, filename="last", enable_version_counter=False)
