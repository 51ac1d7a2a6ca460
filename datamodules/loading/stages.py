"""The splits that each stage of the Trainer reads, and the error of a data set without images for a stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

from datamodules.records import Record, Split
from mtmedformer.errors import DataError

Part = Literal["train", "val", "test", "all"]
"""A split, or all images."""

_FIXES = {
    "fit": "leave the split of some patients blank or set it to train, or set official_splits to false",
    "validate": "set the split of some patients to val, or run test",
    "test": "set data.init_args.test_split to train or all",
    "predict": "set data.init_args.predict_split to another split, or to all",
}


def served(stage: str | None, splits: Mapping[str, Split], test: Part, predict: Part) -> dict[str, Part]:
    """Return the data sets that a stage reads, with the split of each.

    Args:
        stage: ``fit``, ``validate``, ``test``, ``predict``, or ``None`` for all but ``predict``.
        splits: Split by record id.
        test: The split to test; val takes the place of a missing test.
        predict: The split to predict.
    """
    if stage == "predict":
        return {"predict": predict}
    fit: dict[str, Part] = {"train": "train", "val": "val"}
    tested: dict[str, Part] = {"test": test} if test != "test" or "test" in splits.values() else {"val": "val"}
    by_stage: dict[str, dict[str, Part]] = {"fit": fit, "validate": {"val": "val"}, "test": tested}
    return by_stage[stage] if stage else fit | tested


def serves(stage: str, parts: Mapping[str, Part], splits: Mapping[str, Split]) -> bool:
    """Return whether there are images for a stage; ``fit`` can do without validation.

    Args:
        stage: The stage.
        parts: The data sets that it reads, as ``served`` returns them.
        splits: Split by record id.
    """
    needed = set(parts.values()) - ({"val"} if stage == "fit" else set())
    return needed <= {"all", *splits.values()}


def lacking(name: str, stage: str, splits: Mapping[str, Split]) -> DataError:
    """Return the error of a data set without images for a stage.

    Args:
        name: Name of the data set.
        stage: The stage.
        splits: Split by record id.
    """
    held = ", ".join(f"{count} {split}" for split, count in sorted(Counter(splits.values()).items())) or "no"
    return DataError(f"{name}: no image to {stage}; its splits hold {held} images. Fix: {_FIXES[stage]}")


def drawn_share(name: str, tested: Sequence[Record], count: int) -> str:
    """Return a sentence if the images to test were drawn from a set without a test split of its own, else nothing.

    Args:
        name: Name of the data set.
        tested: The images to test.
        count: Number of images of the set.
    """
    if len(tested) == count or any(record.split == "test" for record in tested):
        return ""
    share = f"{len(tested)} of {count} images are tested: a share of the patients"
    return f"{name}: {share}; data.init_args.test_split=all tests all"
