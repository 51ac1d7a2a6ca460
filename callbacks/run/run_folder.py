"""The run folder: its choice, its creation once a run starts, and the files that are written first."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import MLFlowLogger, WandbLogger

from mtmedformer.errors import ConfigError
from mtmedformer.protocols import QuarantiningData
from mtmedformer.storage.atomic_write import atomic_write
from mtmedformer.storage.shared_config import without_paths

RUN_DIR = "MTMEDFORMER_RUN_DIR"
"""Environment variable with the run folder, for the processes that the first process of a run launches."""

LOCK = "run.lock"
"""Empty file that marks a folder as taken by a run; locked while a process trains it."""


class RunFolder:
    """The folder of one run: chosen at once, created only when the run starts.

    ``path`` is ``root``, or ``root-2``, ``root-3``, … where an earlier run lies in it. Until the folder is created, a
    lock in the system's folder for temporary files keeps the other runs of this computer from choosing the same one.
    Processes that the first process of a run launches get its choice from the environment.

    Args:
        root: The configured folder.

    Attributes:
        path: The folder of this run.
    """

    def __init__(self, root: Path) -> None:
        self._lock: TextIO | None = None
        self._unlock: Callable[[], None] | None = None
        if os.environ.get("LOCAL_RANK", "0") != "0":
            self.path = Path(os.environ.get(RUN_DIR, root))
            return
        self.path, number = root, 1
        while not self._reserve():
            number += 1
            self.path = root.with_name(f"{root.name}-{number}")
        os.environ[RUN_DIR] = str(self.path)

    def create(self) -> None:
        """Create the folder, mark it as taken and lock it; does nothing in a launched process, or the second time.

        Raises:
            ConfigError: Another computer has created it in the meantime.
        """
        if self._lock is None:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            (self.path / LOCK).touch(exist_ok=False)
        except FileExistsError:
            raise ConfigError(f"{self.path}: another run has just taken this run folder; start again") from None
        self._unlock = lock_run(self.path)
        self.release()

    def release(self) -> None:
        """Give up the reservation of a folder that was not created, or the lock of one whose run has ended."""
        if self._lock is None and self._unlock is not None:
            self._unlock()
        if self._lock is not None:
            Path(self._lock.name).unlink(missing_ok=True)
            fcntl.flock(self._lock, fcntl.LOCK_UN)
            self._lock.close()
            self._lock = None

    def _reserve(self) -> bool:
        name = hashlib.sha256(str(self.path.absolute()).encode()).hexdigest()[:16]
        file = Path(tempfile.gettempdir(), f"mtmedformer-{os.getuid()}-{name}.lock")
        lock = file.open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return False
        self._lock = lock
        if (self.path / LOCK).exists():
            self.release()
            return False
        return True


def lock_run(folder: Path) -> Callable[[], None]:
    """Lock the folder of a run for this process, so that no second process trains it; the lock ends with the process.

    Returns:
        What gives the lock up again; without effect in a launched process, where the file system has no locks, or in a
        folder that no run has taken.

    Raises:
        ConfigError: Another process holds the lock.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0" or not (folder / LOCK).is_file():
        return lambda: None
    file = (folder / LOCK).open("r+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process, not inherited by forked ones
    except (BlockingIOError, PermissionError):
        file.close()
        raise ConfigError(
            f"{folder}: another process trains this run now; wait until it has ended, or stop it first"
        ) from None
    except OSError:  # a network drive without locks
        pass
    return file.close


def latest_run_folder(root: Path, checkpoint: str = "") -> Path:
    """Return the newest of ``root``, ``root-2``, ``root-3`` … that a run has taken; ``root`` where none has.

    Args:
        root: The configured folder.
        checkpoint: Name of a checkpoint: the newest run that has it, where one does. A run that was killed before its
            first checkpoint has none.
    """
    taken, number = [root], 2
    while (newer := root.with_name(f"{root.name}-{number}")).joinpath(LOCK).exists():
        taken, number = [*taken, newer], number + 1
    having = [folder for folder in taken if checkpoint and (folder / "checkpoints" / checkpoint).is_file()]
    return (having or taken)[-1]


def run_folder_of(checkpoint: Path) -> Path | None:
    """Return the run folder a checkpoint lies in (``<run>/checkpoints/<name>.ckpt``), or ``None``."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else None


def is_run_folder_of(root: Path, folder: Path) -> bool:
    """Return whether ``folder`` is ``root`` or one of ``root-2``, ``root-3`` …, existing or not."""
    root, folder = root.absolute(), folder.absolute()
    return root.parent == folder.parent and re.fullmatch(rf"{re.escape(root.name)}(-\d+)?", folder.name) is not None


class AtStart(Callback):
    """Base of callbacks that write once, when everything is set up and the first batch is next.

    A run that fails before has written nothing.
    """

    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write, on the first process."""
        raise NotImplementedError

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write at the start of ``fit``."""
        self._start(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write at the start of ``validate``; the validation within ``fit`` writes nothing."""
        if trainer.state.fn == "validate":
            self._start(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write at the start of ``test``."""
        self._start(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write at the start of ``predict``."""
        self._start(trainer, pl_module)

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.start(trainer, pl_module)


class RunStart(AtStart):
    """Creates the run folder, and saves the resolved configuration in it and in the loggers that keep one.

    Loggers get it without the paths of this computer.

    Args:
        folder: The run folder.
        config: The whole configuration, as plain values.
        filename: Name of the configuration's file in the run folder.
    """

    def __init__(self, folder: RunFolder | Path, config: dict[str, Any], filename: str = "config.yaml") -> None:
        self.folder, self.config, self.filename = folder, config, filename

    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Create the folder and write the configuration."""
        if isinstance(self.folder, RunFolder):
            self.folder.create()
        folder = self.folder.path if isinstance(self.folder, RunFolder) else self.folder
        with atomic_write(folder / self.filename) as part:
            part.write_text(yaml.safe_dump(self.config, sort_keys=False), encoding="utf-8")
        shared = without_paths(self.config)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.config.update(shared, allow_val_change=True)
            else:
                logger.log_hyperparams(shared)
            if isinstance(logger, MLFlowLogger) and trainer.is_global_zero:
                logger.experiment.log_text(logger.run_id, yaml.safe_dump(shared, sort_keys=False), self.filename)


class QuarantineReport(AtStart):
    """Writes ``quarantine.csv``, the list of the items that a data set could not use.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the list, where the data set keeps one."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, QuarantiningData):
            self.folder.mkdir(parents=True, exist_ok=True)
            data.quarantine.write(self.folder)
