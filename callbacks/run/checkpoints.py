"""Checkpoints: one to resume from at every moment (before the first step, after Ctrl-C or a crash), each whole."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from callbacks.run.lightning_internals import load_loader_states
from mtmedformer.storage.atomic_write import atomic_write, remove_partial_files
from mtmedformer.storage.hashing import WEIGHTS_DIGEST, state_hash


class ResumePoint(Callback):
    """Keeps a valid ``checkpoints/last.ckpt`` from the first step on, and stops at the first Ctrl-C.

    After the first Ctrl-C or SIGTERM the running step is finished, the state is saved, and training stops; a second
    Ctrl-C stops at once. With several processes, all stop after the same step. A resumed run continues with the next
    batch and ends with the same weights as an uninterrupted one.

    Args:
        folder: Folder of the checkpoints.
    """

    def __init__(self, folder: str) -> None:
        self.file = Path(folder, "last.ckpt")
        self._stop = False
        self._handler: Any = None

    @property
    def stopping(self) -> bool:
        """Whether Ctrl-C was pressed; long work within a step may then stop at once."""
        return self._stop

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the starting state and handle Ctrl-C."""
        self._stop = False
        load_loader_states(trainer)
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            if trainer.is_global_zero:  # the only process that writes checkpoints; a killed run may have left a part
                remove_partial_files(self.file.parent)
            if trainer.global_step == 0:
                trainer.save_checkpoint(self.file, weights_only=False)
            elif trainer.ckpt_path and trainer.is_global_zero and not self.file.exists():  # resumed in a new run folder
                with atomic_write(self.file) as part:
                    shutil.copyfile(trainer.ckpt_path, part)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._handler = signal.signal(signal.SIGINT, self._interrupt)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop after a Ctrl-C in the last step of the epoch before; its checkpoint has been written."""
        if self._stop:
            self._restore_handler()
            words = f"stopped by Ctrl-C after epoch {trainer.current_epoch}; continue with --ckpt_path={self.file}"
            raise KeyboardInterrupt(words)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and stop after a signal in this step; the last step of an epoch is followed by validation first.

        A step of several accumulated batches is finished first, since a checkpoint has no gradients.
        """
        if trainer.is_last_batch or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if trainer.strategy.reduce_boolean_decision(self._stop or trainer.received_sigterm, all=False):
            trainer.save_checkpoint(self.file, weights_only=False)
            raise self._end(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the usual handling of Ctrl-C."""
        self._restore_handler()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the usual handling of Ctrl-C and print how to resume."""
        self._restore_handler()
        by_signal = isinstance(exception, KeyboardInterrupt | SystemExit)  # the command line prints those
        if self.file.exists() and trainer.training and not by_signal:
            rank_zero_info(f"Stopped in epoch {trainer.current_epoch + 1}. Resume with: --ckpt_path {self.file}")

    def _end(self, trainer: Trainer) -> BaseException:
        """Return the exception that ends the training after a signal, with the words to be shown."""
        self._restore_handler()
        kind, by = (SIGTERMException, "SIGTERM") if trainer.received_sigterm else (KeyboardInterrupt, "Ctrl-C")
        return kind(f"stopped by {by} in epoch {trainer.current_epoch + 1}; continue with --ckpt_path={self.file}")

    def _interrupt(self, *args: Any) -> None:
        if self._stop:
            self._restore_handler()
            raise KeyboardInterrupt(f"stopped by Ctrl-C; continue with --ckpt_path={self.file}")
        self._stop = True
        rank_zero_info("\nCtrl-C: finishing this step, then saving. Press again to stop at once.")

    def _restore_handler(self) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            self._handler = None


class LastCheckpoint(ModelCheckpoint):
    """Writes ``last.ckpt`` after every epoch.

    The ``save_last`` of a ``ModelCheckpoint`` that monitors a metric is not enough: it is written only in epochs with a
    new best value.

    After ``StochasticWeightAveraging`` it is written once more, with the averaged weights, which Lightning puts into
    the module after the last checkpoint.

    Args:
        folder: Folder of the checkpoints.
    """

    def __init__(self, folder: str) -> None:
        super().__init__(folder, filename="last", enable_version_counter=False, save_on_train_epoch_end=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the averaged weights, where weights were averaged."""
        super().on_train_end(trainer, pl_module)
        run_callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        averaging = [one for one in run_callbacks if isinstance(one, StochasticWeightAveraging)]
        if averaging and averaging[0].n_averaged is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            average = averaging[0].state_dict()["average_model_state"]
            for name, buffer in pl_module.named_buffers():  # Lightning averages parameters only
                if name in average:
                    average[name].copy_(buffer)
            trainer.save_checkpoint(Path(str(self.dirpath), "last.ckpt"), weights_only=False)
            rank_zero_info("last.ckpt has the averaged weights, best.ckpt those of the best epoch before averaging.")


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes each checkpoint to a temporary file beside its final path, and moves it there once it is on the disk.

    Lightning uses the system's folder for temporary files. If that is on another disk, the move is a copy, which can
    be interrupted.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint, with a digest of its weights that is checked when it is read.

        Args:
            checkpoint: The checkpoint.
            path: A local path.
            storage_options: Passed to Lightning; a local file has none.

        Raises:
            OSError: It cannot be written; the earlier file is unchanged.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        if isinstance(state := checkpoint.get("state_dict"), Mapping):
            checkpoint = checkpoint | {WEIGHTS_DIGEST: state_hash(state)}
        with atomic_write(Path(path)) as part, part.open("wb") as stream:  # a stream: no file name in the archive
            torch.save(checkpoint, stream)
