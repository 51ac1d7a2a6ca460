"""``fit``, ``validate``, ``test`` and ``predict``: LightningCLI with run folders and the callbacks every run needs.

Importing the packages here makes the short names of their classes work on the command line.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ModelSummary, ProgressBar, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, instantiate_class
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.plugins.io import CheckpointIO

import callbacks
import datamodules
import federation
import mtmedformer
from mtmedformer.commands.checkpoint_config import existing_checkpoint, with_checkpoint_base
from mtmedformer.commands.messages import paragraph
from mtmedformer.commands.predict_images import with_images
from mtmedformer.errors import ConfigError


def main(argv: list[str]) -> int:
    """Run one of the four commands and return its exit code.

    Args:
        argv: Arguments as on the command line, the command first.
    """
    check_packages()
    with ExitStack() as stack:
        trainer = CommandLine(with_images(argv, stack)).trainer
    return max((getattr(callback, "exit_code", 0) for callback in trainer.callbacks), default=0)  # type: ignore[attr-defined]


def check_packages() -> None:
    """Refuse to run where another package called ``callbacks`` or ``federation`` is found before ours."""
    home = Path(mtmedformer.__file__).resolve().parent.parent
    for package in (callbacks, datamodules, federation):
        found = Path(str(package.__file__)).resolve().parent.parent
        if found != home:
            raise ConfigError(
                f"the package '{package.__name__}' in {found} hides MTMedFormer's own; rename it, or run from another "
                f"folder (sys.path[0] is {sys.path[0] or os.getcwd()})."
            )


class Parser(LightningArgumentParser):
    """Reports a mistake in the configuration as one paragraph instead of a usage page and a traceback."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the mistake as a ``ConfigError``."""
        raise ConfigError(paragraph(message)) from ex


class CommandLine(LightningCLI):
    """LightningCLI for MTMedFormer: run folders, defaults of the house, and its known traps closed.

    Args:
        argv: Arguments as on the command line, the subcommand first.
    """

    def __init__(self, argv: list[str]) -> None:
        self.argv = argv
        self.run_folder: Path | None = None
        super().__init__(
            model_class=LightningModule,
            datamodule_class=LightningDataModule,  # a single data set, or a federation of several
            save_config_callback=callbacks.SaveRunConfig,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            trainer_defaults={"log_every_n_steps": 10},
            parser_class=Parser,
            parser_kwargs={
                "description": "Train one transformer on several tasks in the same medical image.",
                "epilog": "Also: 'mtmedformer fingerprint --config …' describes a data set before you train on it; "
                "'mtmedformer predict --ckpt_path … --images DIR --output DIR' predicts plain files.",
                "version": mtmedformer.__version__,
            },
            subclass_mode_model=True,
            subclass_mode_data=True,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the ``federation`` key, which turns ``fit`` into rounds; the other subcommands take and ignore it."""
        parser.add_subclass_arguments(callbacks.Federation, "federation", required=False)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, with what the checkpoint was trained with as the base that the command line overrides."""
        with ExitStack() as stack:
            self.config = parser.parse_args(with_checkpoint_base(self.argv, stack))

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would let the checkpoint's hyperparameters silently override the command line."""

    def _add_configure_optimizers_method_to_model(self, subcommand: str | None) -> None:
        """Hand the optimizer and lr_scheduler keys to the module, which knows its parameter groups."""
        optimizer, scheduler = (self._get(self.config_init, key) for key in ("optimizer", "lr_scheduler"))
        if optimizer:
            self.model.optimizer_factory = lambda parameters: instantiate_class((parameters,), optimizer)
        if scheduler:
            self.model.scheduler_factory = lambda opt: instantiate_class(opt, scheduler)

    def before_instantiate_classes(self) -> None:
        """Choose the run folder and resolve ``--ckpt_path last`` and ``best``."""
        config = self.config[self.subcommand]
        root = Path(config.trainer.default_root_dir or "runs/run")
        checkpoint = config.get("ckpt_path")
        if checkpoint in {"last", "best"}:
            latest = callbacks.latest_run_folder(root)
            config.ckpt_path = str(existing_checkpoint(latest / "checkpoints" / f"{checkpoint}.ckpt"))
        elif checkpoint:
            existing_checkpoint(Path(checkpoint))
        explicit = any(a.startswith("--trainer.default_root_dir") for a in self.argv)
        folder = callbacks.run_folder_of(Path(config.ckpt_path)) if config.get("ckpt_path") else None
        if folder is None or (explicit and self.subcommand != "fit"):
            folder = (
                callbacks.claim_run_folder(root)
                if self.subcommand == "fit" and not config.trainer.fast_dev_run
                else root
            )
        config.trainer.default_root_dir = str(folder)
        self.run_folder = folder
        if self.subcommand != "fit":  # the config.yaml in the folder is that of its training
            self.save_config_kwargs["config_filename"] = f"config_{self.subcommand}.yaml"
        if self.subcommand == "predict" and not any(a.startswith("--return_predictions") for a in self.argv):
            config.return_predictions = False  # they are written as they come; memory must not grow with them
        if "verbose" in config and not any(a.startswith("--verbose") for a in self.argv):
            config.verbose = False  # the report's own table says it better than Lightning's list

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the Trainer with the run folder's logger and the callbacks every run needs."""
        folder = str(self.run_folder)
        checkpoints = f"{folder}/checkpoints"
        trainer_config = self._get(self.config_init, "trainer")
        chosen = list(trainer_config.get("callbacks") or [])
        defaults: list[tuple[type[Callback], Callable[[], Callback]]] = [
            (callbacks.QuarantineReport, lambda: callbacks.QuarantineReport(folder)),
            (callbacks.MetricsReport, lambda: callbacks.MetricsReport(folder)),
            (callbacks.ReliabilityReport, lambda: callbacks.ReliabilityReport(folder)),
            (callbacks.ModelReport, lambda: callbacks.ModelReport(folder)),
            (callbacks.PredictionWriter, lambda: callbacks.PredictionWriter(f"{folder}/predictions")),
        ]
        if trainer_config.get("enable_model_summary") is not False:
            defaults.append((ModelSummary, callbacks.PartsSummary))
        if trainer_config.get("enable_progress_bar") is not False:
            defaults.append((ProgressBar, lambda: TQDMProgressBar(leave=True)))
        if self.subcommand in {"fit", "validate"}:
            defaults += [
                (callbacks.Overlays, lambda: callbacks.Overlays(folder)),
                (callbacks.MetricsTable, callbacks.MetricsTable),
            ]
        if self.subcommand == "fit" and trainer_config.get("enable_checkpointing") is not False:
            defaults += [
                (callbacks.ResumePoint, lambda: callbacks.ResumePoint(checkpoints)),
                (ModelCheckpoint, lambda: _best(checkpoints)),
                (callbacks.LastCheckpoint, lambda: callbacks.LastCheckpoint(checkpoints)),
            ]
        federation = self._get(self.config_init, "federation") if self.subcommand == "fit" else None
        if federation is not None:
            chosen.append(federation)
            defaults.append((callbacks.FederationReport, lambda: callbacks.FederationReport(folder)))
        chosen.sort(key=lambda callback: isinstance(callback, callbacks.PredictionWriter))  # writes what others add
        missing = [make() for kind, make in defaults if not any(isinstance(c, kind) for c in chosen)]
        loggers = self._loggers(trainer_config.get("logger"))
        if federation is not None and (checkpoint := self._get(self.config, "ckpt_path")):
            federation.loggers.resume_server(loggers, checkpoint)
        resumed = self._get(self.config, "ckpt_path") if self.subcommand == "fit" else None
        missing += callbacks.record_in_wandb(
            loggers, Path(folder), str(self.subcommand), resumed, federation is not None
        )
        plugins = trainer_config.get("plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, callbacks.AtomicCheckpoints()]
        return super().instantiate_trainer(callbacks=[*chosen, *missing], logger=loggers, **kwargs)

    def _loggers(self, configured: Any) -> list[Logger] | bool:
        if configured is False:
            return False
        chosen = [] if configured in (None, True) else configured if isinstance(configured, list) else [configured]
        rows = callbacks.RunLogger(str(self.run_folder))  # the CSV is always written, whatever else is
        return [*([] if any(isinstance(lg, CSVLogger) for lg in chosen) else [rows]), *chosen]


def _best(folder: str) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="best", monitor="val/score", mode="max", enable_version_counter=False)
