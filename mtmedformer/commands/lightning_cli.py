"""``fit``, ``validate``, ``test`` and ``predict``: LightningCLI with run folders and the callbacks every run needs.

Importing the packages here makes the short names of their classes work on the command line.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, instantiate_class
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer

import callbacks
import datamodules
import federation
import mtmedformer
from datamodules.images.own_intensity import with_texts
from mtmedformer.batch import Task
from mtmedformer.checks import check_tasks
from mtmedformer.commands.auto_heads import AUTO, add_heads, with_heads_of_checkpoint
from mtmedformer.commands.checkpoint_config import (
    building,
    checkpoint_file,
    difference,
    existing_checkpoint,
    read_checkpoint,
    run_config,
    with_checkpoint_base,
)
from mtmedformer.commands.ensemble import check_test_split, ensemble_folder, join_members, without_members
from mtmedformer.commands.lightning_internals import CLIWithoutCheckpointParsing
from mtmedformer.commands.load.preparation import data_state
from mtmedformer.commands.messages import parser_message
from mtmedformer.commands.named_classes import TRUSTED
from mtmedformer.commands.predict_images import with_images
from mtmedformer.commands.run_callbacks import identify_run, names_checkpoints, run_callbacks
from mtmedformer.commands.trainer_settings import check_batch_norm, check_settings, check_validation
from mtmedformer.errors import ConfigError
from mtmedformer.module import MultiTaskModule
from mtmedformer.protocols import HasExitCode, PlannedData, TaskedData
from mtmedformer.storage.constructor_arguments import hyperparameters


def main(argv: list[str]) -> int:
    """Run one of the four commands and return its exit code.

    Args:
        argv: Arguments as on the command line, the command first.
    """
    check_packages()
    trusted, argv = TRUSTED in argv, [one for one in argv if one != TRUSTED]
    argv, checkpoints = without_members(argv)
    with ExitStack() as stack:
        trainer = CommandLine(with_images(argv, stack, trusted), trusted, checkpoints).trainer
    run_callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return max((one.exit_code for one in run_callbacks if isinstance(one, HasExitCode)), default=0)


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
    """Reports an error in the configuration as one sentence instead of a usage page and a traceback."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the error as a ``ConfigError``."""
        keys = [key.split(".") for key in self.get_defaults().keys()]  # noqa: SIM118 (a Namespace, not a dict)
        known = {".".join(key[:length]) for key in keys for length in range(1, len(key) + 1)}
        raise ConfigError(parser_message(message, ex, known)) from ex


class CommandLine(CLIWithoutCheckpointParsing):
    """LightningCLI with run folders and the callbacks that every run needs; the constructor runs the command.

    Args:
        argv: Arguments as on the command line, the subcommand first.
        trusted: Allow classes of other projects in a checkpoint and the configuration of its run.
        checkpoints: Checkpoints of all members of an ensemble; empty for a single model.

    Attributes:
        run_folder: The run folder.
        new_folder: Its reservation, where it is a new one.
        continues: Whether ``fit`` continues the run in the folder.
    """

    def __init__(self, argv: list[str], trusted: bool = False, checkpoints: Sequence[Path] = ()) -> None:
        self.argv, self.trusted, self.checkpoints = argv, trusted, checkpoints
        self.run_folder = Path()
        self.new_folder: callbacks.RunFolder | None = None
        self.continues = False
        with ExitStack() as self.resources:
            super().__init__(
                model_class=LightningModule,
                datamodule_class=LightningDataModule,  # a single data set, or a federation of several
                save_config_callback=None,  # RunStart saves it, once the run starts
                seed_everything_default=0,
                trainer_defaults={"log_every_n_steps": 10},
                parser_class=Parser,
                parser_kwargs={
                    "prog": "mtmedformer",
                    "description": "Train one transformer on several tasks in the same medical image. With --trusted, "
                    "--ckpt_path may name classes of other projects; importing them runs their code.",
                    "version": mtmedformer.__version__,
                },
                subclass_mode_model=True,
                subclass_mode_data=True,
                auto_configure_optimizers=False,
            )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``federation``, which turns ``fit`` into rounds, and the sections ``optimizer`` and ``lr_scheduler``."""
        parser.add_optimizer_args((Optimizer,))
        parser.add_lr_scheduler_args()
        parser.add_subclass_arguments(callbacks.Federation, "federation", required=False)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, with the configuration of the checkpoint as the base that the command line overrides."""
        with ExitStack() as stack:
            argv = with_checkpoint_base(self.argv, stack, self.trusted)
            try:
                self.config = parser.parse_args(argv)
            except ConfigError as error:
                if argv == self.argv or "required" not in str(error):
                    raise
                fix = "no config.yaml lies in the run folder of the checkpoint; name model and data with --config=FILE"
                raise ConfigError(f"{error}: {fix}") from error
            whole = with_heads_of_checkpoint(argv, self.config[self.config.subcommand], stack, self.trusted)
            if whole != argv:
                self.config = parser.parse_args(whole)
        check_settings(self.config[self.config.subcommand], str(self.config.subcommand))

    def after_instantiate_classes(self) -> None:
        """Set the module's optimizer and schedule from the top-level sections, and how it was configured.

        Raises:
            ConfigError: There is such a section, but the module configures its optimizer itself.
        """
        config = self.config[self.subcommand]
        if not isinstance(self.model, MultiTaskModule):
            if config.get("optimizer") or config.get("lr_scheduler"):
                raise ConfigError(
                    f"optimizer: {type(self.model).__name__} configures its optimizer itself; remove the sections "
                    "optimizer and lr_scheduler"
                )
            return
        if optimizer := config.get("optimizer"):
            self.model.optimizer = lambda parameters: instantiate_class((parameters,), optimizer)
        if scheduler := config.get("lr_scheduler"):
            self.model.lr_scheduler = lambda opt: instantiate_class(opt, scheduler)
        model = self.config_dump["model"]
        arguments = {k: v for k, v in model["init_args"].items() if k not in MultiTaskModule.not_recorded}
        if arguments.get("heads") == AUTO:
            arguments["heads"] = self.record["model"]["init_args"]["heads"]
        self.model.save_hyperparameters(hyperparameters(model["class_path"], arguments), logger=False)

    def before_instantiate_classes(self) -> None:
        """Resolve ``--ckpt_path``, choose the run folder and set the defaults that depend on the subcommand."""
        config = self.config[self.subcommand]
        root = Path(config.trainer.default_root_dir or "runs/run")
        keyword = config.get("ckpt_path") if config.get("ckpt_path") in {"last", "best"} else None
        if keyword:
            config.ckpt_path = checkpoint_file(config)
        if config.get("ckpt_path") is not None:
            existing_checkpoint(Path(config.ckpt_path))
        elif self.subcommand != "fit" and config.model.get("init_args", {}).get("init_weights", ...) is None:
            raise ConfigError(
                f"{self.subcommand}: the model is not trained; name a checkpoint with --ckpt_path=PATH (or last, best) "
                "or its weights with --model.init_weights=PATH"
            )
        if self.subcommand == "fit":
            folder = self._folder_of_fit(root, keyword)
        else:
            explicit = any(a.startswith("--trainer.default_root_dir") for a in self.argv)
            of_checkpoint = callbacks.run_folder_of(Path(config.ckpt_path)) if config.get("ckpt_path") else None
            of_checkpoint = ensemble_folder(self.checkpoints) if self.checkpoints else of_checkpoint
            folder = root if explicit or of_checkpoint is None else of_checkpoint
        self.run_folder = folder
        config.trainer.default_root_dir = str(folder)
        if self.subcommand == "predict" and not any(a.startswith("--return_predictions") for a in self.argv):
            config.return_predictions = False  # they are written to disk; memory must not grow with them
        if "verbose" in config and not any(a.startswith("--verbose") for a in self.argv):
            config.verbose = False  # MetricsTable and MetricsReport print the metrics

    def _folder_of_fit(self, root: Path, keyword: str | None) -> Path:
        """Return the folder of the run that is continued, or that of a new run, which is not created yet.

        Args:
            root: The configured folder.
            keyword: ``last`` or ``best`` where ``--ckpt_path`` is one of them.

        Raises:
            ConfigError: ``last`` or ``best`` with another configuration than that of the run.
        """
        config = self.config["fit"]
        if config.trainer.fast_dev_run:  # writes nothing
            return root
        folder = callbacks.run_folder_of(Path(config.ckpt_path)) if config.ckpt_path else None
        if folder is not None:
            run = run_config(folder)
            now = self.resolved_config()
            differs = difference(run, now) if run else None
            if run and config.optimizer and (changed := difference(run, now, ["optimizer"])):
                raise ConfigError(
                    f"{changed}. The optimizer is restored from the checkpoint: keep its settings, or start a new run "
                    "from the weights with model.init_weights=PATH instead of --ckpt_path."
                )
            if keyword and differs:
                raise ConfigError(
                    f"--ckpt_path={keyword} continues the run in {folder}, but {differs}. Keep its configuration, or "
                    f"start a new run from that checkpoint with --ckpt_path={config.ckpt_path}, or from its weights "
                    "alone with model.init_weights=PATH."
                )
            if keyword or (run and not differs and callbacks.is_run_folder_of(root, folder)):
                self.continues = True
                self.resources.callback(callbacks.lock_run(folder))
                return folder
        self.new_folder = callbacks.RunFolder(root)
        self.resources.callback(self.new_folder.release)
        if folder is not None:
            why = differs or (f"trainer.default_root_dir is {root}" if run else f"{folder} has no config.yaml")
            rank_zero_info(f"Training from {config.ckpt_path} in a new run folder, {self.new_folder.path}: {why}.")
        return self.new_folder.path

    def resolved_config(self) -> dict[str, Any]:
        """Return the configuration of the subcommand as plain values, all defaults and texts of files filled in."""
        values = yaml.safe_load(self.parser.dump(self.config, skip_unset=False))[str(self.subcommand)]
        return dict(with_texts(values))

    def instantiate_classes(self) -> None:
        """Instantiate with the identity of the run in its loggers, which is not saved with the configuration."""
        saved, self.record = self.config, self.resolved_config()
        if self.checkpoints:
            self.record["ckpt_path"] = [str(file) for file in self.checkpoints]
        self.config = saved.clone()
        config = self.config[self.subcommand]
        rounds = self.subcommand == "fit" and config.get("federation") is not None
        run = (self.run_folder, str(self.subcommand), config.ckpt_path if self.continues else None, rounds)
        for logger in (one for one in _listed(config.trainer.logger) if isinstance(one, Namespace)):
            identify_run(logger, *run)
        with building(self.config[self.subcommand].get("ckpt_path")):
            super().instantiate_classes()
        self.config = saved
        add_heads(self.model, self.datamodule, self.record)

    def before_fit(self) -> None:
        """Check data and checkpoint before the Trainer starts."""
        self._check()

    def before_validate(self) -> None:
        """Check data and checkpoint before the Trainer starts."""
        self._check()

    def before_test(self) -> None:
        """Check data and checkpoint before the Trainer starts."""
        self._check()

    def before_predict(self) -> None:
        """Check data and checkpoint before the Trainer starts."""
        self._check()

    def _check(self) -> None:
        """Compare model, checkpoint and data, and read the records, before loggers and caches write anything.

        Raises:
            UserError: They do not fit, or the data cannot be read.
        """
        checkpoint = self.config[self.subcommand].get("ckpt_path")
        if self.subcommand == "fit" and isinstance(self.model, MultiTaskModule):
            self.model.check_optimizer()
            if self.config["fit"].trainer.sync_batchnorm:
                check_batch_norm(self.trainer, self.model)
        if checkpoint and isinstance(self.model, MultiTaskModule):
            resumed = self.subcommand == "fit" and self.config["fit"].get("federation") is None
            self.model.check_checkpoint(stored := read_checkpoint(checkpoint), resumed)
            self.datamodule.load_state_dict(data_state(stored))  # Lightning restores it after setup
        if self.checkpoints:
            join_members(self.model, self.checkpoints, self.argv, self.trusted)
        if isinstance(self.datamodule, TaskedData) and self.datamodule.tasks:
            self._check_tasks(self.datamodule.tasks)
        self._check_federation()  # what needs no record
        if isinstance(self.datamodule, PlannedData):
            self.datamodule.plan()
            check_test_split(self.datamodule, self.checkpoints, self.argv)
            self._check_tasks(self.datamodule.tasks)
            self._check_federation()
            self.datamodule.require(str(self.subcommand))
        if self.subcommand == "fit" and isinstance(self.datamodule, datamodules.MedicalDataModule):
            images = list(self.datamodule.splits.values()).count("train")
            per_step = self.datamodule.batch_size * self.trainer.world_size
            check_validation(self.config["fit"].trainer, math.ceil(images / per_step))

    def _check_federation(self) -> None:
        rounds = self.config_init[self.subcommand].get("federation")
        if rounds is not None:
            rounds.check(self.trainer, self.model, self.datamodule)

    def _check_tasks(self, tasks: dict[str, Task]) -> None:
        if isinstance(self.model, MultiTaskModule):
            own = self.model.tasks
            if self.subcommand != "fit":  # some heads may be without labels; the module reports them
                own = {name: task for name, task in own.items() if name in tasks} or own
            places = [self.datamodule.class_place] if isinstance(self.datamodule, PlannedData) else []
            check_tasks(str(self.subcommand), own, tasks, *places)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the Trainer with the loggers, checkpoints and callbacks that every run needs."""
        config = self.config_init[self.subcommand]
        trainer = config.trainer
        plugins = _listed(trainer.plugins)
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, callbacks.AtomicCheckpoints()]
        if trainer.logger is not False:
            loggers = [one for one in _listed(trainer.logger) if isinstance(one, Logger)]
            kwargs["logger"] = [callbacks.RunLogger(str(self.run_folder)), *loggers]
        name = "config.yaml" if self.subcommand == "fit" else f"config_{self.subcommand}.yaml"
        start = callbacks.RunStart(self.new_folder or self.run_folder, self.record, name)
        logs_checkpoints = names_checkpoints(_listed(self.config[self.subcommand].trainer.logger))
        kwargs["callbacks"] = run_callbacks(config, str(self.subcommand), self.run_folder, start, logs_checkpoints)
        return super().instantiate_trainer(**kwargs)


def _listed(value: Any) -> list[Any]:
    """Return one value, several or none as a list."""
    return value if isinstance(value, list) else [] if value is None else [value]
