"""The callbacks of a run: those of the configuration, and those that every run has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, ModelSummary, ProgressBar
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger

import callbacks


def run_callbacks(
    config: Namespace, command: str, run_folder: Path, start: callbacks.RunStart, logs_checkpoints: bool
) -> list[Callback]:
    """Return the configured callbacks and those that every run needs, unless one of their kind is configured.

    Callbacks of other packages come first: one that refuses the run does so before the run folder is created.

    Args:
        config: The configuration of the command, its classes instantiated.
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        run_folder: The run folder.
        start: Creates the run folder.
        logs_checkpoints: Whether a W&B logger logs the checkpoints itself.
    """
    folder, fits = str(run_folder), command == "fit"
    checkpoints = f"{folder}/checkpoints"
    trainer = config.trainer
    given = trainer.callbacks
    chosen: list[Callback] = given if isinstance(given, list) else [] if given is None else [given]
    defaults: list[tuple[type[Callback], Callable[[], Callback]]] = [
        (callbacks.QuarantineReport, lambda: callbacks.QuarantineReport(folder)),
        (callbacks.CaseResults, callbacks.CaseResults),
        (callbacks.MetricsReport, lambda: callbacks.MetricsReport(folder)),
        (callbacks.ReliabilityReport, lambda: callbacks.ReliabilityReport(folder)),
        (callbacks.Familiarity, lambda: callbacks.Familiarity(folder=folder)),
        (callbacks.ModelReport, lambda: callbacks.ModelReport(folder)),
        (callbacks.PredictionWriter, lambda: callbacks.PredictionWriter(f"{folder}/predictions")),
    ]
    if trainer.enable_model_summary is not False:
        defaults.append((ModelSummary, callbacks.PartsSummary))
    if trainer.enable_progress_bar is not False:
        defaults.append((ProgressBar, callbacks.RunBar))
    if command in {"fit", "validate"}:
        defaults.append((callbacks.Overlays, lambda: callbacks.Overlays(folder)))
        defaults.append((callbacks.MetricsTable, callbacks.MetricsTable))
    if fits and trainer.enable_checkpointing is not False:
        defaults += [
            (callbacks.ResumePoint, lambda: callbacks.ResumePoint(checkpoints)),
            (ModelCheckpoint, lambda: _best(checkpoints)),
            (callbacks.LastCheckpoint, lambda: callbacks.LastCheckpoint(checkpoints)),
        ]
    if fits and config.federation is not None:
        chosen.append(config.federation)
        defaults.append((callbacks.FederationReport, lambda: callbacks.FederationReport(folder)))
    chosen.sort(key=lambda callback: isinstance(callback, callbacks.PredictionWriter))  # after those that add files
    missing = [make() for kind, make in defaults if not any(isinstance(one, kind) for one in chosen)]
    loggers = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
    if any(isinstance(logger, WandbLogger) for logger in loggers):
        missing.append(callbacks.WandbRecord(run_folder, artifact=not logs_checkpoints))
    if any(isinstance(logger, MLFlowLogger | TensorBoardLogger) for logger in loggers):
        missing.append(callbacks.TrackedRun(run_folder, artifact=not logs_checkpoints))
    own = callbacks.__name__
    others = [one for one in chosen if type(one).__module__.partition(".")[0] != own]
    return [*others, start, *(one for one in chosen if one not in others), *missing]


def identify_run(logger: Namespace, folder: Path, command: str, checkpoint: str | None, rounds: bool) -> None:
    """Fill the identity of a run into the arguments of a W&B or MLflow logger, in place.

    Args:
        logger: The configured logger, not yet instantiated.
        folder: The run folder.
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        checkpoint: The checkpoint of the run that is continued; ``None`` starts a run.
        rounds: Whether a federation is trained.
    """
    kind, arguments = resolve_name(logger.class_path), logger.init_args
    if kind is MLFlowLogger:
        logger.class_path = "callbacks.NamedMLFlowLogger"
        for key, value in callbacks.mlflow_identity(arguments, folder, checkpoint).items():
            arguments[key] = value
    elif issubclass(kind, WandbLogger):
        for key, value in callbacks.run_identity(arguments.as_dict(), folder, command, checkpoint, rounds).items():
            arguments[key] = value
        callbacks.check_wandb_names(arguments.as_dict())


def names_checkpoints(loggers: Sequence[Any]) -> bool:
    """Return whether one of the configured loggers, not yet instantiated, logs the checkpoints itself."""
    return any(isinstance(one, Namespace) and one.init_args.get("log_model") for one in loggers)


def _best(folder: str) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="best", monitor="val/score", mode="max", enable_version_counter=False)
