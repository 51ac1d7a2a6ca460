"""The run folder: one place for config, metrics, checkpoints and pictures of a run, never written over."""

from __future__ import annotations

import csv
import os
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

RUN_DIR = "MTMEDFORMER_RUN_DIR"
"""Environment variable by which the first process of a run tells the processes it launches which folder it took."""


def claim_run_folder(root: Path) -> Path:
    """Create and return ``root``, or ``root-2``, ``root-3`` … where an earlier run lies in it.

    Only the first process of a run claims a folder; the ones it launches are told.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return Path(os.environ.get(RUN_DIR, root))
    folder, number = root, 1
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            (folder / "run.lock").touch(exist_ok=False)  # two runs started at once take two folders
            break
        except FileExistsError:
            number += 1
            folder = root.with_name(f"{root.name}-{number}")
    os.environ[RUN_DIR] = str(folder)
    return folder


def latest_run_folder(root: Path) -> Path:
    """Return the newest of ``root``, ``root-2``, ``root-3`` … that a run has taken; ``root`` where none has."""
    folder, number = root, 2
    while (newer := root.with_name(f"{root.name}-{number}")).joinpath("run.lock").exists():
        folder, number = newer, number + 1
    return folder


def run_folder_of(checkpoint: Path) -> Path | None:
    """Return the run folder a checkpoint lies in (``<run>/checkpoints/<name>.ckpt``), or ``None``."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else None


class RunLogger(CSVLogger):
    """Writes ``metrics.csv`` into the run folder, going on with the rows of the run it resumes.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: str) -> None:
        earlier = _rows(Path(folder, "metrics.csv"))
        super().__init__(folder, name="", version="", flush_logs_every_n_steps=10)
        self._earlier = earlier

    @property
    def experiment(self) -> Any:
        """The writer of ``metrics.csv``; on its first use the rows of the resumed run are put back."""
        fresh = self._experiment is None
        with warnings.catch_warnings():  # the folder is not empty: it holds this very run's config and lock
            warnings.filterwarnings("ignore", "Experiment logs directory")
            writer = super().experiment
        if fresh and self._earlier and self._experiment is not None:  # the first process alone has a writer
            writer.metrics = [*self._earlier, *writer.metrics]
            self._earlier = []
        return writer

    def log_hyperparams(self, params: Any = None) -> None:
        """Do nothing: ``config.yaml`` already holds every hyperparameter."""


def _rows(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    whole, _, _ = file.read_text(encoding="utf-8").rpartition("\n")  # a killed run may have left half of its last line
    return [{k: v for k, v in row.items() if v != ""} for row in csv.DictReader(whole.splitlines())]


class SaveRunConfig(SaveConfigCallback):
    """Saves the resolved configuration into the run folder and into every logger that keeps one (W&B, TensorBoard)."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Send the configuration to the loggers."""
        config = self.config.as_dict()
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.config.update(_plain(config), allow_val_change=True)
            elif isinstance(logger, Logger) and not isinstance(logger, CSVLogger):
                logger.log_hyperparams(_plain(config))


def _plain(value: Any) -> Any:
    """Turn namespaces and paths into dicts and strings."""
    if hasattr(value, "as_dict"):
        value = value.as_dict()
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
