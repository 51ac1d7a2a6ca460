"""Your own data: a folder of images and one table with a row per image.

Blank labels are unknown: a blank class, a flag of 0, a blank mask. ``[]`` as boxes, and a blank mask with flag 1, mean
annotated and empty.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from datamodules.base import MedicalDataModule
from datamodules.cache.quarantine import IMAGE, Issue
from datamodules.labels_csv.columns import (
    BoxColumns,
    ClassColumns,
    MaskColumns,
    Reader,
    check_columns,
    columns_of,
    path_in,
    reader,
)
from datamodules.labels_csv.table import CellError, Table, TableRow, read_labels
from datamodules.records import Catalogue, ClassTruth, MaskTruth, Record, Split, Truth
from mtmedformer.errors import DataError

T = TypeVar("T")

SPLITS: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
SIDES = {"l": "L", "left": "L", "r": "R", "right": "R"}


class LabelsCSVDataModule(MedicalDataModule):
    """A folder of images and one table with their labels.

    Expected below ``root``: a text table with a header and one row per image, and the image and mask files it names
    (DICOM, PNG, JPEG, TIFF …). Blank labels are unknown; see `ClassColumns`, `BoxColumns` and `MaskColumns`.

    Args:
        root: The folder; paths in the table are relative to it and must stay below it.
        table: The table, relative to ``root``: CSV with a header, separated by comma, semicolon, tab or bar.
        classification: Classification tasks by name.
        detection: Detection tasks by name.
        segmentation: Segmentation tasks by name.
        image_column: Column with the image file.
        patient_column: Column with the patient; a patient's images are in one split. ``null`` counts every image as a
            patient of its own; images of one patient may then be in two splits.
        site_column: Column with the site (hospital, source).
        split_column: Column with ``train``, ``val`` or ``test``; blank: assigned by patient.
        view_column: Column with the view (``PA``, ``CC`` …).
        laterality_column: Column with the side, ``L`` or ``R``.
        size_columns: Columns with the height and width in pixels that the boxes refer to, where the file may have
            another size than the annotated image.
        group_columns: Further columns by which images can be selected or a federation split; ``null`` uses ``client``
            if the table has it.
        kwargs: Arguments of `MedicalDataModule`.

    Raises:
        ConfigError: No task is given, a task is described in two ways, or two tasks have one name.
        DataError: The table is missing, incomplete or contradicts itself (on ``catalogue`` and ``setup``).
    """

    def __init__(
        self,
        root: Path,
        table: str = "labels.csv",
        classification: dict[str, ClassColumns] | None = None,
        detection: dict[str, BoxColumns] | None = None,
        segmentation: dict[str, MaskColumns] | None = None,
        image_column: str = "image",
        patient_column: str | None = "patient",
        site_column: str | None = "site",
        split_column: str | None = "split",
        view_column: str | None = "view",
        laterality_column: str | None = "laterality",
        size_columns: tuple[str, str] = ("height", "width"),
        group_columns: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.root = Path(os.path.abspath(Path(root).expanduser()))
        self.table = table
        self.classification = classification or {}
        self.detection = detection or {}
        self.segmentation = segmentation or {}
        self.image_column = image_column
        self.patient_column = patient_column
        self.site_column = site_column
        self.split_column = split_column
        self.view_column = view_column
        self.laterality_column = laterality_column
        self.size_columns = size_columns
        self.group_columns = group_columns
        self.specs = check_columns(self.classification, self.detection, self.segmentation)

    @property
    def salt(self) -> str:
        """The folder's name."""
        return self.root.name

    def catalogue(self) -> Catalogue:
        """Read the table; rows and cells with invalid values are added to the quarantine.

        Raises:
            DataError: The table is empty, incomplete or lacks a column, two rows of one image contradict each other, or
                a path is outside the folder.
        """
        table = read_labels(self.root / self.table, self.image_column)
        self._require(table)
        notes = list(table.notes)
        readers = [
            reader(name, spec, self._flag(name, table, notes), table, self.root) for name, spec in self.specs.items()
        ]
        known: dict[Path, Entry] = {}
        for row in table.rows:
            if not row.text(self.image_column):
                detail = f"line {row.line}, column {self.image_column!r}; name the file or remove the row"
                self.quarantine.add([Issue(f"line {row.line}", "", IMAGE, "row without an image", detail)])
                continue
            entry = self._entry(row, table, readers)
            file = entry.record.file
            known[file] = known[file].merge(entry, table.file) if file in known else entry
        repeats = len(table.rows) - sum(not row.text(self.image_column) for row in table.rows) - len(known)
        if repeats:
            notes.append(
                f"{table.file.name}: {repeats} rows repeat an image of an earlier row; merged, since they agree with it"
            )
        if self.patient_column is None:
            notes.append(f"{table.file.name}: no patient column; images of one patient may be in two splits")
        odd = Counter(remark for entry in known.values() for remark in entry.remarks)
        notes += [f"{table.file.name}: {count} × {remark}, taken as blank" for remark, count in odd.items()]
        records = _named([entry.record for entry in known.values()], self.root)
        for record, entry in zip(records, known.values(), strict=True):
            self.quarantine.add(
                Issue(record.id, record.file.name, task, error.reason, error.detail)
                for task, error in entry.errors.items()
            )
        return Catalogue({r.task.name: r.task for r in readers}, records, notes)

    def _entry(self, row: TableRow, table: Table, readers: Sequence[Reader]) -> Entry:
        truth: dict[str, Truth] = {}
        errors: dict[str, CellError] = {}
        for each in readers:
            try:
                label = each.read(row)
            except CellError as error:
                errors[each.task.name] = error
            else:
                if label is not None:
                    truth[each.task.name] = label
        remarks = []
        size = None
        try:
            size = row.size(*self.size_columns)
        except CellError as error:
            remarks.append(error.reason)
        side = row.text(self.laterality_column)
        if side and side.lower() not in SIDES:
            remarks.append("side neither L nor R")
        split = row.text(self.split_column).lower()
        if split and split not in SPLITS:
            raise DataError(
                f"{table.file}: line {row.line}, column {self.split_column!r}: {split!r} is not a split; write train, "
                "val or test, or leave it blank"
            )
        groups = self.group_columns if self.group_columns is not None else ["client"]
        file = path_in(self.root, row, self.image_column)
        record = Record(
            id=file.stem,
            file=file,
            patient=row.text(self.patient_column) if self.patient_column else str(file.relative_to(self.root)),
            truth=truth,
            site=row.text(self.site_column) or "unknown",
            view=row.text(self.view_column) or None,
            laterality=SIDES.get(side.lower()),
            split=SPLITS.get(split),
            groups={group: row.text(group) for group in groups if row.text(group)},
            size=size,
        )
        return Entry(row.line, record, errors, remarks)

    def _require(self, table: Table) -> None:
        """Raise if a configured column is missing; columns with their default names may be missing."""
        for name, spec in self.specs.items():
            table.require(columns_of(spec), f"task {name!r} is read from it")
        if self.patient_column:
            why = "it keeps a patient's images in one split; null counts every image as a patient of its own"
            table.require([self.patient_column], why)
        usual = {
            "site": self.site_column,
            "split": self.split_column,
            "view": self.view_column,
            "laterality": self.laterality_column,
        }
        for default, column in usual.items():
            if column and column != default:
                table.require([column], f"data.init_args.{default}_column names it")
        table.require(self.group_columns or [], "data.init_args.group_columns names it")
        if self.size_columns != ("height", "width"):
            table.require(self.size_columns, "data.init_args.size_columns names it")

    def _flag(self, name: str, table: Table, notes: list[str]) -> str | None:
        """Return a task's flag column if the table has it; raise if a column has almost its name."""
        flag = self.specs[name].flag
        if flag is None or flag in table.columns:
            return flag
        if table.nearest(flag):
            table.require([flag], f"it marks the images that are labelled for {name!r}")
        notes.append(
            f"{table.file.name}: no column {flag!r}; an image counts as labelled for {name!r} where its cell is filled"
        )
        return None


@dataclass(frozen=True)
class Entry:
    """The rows of one image, merged.

    Attributes:
        line: Its first line in the table.
        record: The record so far.
        errors: Error by task, where the label could not be read.
        remarks: Cells that were read as blank.
    """

    line: int
    record: Record
    errors: dict[str, CellError] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def merge(self, other: Entry, table: Path) -> Entry:
        """Merge two rows of one image.

        Raises:
            DataError: The rows contradict each other.
        """
        a, b = self.record, other.record
        joined = replace(
            a,
            patient=self._agree(other, "patient", a.patient, b.patient, "", table),
            site=self._agree(other, "site", a.site, b.site, "unknown", table),
            view=self._agree(other, "view", a.view, b.view, None, table),
            laterality=self._agree(other, "laterality", a.laterality, b.laterality, None, table),
            split=self._agree(other, "split", a.split, b.split, None, table),
            size=self._agree(other, "size", a.size, b.size, None, table),
        )
        for group in {**a.groups, **b.groups}:
            self._agree(other, group, a.groups.get(group), b.groups.get(group), None, table)
        errors = {**self.errors, **other.errors}
        truth = {**a.truth, **b.truth}
        for task in a.truth.keys() & b.truth.keys():
            truth[task] = self._together(other, task, a.truth[task], b.truth[task], table)
        known = {task: label for task, label in truth.items() if task not in errors}
        record = replace(joined, truth=known, groups={**a.groups, **b.groups})
        return Entry(self.line, record, errors, [*self.remarks, *other.remarks])

    def _together(self, other: Entry, task: str, a: Truth, b: Truth, table: Path) -> Truth:
        """Merge two labels of a task: a value that is unknown in one is taken from the other."""
        if isinstance(a, ClassTruth) and isinstance(b, ClassTruth):
            pairs = [
                (None if math.isnan(x) else x, None if math.isnan(y) else y)
                for x, y in zip(a.values, b.values, strict=True)
            ]
            values = [self._agree(other, task, x, y, None, table) for x, y in pairs]
            return ClassTruth(tuple(math.nan if v is None else v for v in values))
        if isinstance(a, MaskTruth) and isinstance(b, MaskTruth):
            channels = zip(a.channels, b.channels, strict=True)
            return MaskTruth(tuple(self._agree(other, task, x, y, None, table) for x, y in channels))
        if a != b:
            raise self._contradiction(other, task, table)
        return a

    def _agree(self, other: Entry, what: str, a: T, b: T, blank: T, table: Path) -> T:
        if a == b or b == blank:
            return a
        if a == blank:
            return b
        raise self._contradiction(other, what, table)

    def _contradiction(self, other: Entry, what: str, table: Path) -> DataError:
        return DataError(
            f"{table}: lines {self.line} and {other.line} name the same image, {self.record.file.name}, but contradict "
            f"each other in {what!r}. Remove one, or put all labels of the image into one row (all its boxes in one "
            "list)."
        )


def _named(records: list[Record], root: Path) -> list[Record]:
    """Name records by their files, with a digest of the path where several files have one name."""
    counts = Counter(record.id for record in records)
    return [r if counts[r.id] == 1 else replace(r, id=f"{r.id}_{_digest(r.file.relative_to(root))}") for r in records]


def _digest(file: Path) -> str:
    return hashlib.blake2b(file.as_posix().encode(), digest_size=4).hexdigest()
