"""Records: an image's file, patient, site and labels, before its pixels are read. Data sets produce them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mtmedformer.batch import Task

Split = Literal["train", "val", "test"]


@dataclass(frozen=True)
class MaskSource:
    """Source of one mask channel; without arguments the channel is annotated and empty (all background).

    Attributes:
        file: Mask image (any format ``datamodules.images.pixels`` reads).
        values: Pixel values of ``file`` that belong to the class; ``None`` means the shape in the file (every value
            above zero, or by the rules of ``datamodules.images.masks``).
        polygons: Polygons as tuples of ``(x, y)`` points in pixels of the original image. One or two points are
            drawn as discs of ``point_radius``.
        discs: ``(x, y, radius)`` in pixels of the original image.
        point_radius: Radius in pixels of a polygon with fewer than three points.
        also: Further sources of the same channel, united with this one (one file per lesion, several lesions).
    """

    file: Path | None = None
    values: tuple[int, ...] | None = None
    polygons: tuple[tuple[tuple[float, float], ...], ...] = ()
    discs: tuple[tuple[float, float, float], ...] = ()
    point_radius: float = 1.0
    also: tuple[MaskSource, ...] = ()


@dataclass(frozen=True)
class ClassTruth:
    """Classification label: 1.0, 0.0 or NaN (unknown) per class, in the task's class order.

    A value between 0 and 1 is the probability of an uncertain finding; it is used in training only.
    """

    values: tuple[float, ...]


@dataclass(frozen=True)
class BoxTruth:
    """Detection label; all fields empty: annotated, and there is no box.

    Attributes:
        boxes: Boxes ``(x0, y0, x1, y1)`` in pixels of the original image (corner convention).
        labels: Class index of each box.
        masks: Masks whose bounding boxes are added when the pixels are read.
        mask_labels: Class index of each mask.
        components: Whether each connected component of a mask gives a box (else one box encloses the whole mask).
        min_area: Smallest number of pixels of a component in the original image; smaller ones are noise.
    """

    boxes: tuple[tuple[float, float, float, float], ...] = ()
    labels: tuple[int, ...] = ()
    masks: tuple[MaskSource, ...] = ()
    mask_labels: tuple[int, ...] = ()
    components: bool = False
    min_area: int = 1


@dataclass(frozen=True)
class MaskTruth:
    """Segmentation label: one source per class; ``None`` for a class that is not annotated in this image."""

    channels: tuple[MaskSource | None, ...]


@dataclass(frozen=True)
class ValueTruth:
    """Regression label: the number in the unit of the task, or the index of the grade."""

    value: float


Truth = ClassTruth | BoxTruth | MaskTruth | ValueTruth


@dataclass(frozen=True)
class Record:
    """One image before its pixels are read.

    Attributes:
        id: Name of the image, unique within its data set.
        file: The image file.
        patient: The data set's patient key; it does not leave the data module (batches contain a hash).
        truth: Label by task name. **A task without an entry is unknown**, never negative.
        site: Site (hospital, source) of the image.
        view: Radiographic view, or ``None``.
        laterality: ``L``, ``R`` or ``None``.
        split: The official or suggested split of the image, or ``None``.
        weak: Names of the tasks whose label is approximate in this image.
        groups: Further values by which a federation can be split into sites, for example ``{"client": "tissue_F"}``.
        size: ``(height, width)`` that the label's coordinates refer to, where it is not the file's, else ``None``.
        inverted: Whether the film is a negative, which is inverted when it is read; ``None`` is not known and read as
            it is.
        frame: The frame of a multi-frame DICOM file, from 1; ``None`` for a file of one image.
        empty: Names of the tasks whose masks were read and are empty; none before the image is decoded.
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
    inverted: bool | None = None
    frame: int | None = None
    empty: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Catalogue:
    """The tasks and records of a data set; what ``MedicalDataModule.catalogue`` returns.

    Attributes:
        tasks: The tasks of the data set by name.
        records: One record per image, in a stable order.
        notes: Sentences for the user (dropped rows and why, missing folders); logged as warnings.
    """

    tasks: dict[str, Task]
    records: list[Record]
    notes: list[str] = field(default_factory=list)


def hash_patient(patient: str, salt: str = "") -> str:
    """Return a hash of a patient key, 16 hexadecimal digits; batches, logs and files contain it instead of the key."""
    return hashlib.blake2b(f"{salt}\x00{patient}".encode(), digest_size=8).hexdigest()
