"""What is known of an image before its pixels are read: data sets produce records, nothing else knows their folders."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mtmedformer.batch import Task

Split = Literal["train", "val", "test"]


@dataclass(frozen=True)
class MaskSource:
    """Where one mask channel comes from; with nothing given the channel is annotated and empty (all background).

    Attributes:
        file: Mask image (any format ``datamodules.images.pixels`` reads).
        values: Pixel values of ``file`` that belong to the class; ``None`` means every value above zero.
        polygons: Polygons as tuples of ``(x, y)`` points in pixels of the original image. One or two points are points
            (drawn as discs of ``point_radius``).
        discs: ``(x, y, radius)`` in pixels of the original image.
        point_radius: Radius in pixels of a polygon with fewer than three points.
        also: Further sources of the same channel, united with this one (one file a lesion, several lesions an image).
    """

    file: Path | None = None
    values: tuple[int, ...] | None = None
    polygons: tuple[tuple[tuple[float, float], ...], ...] = ()
    discs: tuple[tuple[float, float, float], ...] = ()
    point_radius: float = 1.0
    also: tuple[MaskSource, ...] = ()


@dataclass(frozen=True)
class ClassTruth:
    """Classification truth: 1.0, 0.0 or NaN (unknown) a class, in the task's class order."""

    values: tuple[float, ...]


@dataclass(frozen=True)
class BoxTruth:
    """Detection truth; everything empty means annotated and nothing there.

    Attributes:
        boxes: Boxes ``(x0, y0, x1, y1)`` in pixels of the original image (corner convention).
        labels: Class index of each box.
        masks: Masks whose boxes count too, found when the pixels are read.
        mask_labels: Class index of each mask.
        components: Whether each connected component of a mask is a box (else one box encloses the whole mask).
        min_area: Components of fewer pixels than this, in the original image, are noise and no box.
    """

    boxes: tuple[tuple[float, float, float, float], ...] = ()
    labels: tuple[int, ...] = ()
    masks: tuple[MaskSource, ...] = ()
    mask_labels: tuple[int, ...] = ()
    components: bool = False
    min_area: int = 1


@dataclass(frozen=True)
class MaskTruth:
    """Segmentation truth: one source a class; ``None`` where that class is not annotated in this image."""

    channels: tuple[MaskSource | None, ...]


Truth = ClassTruth | BoxTruth | MaskTruth


@dataclass(frozen=True)
class Record:
    """One image before its pixels are read.

    Attributes:
        id: Name of the image, unique within its data set.
        file: The image file.
        patient: Patient key as the data set has it; stays inside the DataModule (batches carry a hash).
        truth: Truth by task name. **A task that is absent here is unknown**, never negative.
        site: Site (hospital, source) of the image.
        view: Radiographic view, or ``None``.
        laterality: ``L``, ``R`` or ``None``.
        split: The official or suggested split of the image, or ``None``.
        weak: Names of the tasks whose truth is approximate in this image.
        groups: Further columns one may split a federation by, for example ``{"client": "tissue_F"}``.
        size: ``(height, width)`` the truth's coordinates refer to where it differs from the file's own, else ``None``.
    """

    id: str
    file: Path
    patient: str
    truth: dict[str, Truth] = field(default_factory=dict)
    site: str = "unknown"
    view: str | None = None
    laterality: str | None = None
    split: Split | None = None
    weak: frozenset[str] = frozenset()
    groups: dict[str, str] = field(default_factory=dict)
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Catalogue:
    """What a data set's own file produces: its tasks and its records.

    Attributes:
        tasks: The tasks of the data set by name.
        records: One record an image, in a stable order.
        notes: Sentences a user should read (rows dropped and why, groups that are missing); logged as warnings.
    """

    tasks: dict[str, Task]
    records: list[Record]
    notes: list[str] = field(default_factory=list)


def hash_patient(patient: str, salt: str = "") -> str:
    """Return a 16-digit one-way hash of a patient key; what batches, logs and files carry instead of the key."""
    return hashlib.blake2b(f"{salt}\x00{patient}".encode(), digest_size=8).hexdigest()
