"""Describe a data set for reports: patients, images and labels by split and site, exclusions, near-duplicates."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from datamodules.audit.image_statistics import content_of
from datamodules.audit.near_duplicates import find_duplicates, leak_report, thumbnail
from datamodules.cache.cache import Cache
from datamodules.cache.preprocessing import Preprocessing
from datamodules.cache.quarantine import Quarantine
from datamodules.images.presets import Preset
from datamodules.loading.dataset import pixels_of
from datamodules.records import Record, Split
from mtmedformer.batch import Task

SPLITS: tuple[Split, ...] = ("train", "val", "test")


class SetUpData(Protocol):
    """A data module that is set up; `datamodules.MedicalDataModule` documents the attributes."""

    tasks: dict[str, Task]
    records: list[Record]
    splits: dict[str, Split]
    quarantine: Quarantine
    image_size: tuple[int, int]
    preset: Preset | None
    preprocessing: Preprocessing
    cache: Cache
    generated: bool
    official_splits: bool
    seed: int


def describe(data: SetUpData, most: int = 10_000) -> dict[str, Any]:
    """Count what is in a data module that is set up, without names, ids and paths.

    Args:
        data: The data module.
        most: Largest number of images that are compared with each other for near-duplicates.

    Returns:
        ``dataset``, the class's name; ``image_size``; ``preset``; ``generated``, whether the images are drawn by a
        program; ``official_splits`` and ``seed``; ``splits``, patients, images and labelled images by task for each
        split; ``sites``, images by split for each site; ``views``, images by view; ``weak``, images with approximate
        truth by task; ``quarantine``, number of images and truths left out by reason; ``remarks``, number of
        corrections; ``shared_patients``, patients in more than one split; ``leaks``, pairs of near-duplicates.
    """
    by_split: dict[str, list[Record]] = defaultdict(list)
    sites: dict[str, Counter[str]] = defaultdict(Counter)
    splits_of: dict[str, set[str]] = defaultdict(set)
    for record in data.records:
        split = data.splits[record.id]
        by_split[split].append(record)
        sites[record.site][split] += 1
        splits_of[record.patient].add(split)
    views = Counter(record.view or "unknown" for record in data.records)
    return {
        "dataset": type(data).__name__,
        "image_size": list(data.image_size),
        "preset": type(data.preset).__name__ if data.preset else "none",
        "generated": data.generated,
        "official_splits": data.official_splits,
        "seed": data.seed,
        "splits": {split: _counts(by_split[split], list(data.tasks)) for split in SPLITS if by_split[split]},
        "sites": {site: dict(counts) for site, counts in sorted(sites.items())},
        "views": dict(views) if set(views) != {"unknown"} else {},
        "weak": dict(Counter(task for record in data.records for task in record.weak if task in data.tasks)),
        "quarantine": dict(data.quarantine.by_reason()),
        "remarks": dict(data.quarantine.remarks),
        "shared_patients": sum(len(splits) > 1 for splits in splits_of.values()),
        "leaks": leaks_among(data, most),
    }


def leaks_among(data: SetUpData, most: int) -> dict[str, int]:
    """Compare the images that are in the cache; none is decoded for it.

    Returns:
        ``images`` there are, ``compared`` of them, and pairs ``across_splits``, ``across_sites`` and
        ``across_patients``.
    """
    records = data.records[:most]
    keys = data.preprocessing.keys(records)
    known: list[Record] = []
    thumbnails: list[NDArray[np.uint8]] = []
    for record, key in zip(records, keys, strict=True):
        entry = data.cache.load(key)
        if entry is not None:
            pixels = pixels_of(entry)
            left, top, right, bottom = content_of(entry, pixels.shape)
            known.append(record)
            thumbnails.append(thumbnail(pixels[top:bottom, left:right]))
    counts = {"images": len(data.records), "compared": len(known)}
    if len(known) < 2:
        return counts | {"across_splits": 0, "across_sites": 0, "across_patients": 0}
    report = leak_report(find_duplicates(np.stack(thumbnails), [r.id for r in known]), known, data.splits, len(known))
    return counts | {
        "across_splits": len(report.across_splits),
        "across_sites": len(report.across_sites),
        "across_patients": len(report.across_patients),
    }


def _counts(records: list[Record], tasks: list[str]) -> dict[str, Any]:
    labelled = {task: sum(task in record.truth for record in records) for task in tasks}
    return {"patients": len({r.patient for r in records}), "images": len(records), "labelled": labelled}
