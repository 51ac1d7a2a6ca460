"""What a report says of a data set: who is in which split, what is labelled, what was left out, what is there twice."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from datamodules.audit.image_statistics import content_of
from datamodules.audit.near_duplicates import find_duplicates, leak_report, thumbnail
from datamodules.records import Record

if TYPE_CHECKING:
    from datamodules.base import MedicalDataModule

SPLITS = ("train", "val", "test")


def describe(data: MedicalDataModule, most: int = 10_000) -> dict[str, Any]:
    """Describe a data module that is set up, in counts and plain words: no name, no id, no path.

    Args:
        data: The data module.
        most: Most images that are compared with each other for near-duplicates.

    Returns:
        ``dataset``; ``image_size``; ``preset``; ``generated``, whether the images are drawn, not taken; ``splits``,
        patients, images and labelled images by task for each split; ``sites``, images by split for each site;
        ``views``, images by view; ``weak``, images with approximate truth by task; ``quarantine``, what was left out by
        reason; ``remarks``, what was corrected; ``shared_patients``, patients in more than one split; ``leaks``, pairs
        of near-duplicates.
    """
    by_split: dict[str, list[Record]] = defaultdict(list)
    sites: dict[str, Counter[str]] = defaultdict(Counter)
    homes: dict[str, set[str]] = defaultdict(set)
    for record in data.records:
        split = data.splits[record.id]
        by_split[split].append(record)
        sites[record.site][split] += 1
        homes[record.patient].add(split)
    views = Counter(record.view or "unknown" for record in data.records)
    return {
        "dataset": type(data).__name__,
        "image_size": list(data.image_size),
        "preset": type(data.preset).__name__ if data.preset else "none",
        "generated": getattr(data, "generated", False),
        "official_splits": data.official_splits,
        "seed": data.seed,
        "splits": {split: _counts(by_split[split], list(data.tasks)) for split in SPLITS if by_split[split]},
        "sites": {site: dict(counts) for site, counts in sorted(sites.items())},
        "views": dict(views) if set(views) != {"unknown"} else {},
        "weak": dict(Counter(task for record in data.records for task in record.weak if task in data.tasks)),
        "quarantine": dict(data.quarantine.by_reason()),
        "remarks": dict(data.quarantine.remarks),
        "shared_patients": sum(len(splits) > 1 for splits in homes.values()),
        "leaks": leaks_among(data, most),
    }


def leaks_among(data: MedicalDataModule, most: int) -> dict[str, int]:
    """Compare all images that are decoded already; none is decoded for it.

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
            pixels = np.divide(entry.image, np.iinfo(entry.image.dtype).max, dtype=np.float32)
            left, top, right, bottom = content_of(entry, pixels.shape)
            known.append(record)
            thumbnails.append(thumbnail(pixels[top:bottom, left:right]))
    found = {"images": len(data.records), "compared": len(known)}
    if len(known) < 2:
        return found | {"across_splits": 0, "across_sites": 0, "across_patients": 0}
    report = leak_report(find_duplicates(np.stack(thumbnails), [r.id for r in known]), known, data.splits, len(known))
    kinds = ("across_splits", "across_sites", "across_patients")
    return found | {kind: len(getattr(report, kind)) for kind in kinds}


def _counts(records: list[Record], tasks: list[str]) -> dict[str, Any]:
    labelled = {task: sum(task in record.truth for record in records) for task in tasks}
    return {"patients": len({r.patient for r in records}), "images": len(records), "labelled": labelled}
