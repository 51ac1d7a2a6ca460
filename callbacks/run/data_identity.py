"""The identity of the data of a run: a digest and counts, without names, ids, paths or patients."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

from lightning import LightningDataModule

from federation.datamodule import FederatedDataModule
from mtmedformer.protocols import ClassLabels, RecordDataset, SplitData, ValueLabel

LENGTH = 16
"""Hexadecimal digits the hash is cut to."""


def data_identity(data: Any) -> dict[str, Any]:
    """Return what distinguishes one data set, split and preprocessing from another.

    The digest covers, for every split that is set up, the content of the images, masks and boxes as the network gets
    them (the keys of their cache entries) and the class labels. A corrected label, another split or another input size
    changes it; a moved folder does not.

    Args:
        data: A data module that is set up.

    Returns:
        ``dataset``, its class; ``digest``; ``images``, ``patients`` and ``labelled`` (images by task) of each split;
        ``white_level`` where there are 16-bit images; for a federation ``sites``, the same for each site. Only
        ``dataset`` for a data module without records.
    """
    name = type(data).__name__
    if isinstance(data, FederatedDataModule):
        sites = {site: data_identity(one.source) for site, one in data.sites.items()}
        lines = [f"{site} {identity.get('digest')}" for site, identity in sorted(sites.items())]
        return {"dataset": name, "digest": _digest(lines), "sites": sites}
    splits = sorted(data.datasets.items()) if isinstance(data, SplitData) else []
    counts: dict[str, dict[str, Any]] = {"images": {}, "patients": {}, "labelled": {}}
    lines = []
    for split, images in splits:
        if not isinstance(images, RecordDataset):
            continue
        records = images.records
        counts["images"][split] = len(records)
        counts["patients"][split] = len({record.patient for record in records})
        labelled = Counter(task for record in records for task in record.truth if task in images.tasks)
        counts["labelled"][split] = dict(sorted(labelled.items()))
        lines += [
            f"{split} {key} {_classes(record, images.tasks)}" for record, key in zip(records, images.keys, strict=True)
        ]
    state = data.state_dict() if isinstance(data, LightningDataModule) else {}  # the white level, where there is one
    return {"dataset": name, **counts, **state, "digest": _digest(sorted(lines))} if lines else {"dataset": name}


def _classes(record: Any, tasks: Any) -> str:
    """Return a record's classes and numbers as text; boxes and masks are part of its key."""
    truths = sorted((name, truth) for name, truth in record.truth.items() if name in tasks)
    return " ".join(f"{name}={_label(truth)}" for name, truth in truths)


def _label(truth: Any) -> Any:
    if isinstance(truth, ClassLabels):
        return truth.values
    return truth.value if isinstance(truth, ValueLabel) else ""


def _digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:LENGTH]
