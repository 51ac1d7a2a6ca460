"""VinDr-CXR: the annotations of three radiologists per chest film, and the films, as records."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.ops import box_iou

from datamodules.base import MedicalDataModule
from datamodules.public.layout import files_below, locate, number, one_hot, read_table, require_records, rows_of
from datamodules.records import BoxTruth, Catalogue, ClassTruth, Record, Split, Truth
from mtmedformer.batch import Task
from mtmedformer.errors import ConfigError, DataError

LESIONS = (
    *("Aortic enlargement", "Atelectasis", "Calcification", "Cardiomegaly", "Clavicle fracture", "Consolidation"),
    *("Edema", "Emphysema", "Enlarged PA", "ILD", "Infiltration", "Lung Opacity", "Lung cavity", "Lung cyst"),
    *("Mediastinal shift", "Nodule/Mass", "Pleural effusion", "Pleural thickening", "Pneumothorax"),
    *("Pulmonary fibrosis", "Rib fracture", "Other lesion"),
)
"""Findings that are marked with boxes."""

DISEASES = ("COPD", "Lung tumor", "Pneumonia", "Tuberculosis", "Other diseases")
"""Diagnoses of the whole film."""

NONE = "No finding"
RENAMED = {"Other disease": "Other diseases"}  # the table of test spells it so
SPLITS: tuple[Split, ...] = ("train", "test")
SAME_BOX = 0.4
"""Boxes of one class with at least this IoU mark one lesion."""


class VinDrCXRDataModule(MedicalDataModule):
    """VinDr-CXR: 18,000 chest films with 22 kinds of boxes and 5 diagnoses; three readers in train, consensus in test.

    Expected below ``root``, as PhysioNet publishes it (or PNG and JPEG files of the same names):

        annotations/image_labels_train.csv   annotations/annotations_train.csv   train/<image_id>.dicom
        annotations/image_labels_test.csv    annotations/annotations_test.csv    test/<image_id>.dicom

    The tables may lie beside ``train`` as well, and one of the two parts may be missing. Files of another size than the
    annotated film need ``train_meta.csv`` and ``test_meta.csv`` (``image_id``, ``dim0`` height, ``dim1`` width). The
    set has no patient keys: each film counts as another patient.

    Source: Nguyen et al., Scientific Data 2022, doi 10.1038/s41597-022-01498-w;
    https://physionet.org/content/vindr-cxr/1.0.0/. Licence: PhysioNet Credentialed Health Data License 1.5.0.

    Args:
        root: Folder with ``annotations``, ``train`` and ``test``.
        classes: Classes of ``findings`` and, where they have boxes, of ``lesions``, as the tables spell them.
        min_readers: Readers of a training film who must agree on a class of ``findings``; with fewer, but at least one,
            the class is unknown.
        box_readers: Readers who must have drawn a box; 1 keeps every box. Boxes of one lesion are averaged.
        kwargs: Arguments of `MedicalDataModule`.

    Raises:
        ConfigError: An unknown class, or a number of readers below 1.
        DataError: The layout is not found under ``root``, or a table is incomplete (on ``catalogue`` and ``setup``).
    """

    def __init__(
        self,
        root: Path,
        classes: Sequence[str] = (*LESIONS, *DISEASES),
        min_readers: int = 2,
        box_readers: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.root = Path(root)
        self.classes = tuple(classes)
        self.min_readers, self.box_readers = min_readers, box_readers
        unknown = [name for name in self.classes if name not in (*LESIONS, *DISEASES)]
        if unknown or not set(self.classes) & set(LESIONS):
            raise ConfigError(
                f"data.init_args.classes: {unknown or 'no class with boxes'}; choose from {', '.join(LESIONS)} and "
                f"{', '.join(DISEASES)}"
            )
        if min(min_readers, box_readers) < 1:
            raise ConfigError(f"data.init_args.min_readers={min_readers}, box_readers={box_readers}; give 1 or more")

    def catalogue(self) -> Catalogue:
        """Read the tables and list the films as records."""
        return read_catalogue(self.root, self.classes, self.min_readers, self.box_readers)


@dataclass(frozen=True)
class _Mark:
    """A row of the table of boxes: its reader, its class and its box; ``None`` for ``No finding``."""

    reader: str
    label: str
    box: tuple[float, float, float, float] | None


def read_catalogue(
    root: Path, classes: Sequence[str] = (*LESIONS, *DISEASES), min_readers: int = 2, box_readers: int = 1
) -> Catalogue:
    """Turn the tables of both parts and their films into records.

    A film that all its readers call ``No finding`` is a true negative without boxes. A film without a row in the table
    of boxes is unknown for ``lesions``.

    The arguments are those of `VinDrCXRDataModule`.

    Returns:
        ``normality`` (normal, abnormal; unknown where the readers are undecided), ``findings`` (several may hold) and
        ``lesions``.

    Raises:
        DataError: A table is missing or incomplete, or a row has unknown values.
    """
    folder = locate(root, ["annotations/image_labels_*.csv|image_labels_*.csv", "train|test"], "VinDr-CXR")
    tables = folder / "annotations" if (folder / "annotations").is_dir() else folder
    boxed = tuple(name for name in classes if name in LESIONS)
    records: list[Record] = []
    listed, notes = 0, []
    for split in SPLITS:
        table = tables / f"image_labels_{split}.csv"
        if not table.is_file():
            notes.append(f"VinDr-CXR: {table.name} is missing, so the {split} part is not read")
            continue
        files = {file.stem: file for file in files_below(folder / split, (".dicom", ".dcm", ".png", ".jpg", ".jpeg"))}
        marks = _marks(tables / f"annotations_{split}.csv")
        sizes = _sizes(folder / f"{split}_meta.csv")
        rows: dict[str, list[dict[str, str]]] = defaultdict(list)
        for row in rows_of(read_table(table, ["image_id", NONE])):
            rows[row["image_id"]].append({RENAMED.get(name, name): cell for name, cell in row.items()})
        listed += len(rows)
        for image, readings in rows.items():
            if image not in files:
                continue
            truth = _labels(readings, classes, min_readers, table)
            if image in marks:
                truth["lesions"] = _boxes(marks[image], boxed, box_readers)
            records.append(
                Record(image, files[image], image, truth, "vindr_cxr", "PA", split=split, size=sizes.get(image))
            )
    require_records(records, "VinDr-CXR", folder / "train", listed)
    if missing := listed - len(records):
        notes.append(f"VinDr-CXR: {missing} of {listed} listed images are not on disk")
    if unknown := sum("lesions" not in record.truth for record in records):
        notes.append(f"VinDr-CXR: {unknown} images have no row in the table of boxes; 'lesions' is unknown there")
    tasks = (
        Task("normality", "classification", ("normal", "abnormal")),
        Task("findings", "classification", tuple(classes), multi_label=True),
        Task("lesions", "detection", boxed),
    )
    return Catalogue({task.name: task for task in tasks}, records, notes)


def _labels(
    readings: Sequence[dict[str, str]], classes: Sequence[str], min_readers: int, table: Path
) -> dict[str, Truth]:
    """Return what the readers of a film agree on: 1 with enough votes, 0 without any, unknown between."""
    needed = min(min_readers, len(readings))
    truth: dict[str, Truth] = {}
    normal = [_vote(row, NONE, table) for row in readings]
    if None not in normal:
        votes = sum(map(bool, normal))
        if votes >= needed and (len(readings) - votes) < needed:
            truth["normality"] = one_hot(("normal", "abnormal"), "normal")
        elif len(readings) - votes >= needed:
            truth["normality"] = one_hot(("normal", "abnormal"), "abnormal")
    values = []
    for name in classes:
        given = [vote for row in readings if (vote := _vote(row, name, table)) is not None]
        known = math.nan if not given or 0 < sum(given) < needed else float(sum(given) >= needed)
        values.append(known)
    if not all(math.isnan(value) for value in values):
        truth["findings"] = ClassTruth(tuple(values))
    return truth


def _vote(row: dict[str, str], name: str, table: Path) -> int | None:
    """Return a reader's 1 or 0 for a class; ``None`` where it is blank."""
    if name not in row:
        raise DataError(f"{table}: no column {name!r}; the columns are {', '.join(row)}")
    value = number(row, name, table)
    if value not in (None, 0, 1):
        raise DataError(f"{table}: image {row['image_id']} has {row[name]!r} for {name!r}; expected 0 or 1")
    return None if value is None else int(value)


def _marks(table: Path) -> dict[str, list[_Mark]]:
    """Return the rows of a table of boxes by image."""
    marks: dict[str, list[_Mark]] = defaultdict(list)
    for row in rows_of(read_table(table, ["image_id", "class_name", "x_min", "y_min", "x_max", "y_max"])):
        label = RENAMED.get(row["class_name"], row["class_name"])
        if label not in (*LESIONS, *DISEASES, NONE):
            raise DataError(f"{table}: image {row['image_id']} has the unknown class {label!r}")
        x0, y0, x1, y1 = (number(row, corner, table) for corner in ("x_min", "y_min", "x_max", "y_max"))
        box = None
        if x0 is not None and y0 is not None and x1 is not None and y1 is not None:
            box = (x0, y0, x1, y1)
        elif label in LESIONS:
            raise DataError(f"{table}: image {row['image_id']} has {label!r} without a box")
        marks[row["image_id"]].append(_Mark(row.get("rad_id") or "consensus", label, box))
    return marks


def _boxes(marks: Sequence[_Mark], classes: Sequence[str], box_readers: int) -> BoxTruth:
    """Return one box per lesion: the mean of the boxes that mark it, if enough readers have drawn one."""
    needed = min(box_readers, len({mark.reader for mark in marks}))
    boxes: list[tuple[float, float, float, float]] = []
    labels: list[int] = []
    for number_of_class, name in enumerate(classes):
        own = [mark for mark in marks if mark.label == name and mark.box is not None]
        for group in _lesions(own):
            if len({mark.reader for mark in group}) >= needed:
                x0, y0, x1, y1 = np.mean([mark.box for mark in group if mark.box], axis=0).tolist()
                boxes.append((x0, y0, x1, y1))
                labels.append(number_of_class)
    return BoxTruth(tuple(boxes), tuple(labels))


def _lesions(marks: Sequence[_Mark]) -> Iterable[list[_Mark]]:
    """Group boxes of one class by lesion: largest first, each with the later boxes that overlap it enough."""
    if not marks:
        return []
    corners = torch.tensor([mark.box for mark in marks], dtype=torch.float64)
    overlap = box_iou(corners, corners)
    area = (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])
    groups: list[list[int]] = []
    for i in sorted(range(len(marks)), key=lambda n: (-float(area[n]), n)):
        fitting = [
            group
            for group in groups
            if overlap[group[0], i] >= SAME_BOX and marks[i].reader not in {marks[j].reader for j in group}
        ]
        if fitting:
            max(fitting, key=lambda group: float(overlap[group[0], i])).append(i)
        else:
            groups.append([i])
    return [[marks[i] for i in group] for group in groups]


def _sizes(table: Path) -> dict[str, tuple[int, int]]:
    """Return the annotated size of each image, where a table beside the films has it."""
    if not table.is_file():
        return {}
    sizes = {}
    for row in rows_of(read_table(table, ["image_id", "dim0", "dim1"])):
        height, width = number(row, "dim0", table), number(row, "dim1", table)
        if height and width:
            sizes[row["image_id"]] = (int(height), int(width))
    return sizes
