"""One decoded image with its masks and boxes, and its safetensors file.

A safetensors file is memory-mapped and cannot run code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save

from datamodules.cache.quarantine import Issue
from mtmedformer.geometry import Affine, Bytes, Floats, Ints


@dataclass(frozen=True)
class MaskMeasure:
    """What one mask file covers.

    Attributes:
        task: Name of its task.
        channel: Index of its class.
        inside: Share of the mask's pixels that belong to the class, 0 to 1.
        border: Share of the mask's outermost pixels that belong to the class, 0 to 1.
    """

    task: str
    channel: int
    inside: float
    border: float


@dataclass(frozen=True)
class Measures:
    """What is measured of an image while it is decoded, for checks of the whole set.

    Attributes:
        size: ``(height, width)`` of the original image.
        border: Median grey level of the image's outermost pixels, 0 (black) to 1 (white).
        masks: One entry per mask file of a segmentation task.
    """

    size: tuple[int, int]
    border: float
    masks: tuple[MaskMeasure, ...] = ()


@dataclass(frozen=True)
class Report:
    """What decoding found in one image.

    Attributes:
        issues: What was left out, and why.
        remarks: What was corrected, one entry per correction.
        measures: What was measured; ``None`` where the image cannot be used.
        empty: Names of the tasks whose masks or boxes were drawn and are empty.
    """

    issues: tuple[Issue, ...] = ()
    remarks: tuple[str, ...] = ()
    measures: Measures | None = None
    empty: frozenset[str] = frozenset()

    @property
    def transient(self) -> bool:
        """Whether decoding the same files again may succeed."""
        return any(issue.transient for issue in self.issues)


@dataclass(frozen=True)
class CacheEntry:
    """One image with its masks and boxes in the network's frame; the record holds classes, split and site.

    Attributes:
        image: uint8 or uint16 (H, W), or (H, W, 3) in colour: 0..255 or 0..65535 stand for [0, 1].
        to_original: Affine from the frame to the original image (see ``mtmedformer.batch.Meta``).
        original_size: ``(height, width)`` of the original image.
        masks: uint8 (K, H, W) of 0/1/``IGNORE`` by segmentation task.
        boxes: float32 (N, 4) xyxy in pixels of the frame, by detection task.
        labels: int64 (N,) class indices, by detection task.
        spacing: ``(row, column)`` spacing of the original image in mm, or ``None``.
        view: View from the file's header, or ``None``.
        laterality: Side from the file's header, ``L`` or ``R``, or ``None``.
        issues: What was left out, with reasons.
        remarks: What was corrected, one entry per correction.
        measures: What was measured.
    """

    image: NDArray[np.uint8] | NDArray[np.uint16]
    to_original: Affine
    original_size: tuple[int, int]
    masks: dict[str, Bytes] = field(default_factory=dict)
    boxes: dict[str, Floats] = field(default_factory=dict)
    labels: dict[str, Ints] = field(default_factory=dict)
    spacing: tuple[float, float] | None = None
    view: str | None = None
    laterality: str | None = None
    issues: tuple[Issue, ...] = ()
    remarks: tuple[str, ...] = ()
    measures: Measures | None = None

    @property
    def nbytes(self) -> int:
        """Size of the arrays in bytes."""
        return self.image.nbytes + sum(a.nbytes for d in (self.masks, self.boxes, self.labels) for a in d.values())

    def empty(self) -> list[str]:
        """Return the names of the tasks without a pixel of a mask, or without a box."""
        masks = [task for task, mask in self.masks.items() if not (mask == 1).any()]
        return sorted([*masks, *(task for task, boxes in self.boxes.items() if not len(boxes))])

    def report(self) -> Report:
        """Return the issues, remarks and measures, and what is empty."""
        return Report(self.issues, self.remarks, self.measures, frozenset(self.empty()))


def save_entry(entry: CacheEntry, path: Path) -> None:
    """Write a decoded image into a file."""
    arrays = {"image": entry.image}
    by_task: dict[str, Mapping[str, NDArray[Any]]] = {
        "masks": entry.masks,
        "boxes": entry.boxes,
        "labels": entry.labels,
    }
    for kind, of_task in by_task.items():
        arrays |= {f"{kind}/{task}": np.ascontiguousarray(array) for task, array in of_task.items()}
    facts = {
        "to_original": entry.to_original,
        "original_size": entry.original_size,
        "spacing": entry.spacing,
        "view": entry.view,
        "laterality": entry.laterality,
        "remarks": entry.remarks,
        "empty": entry.empty(),
        "issues": [asdict(issue) for issue in entry.issues],
        "measures": asdict(entry.measures) if entry.measures else None,
    }
    path.write_bytes(
        save(arrays, metadata={"facts": json.dumps(facts)})
    )  # save_file would make the file readable by its owner only


def load_entry(path: Path) -> CacheEntry:
    """Read a decoded image back."""
    with safe_open(path, framework="numpy") as file:
        facts = json.loads(file.metadata()["facts"])
        arrays: dict[str, dict[str, Any]] = {"masks": {}, "boxes": {}, "labels": {}}
        for name in file.keys():  # noqa: SIM118  the handle is no mapping
            kind, _, task = name.partition("/")
            if kind in arrays:
                arrays[kind][task] = file.get_tensor(name)
        report = _report(facts)
        return CacheEntry(
            image=file.get_tensor("image"),
            **arrays,
            to_original=tuple(facts["to_original"]),
            original_size=tuple(facts["original_size"]),
            spacing=tuple(facts["spacing"]) if facts["spacing"] else None,
            view=facts["view"],
            laterality=facts["laterality"],
            issues=report.issues,
            remarks=report.remarks,
            measures=report.measures,
        )


def load_report(path: Path) -> Report:
    """Read the report of a file's entry; maps the header only."""
    with safe_open(path, framework="numpy") as file:
        facts = json.loads(file.metadata()["facts"])
        return _report(facts)


def _report(facts: dict[str, Any]) -> Report:
    measures = facts["measures"]
    if measures is not None:
        masks = tuple(MaskMeasure(**mask) for mask in measures["masks"])
        measures = Measures(tuple(measures["size"]), measures["border"], masks)
    issues = tuple(Issue(**issue) for issue in facts["issues"])
    return Report(issues, tuple(facts["remarks"]), measures, frozenset(facts["empty"]))
