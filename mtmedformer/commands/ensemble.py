"""``--ckpt_path=[a,b,c]``: the checkpoints of an ensemble, and checks that they belong together."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datamodules.base import MedicalDataModule
from mtmedformer.commands.checkpoint_config import configures, existing_checkpoint, run_config
from mtmedformer.commands.load.stored_model import build_members, read_model
from mtmedformer.commands.named_classes import check_stored, own_words
from mtmedformer.errors import ConfigError
from mtmedformer.inference.ensemble import join
from mtmedformer.module import MultiTaskModule

OPTION = "--ckpt_path"

_OF_TEST_IMAGES = frozenset({"seed", "test_fraction", "official_splits", "limit", "split"})
"""Arguments of a data set that decide which of its images are for testing."""


def named_checkpoints(text: str) -> list[Path]:
    """Return the files that ``[a,b,c]`` names, in that order; a pattern such as ``fold*/checkpoints/best.ckpt`` is one.

    Raises:
        ConfigError: There are fewer than two, one is missing, or one is named twice.
    """
    names = [name.strip().strip("'\"") for name in text.strip().removeprefix("[").removesuffix("]").split(",")]
    files = [file for name in names if name for file in _matching(name)]
    if len(files) < 2:
        raise ConfigError(f"{OPTION}={text}: an ensemble needs at least two checkpoints; it names {len(files)}")
    for file in files:
        existing_checkpoint(file)
    if twice := [file for n, file in enumerate(files) if os.path.realpath(file) in map(os.path.realpath, files[:n])]:
        raise ConfigError(f"{OPTION}: {twice[0]} is named twice; name each member of the ensemble once")
    return files


def without_members(argv: list[str]) -> tuple[list[str], list[Path]]:
    """Replace ``--ckpt_path=[a,b,c]`` on a command line by its first checkpoint.

    Args:
        argv: The command line, the subcommand first.

    Returns:
        The command line for one model, and all checkpoints of the ensemble; empty where there is no list.

    Raises:
        ConfigError: The subcommand takes one checkpoint only, or as `named_checkpoints`.
    """
    changed, members = list(argv), list[Path]()
    for n, (word, following) in enumerate(zip(argv, [*argv[1:], ""], strict=True)):
        value = following if word == OPTION else word.partition("=")[2] if word.startswith(f"{OPTION}=") else ""
        if value.lstrip().startswith("["):
            if argv[0] not in ("test", "predict"):
                raise ConfigError(f"{argv[0]}: {OPTION} takes one checkpoint here; test and predict take several")
            members = named_checkpoints(value)
            changed[n : n + 1 + (word == OPTION)] = [f"{OPTION}={members[0]}"] + [""] * (word == OPTION)
    return [word for word in changed if word], members


def join_members(model: Any, files: Sequence[Path], argv: list[str], trusted: bool) -> None:
    """Make a model the first member of an ensemble.

    Args:
        model: The model of the first checkpoint.
        files: The checkpoints of all members.
        argv: The command line; classes of other projects that it or its configuration files name are allowed.
        trusted: Allow all classes of other projects.

    Raises:
        ConfigError: A member cannot be read or names a class that is not allowed, the members do not belong together,
            or one may have been trained on the images that ``test`` reads.
    """
    if not isinstance(model, MultiTaskModule):
        raise ConfigError(f"{OPTION}: a {type(model).__name__} makes no ensemble; give one checkpoint")
    stored = read_model(files)
    for one in stored.members:
        check_stored(one.model, str(one.source), own_words(argv), trusted)
    join(model, build_members(stored, model, trusted=True))  # their classes are checked
    if argv[0] == "test" and not configures(argv, "data"):
        check_test_images(files)


def check_test_images(files: Sequence[Path]) -> None:
    """Check that the runs of an ensemble have the same test images, so that no member was trained on them.

    Args:
        files: The checkpoints. A run without a ``config.yaml`` is passed over.

    Raises:
        ConfigError: Two runs split their images differently.
    """
    first: tuple[Path, dict[str, Any]] | None = None
    for file in files:
        data = (run_config(file.parent.parent) or {}).get("data")
        if not isinstance(data, dict):
            continue
        now = {key: value for key, value in _leaves(data) if key.rpartition(".")[2] in _OF_TEST_IMAGES}
        first = first or (file, now)
        keys = [key for key in {**first[1], **now} if first[1].get(key) != now.get(key)]
        if keys:
            raise ConfigError(
                f"test: {first[0]} was trained with data.{keys[0]}={first[1].get(keys[0])} and {file} with "
                f"{now.get(keys[0])}, so one may be tested on images the other was trained on; train all members with "
                "the same split, or name images that are new to all of them with --config=FILE"
            )


def check_test_split(data: Any, files: Sequence[Path], argv: list[str]) -> None:
    """Check, once the records are read, that folds are not tested on validation images for want of a test split.

    Args:
        data: The data module.
        files: The checkpoints of an ensemble; with none nothing is checked.
        argv: The command line.

    Raises:
        ConfigError: The images to test are those of one fold; the other members were trained on them.
    """
    if not files or argv[0] != "test" or configures(argv, "data") or not isinstance(data, MedicalDataModule):
        return
    if data.fold is not None and data.test_split == "test" and "test" not in data.splits.values():
        raise ConfigError(
            "test: these data have no test split, so the validation images of one fold would be tested, and the other "
            "members were trained on them; name other images with --config=FILE, or train with data.test_fraction"
        )


def ensemble_folder(files: Sequence[Path]) -> Path:
    """Return the folder of the results of an ensemble: beside the run folders of its members, named by their paths."""
    absolute = sorted(os.path.abspath(file) for file in files)
    parent = Path(os.path.commonpath([Path(file).parent.parent.parent for file in absolute]))
    here = Path.cwd()
    digest = hashlib.sha256("\n".join(absolute).encode()).hexdigest()[:8]
    return (parent.relative_to(here) if parent.is_relative_to(here) else parent) / f"ensemble-{digest}"


def _matching(name: str) -> list[Path]:
    """Return the files of a name, or of a pattern, in the order of their names."""
    path = Path(name)
    if path.is_file() or not any(character in name for character in "*?"):
        return [path]
    root = Path(path.anchor) if path.is_absolute() else Path()
    found = sorted(file for file in root.glob(str(path.relative_to(path.anchor))) if file.is_file())
    if not found:
        raise ConfigError(f"{OPTION}={name}: no file has such a name")
    return found


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested sections by dotted keys, as on the command line."""
    if isinstance(value, Mapping) and value:
        for key, one in value.items():
            yield from _leaves(one, prefix if key == "init_args" else f"{prefix}.{key}".lstrip("."))
    else:
        yield prefix, value
