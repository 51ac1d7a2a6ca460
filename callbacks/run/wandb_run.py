"""What makes a run in W&B findable and repeatable: its name, group and tags, code, data and best checkpoint."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger

import mtmedformer
from callbacks.run.data_identity import data_identity
from mtmedformer.inference.results import NOTE

TAG = 64
"""Longest tag W&B takes."""


def record_in_wandb(
    loggers: object, folder: Path, command: str, checkpoint: str | None, rounds: bool
) -> list[Callback]:
    """Prepare the W&B logger, if there is one, and return the callback that records the run in it.

    Only what the configuration, the environment and a sweep leave open is filled in. A ``fit`` that is resumed goes on
    with its own run.

    Args:
        loggers: The Trainer's loggers, before they have opened anything.
        folder: The run folder, whose name becomes the run's.
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        checkpoint: The checkpoint that ``fit`` is resumed from.
        rounds: Whether a federation is trained, whose sites have runs in one group with the server's.
    """
    logger = next((lg for lg in loggers if isinstance(lg, WandbLogger)), None) if isinstance(loggers, list) else None
    if logger is None:
        return []
    init = logger._wandb_init  # what wandb.init will get; there is no public way to fill what is open
    if "WANDB_SWEEP_ID" not in os.environ and "WANDB_RUN_ID" not in os.environ:
        if init.get("id") is None and command == "fit":
            init["id"] = logger._id = _run_of(checkpoint) or uuid4().hex[:8]
        if init.get("name") is None and "WANDB_NAME" not in os.environ:
            init["name"] = logger._name = folder.name
        if init.get("group") is None and "WANDB_RUN_GROUP" not in os.environ:
            init["group"] = init["id"] if rounds else re.sub(r"-\d+$", "", folder.name)
    if init.get("job_type") is None and "WANDB_JOB_TYPE" not in os.environ:
        init["job_type"] = "server" if rounds else command
    return [WandbRecord(folder)]


class WandbRecord(Callback):
    """Logs tags, code version, data identity and, at the end of ``fit``, the best checkpoint as an artifact.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run: str | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Say what is trained, with which code, on which data."""
        logger = _logger(trainer)
        if logger is None or not trainer.is_global_zero:
            return
        data, run = getattr(trainer, "datamodule", None), logger.experiment
        self.run = str(run.id)
        run.tags = tuple(dict.fromkeys([*(run.tags or ()), *_tags(trainer, pl_module, data)]))
        facts = {"note": NOTE, "run_folder": self.folder.name, "code": code_version(), "data": data_identity(data)}
        run.config.update({"record": facts}, allow_val_change=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the best checkpoint, unless the logger was asked to log checkpoints itself (``log_model``)."""
        logger = _logger(trainer)
        best = next((c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor), None)
        if logger is None or not trainer.is_global_zero or logger._log_model or best is None:
            return
        file, score = Path(best.best_model_path), best.best_model_score
        if not file.is_file():  # nothing was validated
            return
        import wandb

        facts = {"monitor": best.monitor, "score": None if score is None else float(score), "note": NOTE}
        artifact = wandb.Artifact(f"model-{logger.experiment.id}", type="model", metadata=facts)
        artifact.add_file(str(file), name="best.ckpt")
        logger.experiment.log_artifact(artifact, aliases=["best"])

    def state_dict(self) -> dict[str, Any]:
        """Return the run's id, so that a resumed training goes on with it."""
        return {"run": self.run} if self.run else {}


def code_version() -> dict[str, Any]:
    """Return the version, and the git commit and whether files differ from it where the code lies in a repository."""
    home = Path(mtmedformer.__file__).resolve().parent.parent
    found: dict[str, Any] = {"version": mtmedformer.__version__}
    if _git(home, "ls-files", "--error-unmatch", "mtmedformer/__init__.py") is None:
        return found  # not a checkout: an enclosing repository of somebody else says nothing about this code
    changed = _git(home, "status", "--porcelain", "--untracked-files=no")
    return found | {"commit": _git(home, "rev-parse", "HEAD"), "changed": bool(changed)}


def _git(home: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(home), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):  # git is not installed, or the disk is slow: only a fact less
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _tags(trainer: Trainer, pl_module: LightningModule, data: Any) -> list[str]:
    rounds = any(getattr(callback, "runs_rounds", False) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    encoder = getattr(getattr(pl_module, "encoder", None), "name", None)
    source = type(getattr(data, "data", None) or data).__name__.removesuffix("DataModule")
    words = [encoder, source if data is not None else None, "federated" if rounds else None]
    return [str(word)[:TAG] for word in (*words, *getattr(pl_module, "tasks", {})) if word]


def _run_of(checkpoint: str | None) -> str | None:
    """Return the run that a checkpoint's training was logged to."""
    if checkpoint is None:
        return None
    stored = torch.load(checkpoint, weights_only=True, map_location="cpu", mmap=True)
    run = stored.get("callbacks", {}).get("WandbRecord", {}).get("run")
    return str(run) if run else None


def _logger(trainer: Trainer) -> WandbLogger | None:
    return next((logger for logger in trainer.loggers if isinstance(logger, WandbLogger)), None)
