"""What makes a run in W&B findable and repeatable: its name, group and tags, code, data and best checkpoint."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger

import mtmedformer
from callbacks.run.data_identity import data_identity
from federation.datamodule import FederatedDataModule
from mtmedformer.inference.results import NOTE
from mtmedformer.module import MultiTaskModule
from mtmedformer.protocols import RunsRounds

TAG = 64
"""Longest tag W&B takes."""


PRIVATE = {"WANDB_CONSOLE": "off", "WANDB_X_DISABLE_META": "true"}
"""Settings of W&B: no copy of the console and no record of arguments and folders, which contain paths of the site."""


def run_identity(
    configured: Mapping[str, Any], folder: Path, command: str, checkpoint: str | None, rounds: bool
) -> dict[str, str]:
    """Return the identity of a run in W&B, as arguments of ``WandbLogger``.

    Only what the configuration, the environment and a sweep leave open is returned.

    Args:
        configured: The arguments of ``WandbLogger`` in the configuration.
        folder: The run folder, whose name becomes the name of the run.
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        checkpoint: The checkpoint of the run that is continued: its W&B run is continued too; ``None`` starts a run.
        rounds: Whether a federation is trained, whose sites have runs in one group with the server's run.

    Returns:
        Some of ``id``, ``name``, ``group`` and ``job_type``.
    """
    for setting, value in PRIVATE.items():
        os.environ.setdefault(setting, value)
    values: dict[str, str] = {}
    if "WANDB_SWEEP_ID" not in os.environ and "WANDB_RUN_ID" not in os.environ:
        own = configured.get("id") or configured.get("version")
        if own is None and command == "fit":
            own = values["id"] = _run_of(checkpoint) or uuid4().hex[:8]
        if "WANDB_NAME" not in os.environ:
            values["name"] = folder.name
        if "WANDB_RUN_GROUP" not in os.environ:
            values["group"] = str(own) if rounds else re.sub(r"-\d+$", "", folder.name)
    if "WANDB_JOB_TYPE" not in os.environ:
        values["job_type"] = "server" if rounds else command
    return {key: value for key, value in values.items() if configured.get(key) is None}


def check_wandb_names(arguments: Mapping[str, Any]) -> None:
    """Let W&B check the names in the arguments of ``WandbLogger``, before anything is written.

    Raises:
        wandb.errors.UsageError: A name has characters that W&B does not take.
    """
    import wandb

    names = {"project": "project", "entity": "entity", "id": "run_id", "name": "run_name"}
    settings: Any = wandb.Settings
    settings(**{field: str(arguments[key]) for key, field in names.items() if arguments.get(key)})


class WandbRecord(Callback):
    """Logs tags, code version, data identity and, at the end of ``fit``, the best checkpoint as an artifact.

    Args:
        folder: The run folder.
        artifact: Whether to log the artifact; not where the logger does it itself (``log_model``).
    """

    def __init__(self, folder: Path, artifact: bool = True) -> None:
        self.folder, self.artifact = folder, artifact
        self.run: str | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Log the model, the code version and the identity of the data."""
        logger = _logger(trainer)
        if logger is None or not trainer.is_global_zero:
            return
        data, run = trainer.datamodule, logger.experiment  # type: ignore[attr-defined]
        self.run = str(run.id)
        run.tags = tuple(dict.fromkeys([*(run.tags or ()), *run_tags(trainer, pl_module, data)]))
        facts = {"note": NOTE, "run_folder": self.folder.name, "code": code_version(), "data": data_identity(data)}
        run.config.update({"record": facts}, allow_val_change=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the best checkpoint."""
        logger = _logger(trainer)
        best = best_checkpoint(trainer)
        if logger is None or not trainer.is_global_zero or not self.artifact or best is None:
            return
        import wandb

        file, facts = best
        artifact = wandb.Artifact(f"model-{logger.experiment.id}", type="model", metadata=facts)
        artifact.add_file(str(file), name="best.ckpt")
        logger.experiment.log_artifact(artifact, aliases=["best"])

    def state_dict(self) -> dict[str, Any]:
        """Return the run's id, so that a resumed training goes on with it."""
        return {"run": self.run} if self.run else {}


def best_checkpoint(trainer: Trainer) -> tuple[Path, dict[str, Any]] | None:
    """Return the file of the best checkpoint, and its metric, score and the note; ``None`` if nothing was validated."""
    best = next((c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor), None)
    if best is None or not Path(best.best_model_path).is_file():
        return None
    score = None if best.best_model_score is None else float(best.best_model_score)
    return Path(best.best_model_path), {"monitor": best.monitor, "score": score, "note": NOTE}


def code_version() -> dict[str, Any]:
    """Return the version, and the git commit and whether files differ from it where the code lies in a repository."""
    home = Path(mtmedformer.__file__).resolve().parent.parent
    code: dict[str, Any] = {"version": mtmedformer.__version__}
    if _git(home, "ls-files", "--error-unmatch", "mtmedformer/__init__.py") is None:
        return code  # not a checkout; a repository around an installation is not of this code
    changed = _git(home, "status", "--porcelain", "--untracked-files=no")
    return code | {"commit": _git(home, "rev-parse", "HEAD"), "changed": bool(changed)}


def _git(home: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(home), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):  # git is not installed, or the disk is slow: only a fact less
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def run_tags(trainer: Trainer, pl_module: LightningModule, data: Any) -> list[str]:
    """Return encoder, tasks and data set of a run, and ``federated`` for a federation."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    rounds = any(callback.runs_rounds for callback in callbacks if isinstance(callback, RunsRounds))
    model = [pl_module.encoder.name, *pl_module.tasks] if isinstance(pl_module, MultiTaskModule) else []
    source = data.data or data if isinstance(data, FederatedDataModule) else data
    words = [*model, "" if data is None else type(source).__name__.removesuffix("DataModule")]
    return [word[:TAG] for word in (*words, "federated" if rounds else "") if word]


def _run_of(checkpoint: str | None) -> str | None:
    """Return the run that a checkpoint's training was logged to."""
    if checkpoint is None:
        return None
    stored = torch.load(checkpoint, weights_only=True, map_location="cpu", mmap=True)
    run = stored.get("callbacks", {}).get("WandbRecord", {}).get("run")
    return str(run) if run else None


def _logger(trainer: Trainer) -> WandbLogger | None:
    return next((logger for logger in trainer.loggers if isinstance(logger, WandbLogger)), None)
