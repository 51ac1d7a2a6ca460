"""What makes a run findable and repeatable in MLflow and TensorBoard: its code, data, configuration and checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger

from callbacks.run.data_identity import data_identity
from callbacks.run.wandb_run import best_checkpoint, code_version, run_tags
from mtmedformer.inference.results import NOTE

TEXT = 5000
"""Longest value of a tag in MLflow; the whole record is the artifact ``record.json``."""


def mlflow_identity(configured: Mapping[str, Any], folder: Path, checkpoint: str | None) -> dict[str, str]:
    """Return the identity of a run in MLflow, as arguments of ``MLFlowLogger`` that the configuration leaves open.

    Args:
        configured: The arguments of ``MLFlowLogger`` in the configuration.
        folder: The run folder, whose name becomes the name of the run.
        checkpoint: The checkpoint of the run that is continued: its MLflow run is continued too; ``None`` starts a run.
    """
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # the logger's default is a folder, which MLflow 3 refuses
    values = {"run_name": folder.name}
    if checkpoint is not None:
        stored = torch.load(checkpoint, weights_only=True, map_location="cpu", mmap=True)
        run = stored.get("callbacks", {}).get("TrackedRun", {}).get("run")
        values |= {"run_id": str(run)} if run else {}
    return {key: value for key, value in values.items() if configured.get(key) is None}


class TrackedRun(Callback):
    """Logs the record of a run in MLflow and TensorBoard, and the best checkpoint as an artifact of the MLflow run.

    The record is the note on its use, the name of the run folder, the version of the code, and the identity of the data
    (counts and a digest, nothing of a patient). TensorBoard has no artifacts: it gets the record as text.

    Args:
        folder: The run folder.
        artifact: Whether to log the checkpoint; not where the logger does it itself (``log_model``).
    """

    def __init__(self, folder: Path, artifact: bool = True) -> None:
        self.folder, self.artifact = folder, artifact
        self.run: str | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Log the record."""
        if not trainer.is_global_zero:
            return
        data, command = trainer.datamodule, stage.lower()  # type: ignore[attr-defined]  # Lightning gives an enum
        tags = run_tags(trainer, pl_module, data)
        record = {
            "note": NOTE,
            "run_folder": self.folder.name,
            "command": command,
            "tags": tags,
            "code": code_version(),
            "data": data_identity(data),
        }
        for logger in trainer.loggers:
            if isinstance(logger, MLFlowLogger):
                self.run = logger.run_id
                client = logger.experiment
                for key, value in record.items():
                    text = value if isinstance(value, str) else json.dumps(value)
                    client.set_tag(self.run, f"mtmedformer.{key}", text[:TEXT])
                client.set_tag(self.run, "mlflow.source.name", f"mtmedformer {command}")  # else a path of this computer
                client.log_text(self.run, json.dumps(record, indent=1), "record.json")
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("record", f"```json\n{json.dumps(record, indent=1)}\n```")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the best checkpoint."""
        best = best_checkpoint(trainer)
        if not trainer.is_global_zero or best is None:
            return
        file, facts = best[0], best[1] | {"file": best[0].name}
        for logger in trainer.loggers:
            if isinstance(logger, MLFlowLogger):
                logger.experiment.log_text(logger.run_id, json.dumps(facts, indent=1), "model/about.json")
                if self.artifact:
                    logger.experiment.log_artifact(logger.run_id, str(file), "model")
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("best_checkpoint", f"```json\n{json.dumps(facts, indent=1)}\n```")

    def state_dict(self) -> dict[str, Any]:
        """Return the id of the MLflow run, so that a resumed training goes on with it."""
        return {"run": self.run} if self.run else {}
