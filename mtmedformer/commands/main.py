"""The command line: ``fit``, ``validate``, ``test``, ``predict`` by LightningCLI, and ``fingerprint``.

The only module that imports every room of the house; importing them here is what makes short class names work.
"""

from __future__ import annotations

import errno
import importlib
import inspect
import logging
import os
import re
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ModelSummary, ProgressBar, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, instantiate_class
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException

import mtmedformer
from mtmedformer.commands.predict_images import with_images
from mtmedformer.errors import ConfigError, UserError

COMMANDS = ("fit", "validate", "test", "predict")
TOOLS = {  # everything else: the module whose main(argv) runs it
    "compare": "mtmedformer.commands.compare.command",
    "export": "mtmedformer.commands.export.command",
    "fingerprint": "mtmedformer.commands.fingerprint.command",
    "sweep": "mtmedformer.commands.sweep",
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0 done; 1 failed or interrupted, go on with ``--ckpt_path=last`` (``predict --images``: some images failed, go on
    with the same command); 2 a mistake the message explains; 3 done, but not with everything: a callback says so by its
    ``exit_code``.
    """
    argv = sys.argv[1:] if argv is None else argv
    _quieten()
    try:
        _check_rooms()
        if argv and argv[0] in TOOLS:
            exit_code: int = importlib.import_module(TOOLS[argv[0]]).main(argv[1:])
            return exit_code
        with ExitStack() as stack:
            trainer = CommandLine(with_images(argv, stack)).trainer
        return max((getattr(callback, "exit_code", 0) for callback in trainer.callbacks), default=0)  # type: ignore[attr-defined]
    except (UserError, MisconfigurationException) as error:
        return _mistake(str(error), getattr(error, "exit_code", 2))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        return _mistake(f"no space left to write ({error}); make room and go on with --ckpt_path=last", 1)
    except ValueError as error:  # jsonargparse wraps whatever a constructor raises
        cause = _user_error(error)
        if cause is None:
            raise
        return _mistake(str(cause), cause.exit_code)
    except SIGTERMException:  # a SystemExit that would pass for success
        return 1


def _mistake(message: str, exit_code: int) -> int:
    text = " ".join(message.split())
    print(textwrap.fill(f"mtmedformer: {text}", width=100, break_long_words=False), file=sys.stderr)
    return exit_code


def _user_error(error: BaseException | None) -> UserError | None:
    """Return the ``UserError`` among the causes of an exception, if there is one; a missing package counts as one."""
    while error is not None and not isinstance(error, UserError):
        if isinstance(error, ModuleNotFoundError) and "pip install" in str(error):  # a logger, a profiler
            return ConfigError(str(error).replace("`", "'"))
        error = error.__cause__ or error.__context__
    return error


class Parser(LightningArgumentParser):
    """Reports a mistake in the configuration as one paragraph instead of a usage page and a traceback."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the mistake as a ``ConfigError``."""
        raise ConfigError(_paragraph(message)) from ex


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
            save_config_callback=_room("callbacks").SaveRunConfig,
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
        parser.add_subclass_arguments(_room("callbacks").Federation, "federation", required=False)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, with what the checkpoint was trained with as the base that the command line overrides."""
        with ExitStack() as stack:
            self.config = parser.parse_args(_with_checkpoint_base(self.argv, stack))

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
        callbacks = _room("callbacks")
        root = Path(config.trainer.default_root_dir or "runs/run")
        checkpoint = config.get("ckpt_path")
        if checkpoint in {"last", "best"}:
            folder = callbacks.latest_run_folder(root)
            config.ckpt_path = str(_existing(folder / "checkpoints" / f"{checkpoint}.ckpt"))
        elif checkpoint:
            _existing(Path(checkpoint))
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
        rooms, folder = _room("callbacks"), str(self.run_folder)
        checkpoints = f"{folder}/checkpoints"
        trainer_config = self._get(self.config_init, "trainer")
        chosen = list(trainer_config.get("callbacks") or [])
        defaults: list[tuple[type[Callback], Callable[[], Callback]]] = [
            (rooms.QuarantineReport, lambda: rooms.QuarantineReport(folder)),
            (rooms.MetricsReport, lambda: rooms.MetricsReport(folder)),
            (rooms.ReliabilityReport, lambda: rooms.ReliabilityReport(folder)),
            (rooms.ModelReport, lambda: rooms.ModelReport(folder)),
            (rooms.PredictionWriter, lambda: rooms.PredictionWriter(f"{folder}/predictions")),
        ]
        if trainer_config.get("enable_model_summary") is not False:
            defaults.append((ModelSummary, rooms.PartsSummary))
        if trainer_config.get("enable_progress_bar") is not False:
            defaults.append((ProgressBar, lambda: TQDMProgressBar(leave=True)))
        if self.subcommand in {"fit", "validate"}:
            defaults += [(rooms.Overlays, lambda: rooms.Overlays(folder)), (rooms.MetricsTable, rooms.MetricsTable)]
        if self.subcommand == "fit" and trainer_config.get("enable_checkpointing") is not False:
            defaults += [
                (rooms.ResumePoint, lambda: rooms.ResumePoint(checkpoints)),
                (ModelCheckpoint, lambda: _best(checkpoints)),
                (rooms.LastCheckpoint, lambda: rooms.LastCheckpoint(checkpoints)),
            ]
        federation = self._get(self.config_init, "federation") if self.subcommand == "fit" else None
        if federation is not None:
            chosen.append(federation)
            defaults.append((rooms.FederationReport, lambda: rooms.FederationReport(folder)))
        chosen.sort(key=lambda callback: isinstance(callback, rooms.PredictionWriter))  # writes what others add
        missing = [make() for kind, make in defaults if not any(isinstance(c, kind) for c in chosen)]
        loggers = self._loggers(trainer_config.get("logger"))
        if federation is not None and (checkpoint := self._get(self.config, "ckpt_path")):
            federation.loggers.resume_server(loggers, checkpoint)
        resumed = self._get(self.config, "ckpt_path") if self.subcommand == "fit" else None
        missing += rooms.record_in_wandb(loggers, Path(folder), str(self.subcommand), resumed, federation is not None)
        plugins = trainer_config.get("plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, rooms.AtomicCheckpoints()]
        return super().instantiate_trainer(callbacks=[*chosen, *missing], logger=loggers, **kwargs)

    def _loggers(self, configured: Any) -> list[Logger] | bool:
        if configured is False:
            return False
        chosen = [] if configured in (None, True) else configured if isinstance(configured, list) else [configured]
        rows = _room("callbacks").RunLogger(str(self.run_folder))  # the CSV is always written, whatever else is
        return [*([] if any(isinstance(lg, CSVLogger) for lg in chosen) else [rows]), *chosen]


def _quieten() -> None:
    """Drop the few messages that are no news to a user: an advertisement, and deprecations inside Lightning."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    warnings.filterwarnings("ignore", r"The number of training batches .* is smaller than the logging interval")
    warnings.filterwarnings("ignore", r"Checkpoint directory .* exists and is not empty")
    warnings.filterwarnings("ignore", r"Be aware that when using `ckpt_path`, callbacks used to create the checkpoint")
    warnings.filterwarnings("ignore", r"Total length of `ImageBatches` across ranks is zero")  # all is done already
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_worth_reading)
    warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", module="lightning")


def _worth_reading(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not any(word in message for word in ("litlogger", "litmodels", "Skipping setting a", "TPU available"))


def _best(folder: str) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="best", monitor="val/score", mode="max", enable_version_counter=False)


def _with_checkpoint_base(argv: list[str], stack: ExitStack) -> list[str]:
    """Put the checkpoint's own model (and its run's data) before the user's arguments, which then win key by key."""
    checkpoint = _value(argv, "--ckpt_path")
    if not argv or argv[0] not in COMMANDS or not checkpoint or not Path(checkpoint).is_file():
        return argv
    try:
        stored = torch.load(checkpoint, weights_only=True, map_location="cpu", mmap=True)
    except Exception as error:  # any unreadable file ends here, whatever torch makes of it
        raise ConfigError(
            f"--ckpt_path={checkpoint}: not a checkpoint that can be read safely ({type(error).__name__})"
        ) from error
    hparams = dict(stored.get("hyper_parameters", {}))
    base: dict[str, Any] = {}
    if "_class_path" in hparams:
        class_path = hparams.pop("_class_path")
        hparams.pop("_instantiator", None)
        base["model"] = {"class_path": class_path, "init_args": hparams}
    folder = Path(checkpoint).parent.parent
    if argv[0] != "fit" and (folder / "config.yaml").is_file() and not _configures(argv, "data"):
        base["data"] = yaml.safe_load((folder / "config.yaml").read_text())["data"]
    if not base:
        return argv
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    (folder / "checkpoint.yaml").write_text(yaml.safe_dump(base))
    return [argv[0], "--config", str(folder / "checkpoint.yaml"), *argv[1:]]


def _configures(argv: list[str], key: str) -> bool:
    """Return whether a config file on the command line, or ``--key CLASS`` itself, sets ``key``."""
    if _value(argv, f"--{key}") is not None or _value(argv, f"--{key}.class_path") is not None:
        return True
    following = zip(argv, [*argv[1:], ""], strict=True)
    files = [b if a in {"--config", "-c"} else a.removeprefix("--config=") for a, b in following if _names_config(a)]
    return any(Path(f).is_file() and key in (yaml.safe_load(Path(f).read_text()) or {}) for f in files)


def _names_config(argument: str) -> bool:
    return argument in {"--config", "-c"} or argument.startswith("--config=")


def _value(argv: list[str], option: str) -> str | None:
    """Return the last value of ``--option VALUE`` or ``--option=VALUE``."""
    found = None
    for a, b in zip(argv, [*argv[1:], None], strict=True):
        if a == option:
            found = b
        elif a.startswith(f"{option}="):
            found = a.split("=", 1)[1]
    return found


def _existing(checkpoint: Path) -> Path:
    if not checkpoint.is_file():
        there = sorted(p.name for p in checkpoint.parent.glob("*.ckpt")) if checkpoint.parent.is_dir() else []
        raise ConfigError(
            f"--ckpt_path={checkpoint}: no such file; {checkpoint.parent} holds {', '.join(there) or 'no checkpoint'}."
        )
    return checkpoint


def _paragraph(message: str) -> str:
    """Shorten a jsonargparse message to what a person needs: the key, what is wrong with it, and close choices."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    reasons = [line.removeprefix("- ") for line in lines if line.startswith("- ") and "NoneType" not in line]
    key = re.search(r'[Kk]ey "([^"]+)"', message)
    text = f"{key[1]}: {'; '.join(dict.fromkeys(reasons))}" if key and reasons else " ".join(lines)
    text = re.split(r" Given value|\.? For help|usage:", text)[0][:900]
    unknown = re.search(r"Option '([\w.]+)' is not accepted|[Uu]nrecognized arguments: (?:--)?([\w.]+)", text)
    if unknown and "did you mean" not in text:
        name = (unknown[1] or unknown[2]).split(".")[-1]
        close = get_close_matches(name, _parameters(), n=3)
        text += f"; did you mean {' or '.join(close)}?" if close else ""
    return text


def _parameters() -> list[str]:
    """Return every constructor argument that YAML can name in this project and in Lightning's Trainer."""
    kinds: list[Any] = [Trainer, mtmedformer.MultiTaskModule, mtmedformer.SharedEncoder, mtmedformer.HybridLoss]
    for base in (_room("datamodules").MedicalDataModule, _room("mtmedformer.heads").TaskHead):
        kinds += [base, *base.__subclasses__()]
    return sorted({name for kind in kinds for name in inspect.signature(kind.__init__).parameters} - {"self", "kwargs"})


def _room(name: str) -> Any:
    return importlib.import_module(name)


def _check_rooms() -> None:
    """Refuse to run where another package called ``callbacks`` or ``federation`` is found before ours."""
    home = Path(mtmedformer.__file__).resolve().parent.parent
    for name in ("callbacks", "datamodules", "federation"):
        found = Path(_room(name).__file__).resolve().parent.parent
        if found != home:
            raise ConfigError(
                f"the package '{name}' in {found} hides MTMedFormer's own; rename it, or run from another folder "
                f"(sys.path[0] is {sys.path[0] or os.getcwd()})."
            )


if __name__ == "__main__":
    sys.exit(main())
