"""``predict --images … --output …``: predict plain files, preprocessed as in training."""

from __future__ import annotations

import argparse
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml

from mtmedformer.commands.checkpoint_config import run_config
from mtmedformer.commands.load.preparation import PREPARATION, preparation
from mtmedformer.commands.named_classes import check_stored, own_words
from mtmedformer.encoders.familiarity import NO_FAMILIARITY
from mtmedformer.errors import ConfigError

USAGE = (
    "mtmedformer predict --ckpt_path CKPT --images DIR|FILE… --output DIR [--dicom=false] [--overlays=false] "
    "[--gsps] [--secondary_capture] [--refuse_unfamiliar]"
)

_FLAGS = {"dicom": True, "overlays": True, "gsps": False, "secondary_capture": False, "refuse_unfamiliar": False}
"""Arguments of ``PredictionWriter`` with a flag, and their values without it."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"predict: {message}; usage: {USAGE}")


def with_images(argv: list[str], stack: ExitStack, trusted: bool = False) -> list[str]:
    """Turn ``--images``, ``--output`` and the flags of the output into a configuration; other arguments stay.

    The flags are those of ``_FLAGS``. The preprocessing is that of ``config.yaml``
    in the run folder of the checkpoint. Other arguments of the command line, for example ``--data.image_size``,
    override it.

    Args:
        argv: The command line, the subcommand first.
        stack: Deletes the file of the configuration when it is closed.
        trusted: Allow a preset of another project in the ``config.yaml``.

    Raises:
        ConfigError: An argument is missing or contradicts another, or the preprocessing is unknown.
    """
    if argv[:1] != ["predict"]:
        return argv
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--images", nargs="+", action="extend")
    parser.add_argument("--output")
    parser.add_argument("--dicom", type=_flag)
    parser.add_argument("--overlays", type=_flag)
    for name in ("gsps", "secondary_capture", "refuse_unfamiliar"):
        parser.add_argument(f"--{name}", type=_flag, nargs="?", const=True)
    given, rest = parser.parse_known_args(argv[1:])
    if given.images is None:
        stray = [f"--{name}" for name in ("output", *_FLAGS) if getattr(given, name) is not None]
        if stray:
            raise ConfigError(f"predict: {', '.join(stray)} needs --images; usage: {USAGE}")
        return argv
    if given.output is None:
        raise ConfigError(f"predict: --images needs --output, the folder for the results; usage: {USAGE}")
    outer = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    outer.add_argument("--ckpt_path")
    outer.add_argument("--data")
    known, _ = outer.parse_known_args(rest)
    if known.ckpt_path is None or known.ckpt_path in {"last", "best"}:
        raise ConfigError("predict --images: --ckpt_path must name a checkpoint's file")
    if not Path(known.ckpt_path).is_file():
        raise ConfigError(f"--ckpt_path={known.ckpt_path}: no such file")
    if given.refuse_unfamiliar and not _describes_its_images(Path(known.ckpt_path)):
        raise ConfigError(NO_FAMILIARITY)
    if known.data is not None:
        raise ConfigError(f"predict: --images and --data={known.data} exclude each other")
    configuration = {
        "data": {
            "class_path": "datamodules.ImageFolderDataModule",
            "init_args": {"images": given.images, **_preparation(Path(known.ckpt_path), rest, trusted)},
        },
        "trainer": {"callbacks": [_writer(given)], "default_root_dir": given.output},
    }
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    (folder / "images.yaml").write_text(yaml.safe_dump(configuration), encoding="utf-8")
    return ["predict", "--config", str(folder / "images.yaml"), *rest, f"--trainer.default_root_dir={given.output}"]


def _describes_its_images(checkpoint: Path) -> bool:
    """Return whether a checkpoint has a familiarity; one that cannot be read is explained when it is loaded."""
    try:
        stored = torch.load(checkpoint, weights_only=True, map_location="cpu", mmap=True)
    except Exception:  # torch raises many types of exceptions for unreadable files
        return True
    return not isinstance(stored, dict) or bool(stored.get("familiarity"))


def _preparation(checkpoint: Path, rest: list[str], trusted: bool) -> dict[str, Any]:
    """Return the preprocessing of the run of a checkpoint, unless the command line sets all of it."""
    chosen = [name for name in PREPARATION if any(a.split("=")[0].startswith(f"--data.{name}") for a in rest)]
    if len(chosen) == len(PREPARATION):
        return {}
    file = checkpoint.parent.parent / "config.yaml"
    stored = preparation((run_config(file.parent) or {}).get("data"))
    if stored.get("preset") is not None:
        check_stored(stored["preset"], str(file), own_words(rest), trusted)
    if "image_size" not in stored and "image_size" not in chosen:
        raise ConfigError(
            f"predict --images: {file} has no preprocessing of the training; set it with "
            "--data.image_size=[HEIGHT,WIDTH] and, for mammograms cropped to the breast, "
            "--data.preset=datamodules.BreastPreset"
        )
    return {name: value for name, value in stored.items() if name not in chosen or name == "preset"}


def _writer(given: argparse.Namespace) -> dict[str, Any]:
    outputs = {name: usual if getattr(given, name) is None else getattr(given, name) for name, usual in _FLAGS.items()}
    return {"class_path": "callbacks.PredictionWriter", "init_args": {"folder": given.output, **outputs}}


def _flag(text: str) -> bool:
    if text.lower() not in {"true", "false"}:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"
