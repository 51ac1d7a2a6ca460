"""The configuration of a checkpoint: base of the command line, and what decides whether a run is continued.

A resumed ``fit`` continues in the run folder of its checkpoint only if it trains the same thing. Compared are the
sections ``seed_everything``, ``model``, ``data``, ``optimizer``, ``lr_scheduler`` and ``federation`` without
``FREE_KEYS``, and the ``TRAINER_KEYS`` of ``trainer``. Everything else may change: ``trainer.max_epochs`` and other
limits, devices, loggers, callbacks.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace

import callbacks
from mtmedformer.checks import malformed, no_larger_than
from mtmedformer.commands.named_classes import check_stored, own_words
from mtmedformer.commands.yaml_files import read_yaml
from mtmedformer.errors import ConfigError

LIGHTNING_COMMANDS = ("fit", "validate", "test", "predict")

KEYWORDS = frozenset({"last", "best", "null"})
"""Values of ``--ckpt_path`` that are no file."""

COMPARED = ("seed_everything", "model", "data", "optimizer", "lr_scheduler", "federation")
"""Sections that are the same in a run and its continuation."""

TRAINER_KEYS = ("precision", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm")
"""Keys of ``trainer`` that are the same, too: they decide what a step does."""

OF_LIGHTNING = {"pytorch-lightning_version": str, "epoch": int, "global_step": int}
"""Keys that Lightning reads from every checkpoint, with their types."""

FREE_KEYS = frozenset(
    {
        *("num_workers", "cache_dir", "cache_max_gb", "predict_split"),  # of a data set
        *("placement", "sites_at_once", "policy", "validate_sites"),  # of a federation
        *("accelerator", "devices", "strategy", "callbacks", "logger", "profiler"),  # of the Trainer of a site
        *("enable_progress_bar", "enable_model_summary", "log_every_n_steps"),
    }
)
"""Keys within the compared sections that may differ: where and how fast, but not what is trained."""


def with_checkpoint_base(argv: list[str], stack: ExitStack, trusted: bool = False) -> list[str]:
    """Put the model of the checkpoint, and the data of its run, before the user's arguments, which override them.

    Args:
        argv: The command line.
        stack: Deletes the file of the configuration when it is closed.
        trusted: Allow classes of other projects.

    Raises:
        ConfigError: The checkpoint or the configuration of its run is damaged, or names a class that is not allowed;
            nothing is imported then.
    """
    checkpoint = _value(argv, "--ckpt_path")
    if not argv or argv[0] not in LIGHTNING_COMMANDS or checkpoint is None or checkpoint in KEYWORDS:
        return argv
    base: dict[str, Any] = {}
    own = own_words(argv)
    if model := stored_model(checkpoint, argv, trusted):
        base["model"] = model if argv[0] == "fit" else without_weight_files(model)
    folder = Path(checkpoint).parent.parent
    if argv[0] != "fit" and not configures(argv, "data") and (run := run_config(folder)):
        if run.get("data") is not None:
            check_stored(run["data"], str(folder / "config.yaml"), own, trusted)
        base["data"] = run.get("data")
    if not base:
        return argv
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    (folder / "checkpoint.yaml").write_text(yaml.safe_dump(base, sort_keys=False))
    return [argv[0], "--config", str(folder / "checkpoint.yaml"), *argv[1:]]


def stored_model(checkpoint: str, argv: list[str], trusted: bool = False) -> dict[str, Any] | None:
    """Return the description of the model in a checkpoint; ``None`` where it has none.

    Args:
        checkpoint: The file.
        argv: The command line; classes that it or its files name are allowed.
        trusted: Allow classes of other projects.

    Raises:
        ConfigError: The checkpoint is damaged, or names a class that is not allowed.
    """
    hparams = dict(read_checkpoint(str(existing_checkpoint(Path(checkpoint)))).get("hyper_parameters") or {})
    if "_class_path" not in hparams:
        return None
    class_path = hparams.pop("_class_path")
    hparams.pop("_instantiator", None)
    model = {"class_path": class_path, "init_args": hparams}
    check_stored(model, f"--ckpt_path={checkpoint}", own_words(argv), trusted)
    return model


def without_weight_files(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the description of a model without files and downloads for its first weights, which are overwritten."""
    arguments = dict(model["init_args"]) | {"init_weights": None}
    encoder = arguments.get("encoder")
    if isinstance(encoder, Mapping) and isinstance(own := encoder.get("init_args"), Mapping):
        unused = {"pretrained": False, "checkpoint_path": None}
        own = dict(own) | {key: value for key, value in unused.items() if key in own}
        arguments["encoder"] = {"class_path": encoder.get("class_path"), "init_args": own}
    return {"class_path": model["class_path"], "init_args": arguments}


def configures(argv: list[str], key: str) -> bool:
    """Return whether a config file on the command line, or ``--key CLASS`` itself, sets ``key``."""
    if _value(argv, f"--{key}") is not None or _value(argv, f"--{key}.class_path") is not None:
        return True
    following = zip(argv, [*argv[1:], ""], strict=True)
    files = [b if a in {"--config", "-c"} else a.removeprefix("--config=") for a, b in following if _names_config(a)]
    return any(Path(f).is_file() and key in (read_yaml(Path(f)) or {}) for f in files)


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


def read_checkpoint(file: str) -> dict[str, Any]:
    """Return the contents of a checkpoint, read without running any code in it.

    Raises:
        ConfigError: It is damaged, or contains other objects than tensors and plain values.
    """
    try:
        stored = torch.load(file, weights_only=True, map_location="cpu", mmap=True)
    except Exception as error:  # torch raises many kinds for an unreadable file
        raise ConfigError(
            f"--ckpt_path={file}: not a checkpoint that can be read safely: it is damaged, or contains objects other "
            f"than tensors and plain values, and unpickling objects can run any code ({type(error).__name__})"
        ) from error
    if wrong := malformed(stored):
        raise ConfigError(f"--ckpt_path={file}: not a checkpoint ({wrong})")
    checkpoint: dict[str, Any] = stored
    return checkpoint


@contextmanager
def building(checkpoint: str | None) -> Iterator[None]:
    """Bound the size of the model that a checkpoint describes, and turn what its construction raises into one sentence.

    Args:
        checkpoint: The file; with ``None`` nothing is changed.

    Raises:
        ConfigError: The model is much larger than the stored weights, or its arguments make no model.
    """
    if not checkpoint:
        yield
        return
    stored = read_checkpoint(checkpoint)
    for key, kind in OF_LIGHTNING.items():
        if not isinstance(stored.get(key), kind):
            raise ConfigError(
                f"--ckpt_path={checkpoint}: not a checkpoint of 'fit' (it has no {key}); give one, or load its weights "
                "with --model.init_weights"
            )
    try:
        with no_larger_than(stored["state_dict"]):
            yield
    except (RuntimeError, MemoryError, OverflowError, ZeroDivisionError, IndexError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else "no reason given"
        raise ConfigError(
            f"--ckpt_path={checkpoint}: the model it describes cannot be built ({type(error).__name__}: {reason})"
        ) from error


def difference(run: Mapping[str, Any], now: Mapping[str, Any], sections: Collection[str] = COMPARED) -> str | None:
    """Return the first key in which two configurations of ``fit`` train different things, with both values.

    Args:
        run: Configuration of the run that the checkpoint is of.
        now: Configuration of this command.
        sections: The sections to compare.
    """
    trainers = [{f"trainer.{key}": config.get("trainer", {}).get(key) for key in TRAINER_KEYS} for config in (run, now)]
    before, after = (
        _flat({key: config.get(key) for key in sections}) | trainer
        for config, trainer in zip((run, now), trainers, strict=True)
    )
    for key in [*after, *before]:
        old, new = before.get(key), after.get(key)
        if old != new and not FREE_KEYS & set(key.split(".")):
            return f"{key.replace('.init_args', '')}={_short(new)}, but the run was trained with {_short(old)}"
    return None


def run_config(folder: Path) -> dict[str, Any] | None:
    """Return the configuration in a run folder; ``None`` where there is none.

    Raises:
        ConfigError: The file is not a configuration.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        return None
    config = read_yaml(file)
    if not isinstance(config, dict):
        raise ConfigError(f"{file}: not the configuration of a run")
    return config


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested dictionaries by their dotted keys."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {key: leaf for name, one in value.items() for key, leaf in _flat(one, f"{prefix}.{name}".strip(".")).items()}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def checkpoint_file(config: Namespace) -> str:
    """Return the file that ``--ckpt_path`` names, also where it is ``last`` or ``best``.

    Args:
        config: The configuration of a subcommand, with a ``ckpt_path``.

    Raises:
        ConfigError: There is no such checkpoint yet.
    """
    if config.ckpt_path not in {"last", "best"}:
        return str(config.ckpt_path)
    root = Path(config.trainer.default_root_dir or "runs/run")
    folder = callbacks.latest_run_folder(root, f"{config.ckpt_path}.ckpt")
    return str(folder / "checkpoints" / f"{config.ckpt_path}.ckpt")


def existing_checkpoint(checkpoint: Path) -> Path:
    """Return the path of a checkpoint, or raise a ``ConfigError`` that lists what lies beside where it should be."""
    if checkpoint == Path():
        raise ConfigError("--ckpt_path is empty; name a checkpoint's file, last or best, or leave the option out")
    if not checkpoint.is_file():
        there = sorted(p.name for p in checkpoint.parent.glob("*.ckpt")) if checkpoint.parent.is_dir() else []
        raise ConfigError(
            f"--ckpt_path={checkpoint}: no such file; {checkpoint.parent} holds {', '.join(there) or 'no checkpoint'}."
        )
    return checkpoint
