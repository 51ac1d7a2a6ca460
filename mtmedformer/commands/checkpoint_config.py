"""The configuration a checkpoint was trained with, as the base that the command line overrides."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import yaml

from mtmedformer.errors import ConfigError

LIGHTNING_COMMANDS = ("fit", "validate", "test", "predict")


def with_checkpoint_base(argv: list[str], stack: ExitStack) -> list[str]:
    """Put the checkpoint's own model (and its run's data) before the user's arguments, which then win key by key."""
    checkpoint = _value(argv, "--ckpt_path")
    if not argv or argv[0] not in LIGHTNING_COMMANDS or not checkpoint or not Path(checkpoint).is_file():
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


def existing_checkpoint(checkpoint: Path) -> Path:
    """Return the path of a checkpoint, or raise a ``ConfigError`` that lists what lies beside where it should be."""
    if not checkpoint.is_file():
        there = sorted(p.name for p in checkpoint.parent.glob("*.ckpt")) if checkpoint.parent.is_dir() else []
        raise ConfigError(
            f"--ckpt_path={checkpoint}: no such file; {checkpoint.parent} holds {', '.join(there) or 'no checkpoint'}."
        )
    return checkpoint
