"""Which images and labels a run was trained with, in a hash and counts: no name, no id, no path, no patient."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

from federation.datamodule import FederatedDataModule

LENGTH = 16
"""Hexadecimal digits the hash is cut to."""


def data_identity(data: Any) -> dict[str, Any]:
    """Return what tells one data set, split and preparation from another.

    The hash covers, for every split that is set up, the content of the images, masks and boxes as the network gets them
    (the names of their cache entries) and the class labels. A corrected label, another split or another input size
    changes it; a moved folder does not.

    Args:
        data: A data module that is set up.

    Returns:
        ``dataset``, its class; ``digest``; ``images``, ``patients`` and ``labelled`` (images by task) of each split;
        for a federation ``sites``, the same for each site. Nothing but the class for data modules of another making.
    """
    if isinstance(data, FederatedDataModule):
        sites = {name: data_identity(site.source) for name, site in data.sites.items()}
        told = [f"{name} {site.get('digest')}" for name, site in sorted(sites.items())]
        return {"dataset": type(data).__name__, "digest": _digest(told), "sites": sites}
    found: dict[str, Any] = {"dataset": type(data).__name__, "images": {}, "patients": {}, "labelled": {}}
    lines: list[str] = []
    for split, images in sorted(getattr(data, "datasets", {}).items()):
        if not (hasattr(images, "records") and hasattr(images, "keys") and hasattr(images, "tasks")):
            continue
        records = images.records
        found["images"][split] = len(records)
        found["patients"][split] = len({record.patient for record in records})
        labelled = Counter(task for record in records for task in record.truth if task in images.tasks)
        found["labelled"][split] = dict(sorted(labelled.items()))
        lines += [
            f"{split} {key} {_classes(record, images.tasks)}" for record, key in zip(records, images.keys, strict=True)
        ]
    return found | {"digest": _digest(sorted(lines))} if lines else {"dataset": found["dataset"]}


def _classes(record: Any, tasks: Any) -> str:
    """Return a record's class labels as text; boxes and masks are in its key."""
    return " ".join(
        f"{name}={getattr(truth, 'values', '')}" for name, truth in sorted(record.truth.items()) if name in tasks
    )


def _digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:LENGTH]
