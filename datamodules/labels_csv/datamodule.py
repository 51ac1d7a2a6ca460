"""Your own data: a folder of images and one table with a row per image.

Blank labels are unknown: a blank class, a flag of 0, a blank mask. ``[]`` as boxes, and a blank mask with flag 1, mean
annotated and empty.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from datamodules.base import MedicalDataModule
from datamodules.cache.quarantine import IMAGE, Issue
from datamodules.images.frames import named_frame
from datamodules.labels_csv.cells import SPLITS, CellError, TableRow, short
from datamodules.labels_csv.classes import FoundClasses
from datamodules.labels_csv.columns import (
    BoxColumns,
    ClassColumns,
    Columns,
    MaskColumns,
    PatientColumn,
    ValueColumns,
    check_columns,
    columns_of,
)
from datamodules.labels_csv.folders import read_folders
from datamodules.labels_csv.found_tasks import tasks_of_table
from datamodules.labels_csv.groups import GroupColumns
from datamodules.labels_csv.merge import Entry
from datamodules.labels_csv.readers import Reader, reader
from datamodules.labels_csv.table import Table, read_labels
from datamodules.records import BoxTruth, Catalogue, Record, Truth
from mtmedformer.errors import DataError

TABLE = "labels.csv"
UNKNOWN_SPLIT = "unknown split"
SIDES = {"l": "L", "left": "L", "r": "R", "right": "R"}


class LabelsCSVDataModule(MedicalDataModule):
    """A folder of images and one table with their labels, or with one sub-folder for each class.

    Expected below ``root``: a text table with a header and one row per image, and the image and mask files it names
    (DICOM, PNG, JPEG, TIFF …). Blank labels are unknown; see `ClassColumns`, `BoxColumns`, `MaskColumns` and
    `ValueColumns`.

    Args:
        root: The folder; paths in the table are relative to it and must stay below it.
        table: The table, relative to ``root``: CSV with a header, separated by comma, semicolon, tab or bar. Where
            there is no ``labels.csv``, the sub-folders of ``root`` are the classes of the images in them.
        classification: Classification tasks by name. Where no task of any kind is given, the tasks are found in the
            columns of the table (see ``docs/your_own_data.md``).
        detection: Detection tasks by name.
        segmentation: Segmentation tasks by name.
        regression: Regression tasks by name: numbers, and grades in order.
        image_column: Column with the image file.
        patient_column: Column with the patient; a patient's images are in one split. ``null`` counts every image as a
            patient of its own; images of one patient may then be in two splits.
        patient: Column with the patient and a pattern that finds him in a longer text; in place of ``patient_column``.
        inverted_column: Column with 1 where the film is a negative (bones dark) and is inverted when it is read.
        site_column: Column with the site (hospital, source).
        split_column: Column with ``train``, ``val`` or ``test``; blank: assigned by patient.
        view_column: Column with the view (``PA``, ``CC`` …).
        laterality_column: Column with the side, ``L`` or ``R``.
        size_columns: Columns with the height and width in pixels that the boxes refer to, where the file may have
            another size than the annotated image.
        group_columns: Further columns by which results are reported, images can be selected or a federation split, for
            example ``[sex, age, scanner]``; ``null`` uses ``client`` if the table has it. ``sex``, ``age`` and
            ``manufacturer`` are read from DICOM headers where the table has no such column.
        group_bands: Bounds at which group columns of numbers are cut into bands: ``{age: [40, 60]}`` gives under 40,
            40-59, 60 and over. A group column called ``age`` is cut at 18, 40, 60 and 80 by default.
        kwargs: Arguments of `MedicalDataModule`.

    Attributes:
        specs: Columns of every task by its name; without given tasks complete after ``plan``.
        tasks_found: Whether no task was given, so that they are found in the table.

    Raises:
        ConfigError: A task is described in two ways, or two tasks have one name.
        DataError: The table is missing, incomplete or contradicts itself (on ``catalogue`` and ``setup``).
    """

    def __init__(
        self,
        root: Path,
        table: str = TABLE,
        classification: dict[str, ClassColumns] | None = None,
        detection: dict[str, BoxColumns] | None = None,
        segmentation: dict[str, MaskColumns] | None = None,
        regression: dict[str, ValueColumns] | None = None,
        image_column: str = "image",
        patient_column: str | None = "patient",
        patient: PatientColumn | None = None,
        inverted_column: str | None = "inverted",
        site_column: str | None = "site",
        split_column: str | None = "split",
        view_column: str | None = "view",
        laterality_column: str | None = "laterality",
        size_columns: tuple[str, str] = ("height", "width"),
        group_columns: list[str] | None = None,
        group_bands: dict[str, list[float]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.root = Path(os.path.abspath(Path(root).expanduser()))
        self.table = table
        self.classification = classification or {}
        self.detection = detection or {}
        self.segmentation = segmentation or {}
        self.regression = regression or {}
        self.image_column = image_column
        self.patient = patient or PatientColumn(patient_column)
        self.patient.check()
        self.patient_column = patient_column if patient is None else patient.column or image_column
        self.inverted_column = inverted_column
        self.site_column = site_column
        self.split_column = split_column
        self.view_column = view_column
        self.laterality_column = laterality_column
        self.size_columns = size_columns
        self.groups = GroupColumns(group_columns, group_bands or {})
        self._found: dict[str, FoundClasses] = {}
        self.specs = check_columns(self.classification, self.detection, self.segmentation, self.regression)
        self.tasks_found = not self.specs

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
        table = self._read()
        specs = {
            name: spec
            for name, spec in self.specs.items()
            if self.only_tasks is None or name in self.only_tasks or set(columns_of(spec)) <= set(table.columns)
        }
        self._require(table, specs)
        rows = self._usable_rows(table)
        table = replace(table, rows=list(rows))
        notes = list(table.notes)
        readers = [
            reader(name, spec, self._flag(name, table, notes), table, self.root, self.negative)
            for name, spec in specs.items()
        ]
        self._found = {each.task.name: each.found for each in readers if each.found}
        notes += [note for each in readers for note in each.notes]
        known: dict[tuple[Path, int | None], Entry] = {}
        for row, record in rows.items():
            entry = self._entry(row, record, readers)
            image = (record.file, record.frame)
            known[image] = known[image].merge(entry, table.file) if image in known else entry
        if repeats := len(rows) - len(known):
            notes.append(
                f"{table.file.name}: {repeats} rows repeat an image of an earlier row; merged, since they agree with it"
            )
        if self.patient_column is None:
            notes.append(f"{table.file.name}: no patient column; images of one patient may be in two splits")
        notes += self.groups.notes([entry.record for entry in known.values()], table.file.name)
        odd = Counter(remark for entry in known.values() for remark in entry.remarks)
        notes += [f"{table.file.name}: {count} × {remark}, taken as blank" for remark, count in odd.items()]
        records = _named([entry.record for entry in known.values()], self.root)
        for record, entry in zip(records, known.values(), strict=True):
            self.quarantine.add(
                Issue(record.id, record.file.name, task, error.reason, error.detail)
                for task, error in entry.errors.items()
            )
        return Catalogue({r.task.name: r.task for r in readers}, records, notes)

    def _read(self) -> Table:
        """Return the table, and find the tasks in it where none is given."""
        file = self.root / self.table
        only_label = {column for spec in self.specs.values() for column in columns_of(spec)} <= {"label"}
        if only_label and self.table == TABLE and self.root.is_dir() and not file.exists():
            table = read_folders(self.root)
            self.image_column = table.columns[0]
            self.patient_column = table.columns[0] if self.patient.pattern else None
        else:
            table = read_labels(file, self.image_column)
        if not self.specs:
            used = [self.image_column, self.patient_column, self.site_column, self.split_column, self.view_column]
            others = [self.laterality_column, self.inverted_column, *self.size_columns, *self.groups.names]
            self.specs, found = tasks_of_table(table, [column for column in (*used, *others) if column])
            if self.only_patients is None:  # a data set that is cut into sites has logged it
                rank_zero_info(found)
        return table

    def class_place(self, task: str, label: str) -> str:
        """Return where the table names a class, with column and lines; empty if it was not found in a column."""
        return self._found[task].place(label) if task in self._found else ""

    def _usable_rows(self, table: Table) -> dict[TableRow, Record]:
        """Return the rows that name an image, with their records without labels; the others are quarantined.

        Raises:
            DataError: No row names an image.
        """
        rows: dict[TableRow, Record] = {}
        issues = []
        for row in table.rows:
            try:
                rows[row] = self._record(row)
            except CellError as broken:
                issues.append(Issue(f"line {row.line}", "", IMAGE, broken.reason, broken.detail))
        if not rows:
            raise DataError(f"{table.file}: no row can be used. {issues[0].detail}")
        splits = Counter(row.text(self.split_column).lower() for row in table.rows)
        odd = [issue for issue in issues if issue.reason == UNKNOWN_SPLIT]
        if any(count > 1 for word, count in splits.items() if word and word not in SPLITS) and odd:
            raise DataError(f"{table.file}: {odd[0].detail}")  # the name of a part, not a slip
        # totals and remarks below a spreadsheet: a word where other rows name a file
        words = [row for row, record in rows.items() if not (record.file.suffix or os.path.isfile(record.file))]
        for row in words if len(words) < len(rows) else []:
            error = row.error(
                self.image_column, "image file missing", "no such file; correct the name or remove the row"
            )
            issues.append(Issue(f"line {row.line}", rows.pop(row).file.name, IMAGE, error.reason, error.detail))
        self.quarantine.add(issues)
        return rows

    def _record(self, row: TableRow) -> Record:
        """Return the record of a row, without labels.

        Raises:
            CellError: The row names no image or no patient, the split is unknown, or a cell is no name.
            DataError: The path is outside the folder.
        """
        if not row.text(self.image_column):
            raise row.error(self.image_column, "row without an image", "name the file or remove the row")
        split = row.text(self.split_column).lower()
        if split and split not in SPLITS:
            raise CellError(
                UNKNOWN_SPLIT,
                f"{row.file.name} line {row.line}, column {self.split_column!r}: {short(split)} is not a split; write "
                "train, val or test, or leave it blank",
            )
        file, frame = named_frame(row.path(self.image_column, self.root))
        if self.patient_column and not (row.text(self.patient_column) or file.suffix or os.path.isfile(file)):
            raise row.error(self.image_column, "image file missing", "no such file; correct the name or remove the row")
        return Record(
            id=file.stem if frame is None else f"{file.stem}#{frame}",
            file=file,
            frame=frame,
            patient=self.patient.read(row, self.patient_column)
            if self.patient_column
            else str(file.relative_to(self.root)),
            site=row.name(self.site_column) or "unknown",
            view=row.name(self.view_column) or None,
            laterality=SIDES.get(row.text(self.laterality_column).lower()),
            split=SPLITS.get(split),
            groups=self.groups.of(row, file),
            inverted=row.switch(self.inverted_column) if self.inverted_column else None,
        )

    def _entry(self, row: TableRow, record: Record, readers: Sequence[Reader]) -> Entry:
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
        remarks = self.groups.remarks(row, record.groups)
        size = None
        try:
            size = row.size(*self.size_columns)
        except CellError as error:
            boxed = {task for task, label in truth.items() if isinstance(label, BoxTruth) and label.boxes}
            errors |= dict.fromkeys(boxed, error)  # in pixels of an unknown image
            remarks += [] if boxed else [error.reason]
        side = row.text(self.laterality_column)
        if side and side.lower() not in SIDES:
            remarks.append("side neither L nor R")
        known = {task: label for task, label in truth.items() if task not in errors}
        return Entry(row.line, replace(record, truth=known, size=size), errors, remarks)

    def _require(self, table: Table, specs: dict[str, Columns]) -> None:
        """Raise if a configured column is missing; columns with their default names may be missing."""
        for name, spec in specs.items():
            table.require(
                columns_of(spec), f"task {name!r} is read from it; data.init_args.tasks can leave the task out"
            )
        if self.patient_column:
            why = "it keeps a patient's images in one split; null counts every image as a patient of its own"
            table.require([self.patient_column], why)
        usual = {
            "site": self.site_column,
            "split": self.split_column,
            "view": self.view_column,
            "laterality": self.laterality_column,
            "inverted": self.inverted_column,
        }
        for default, column in usual.items():
            if column and column != default:
                table.require([column], f"data.init_args.{default}_column names it")
        table.require(self.groups.required(table.columns), "data.init_args.group_columns or group_bands names it")
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


def _named(records: list[Record], root: Path) -> list[Record]:
    """Name records by their files, with a digest of the path where several files have one name."""
    counts = Counter(record.id for record in records)
    return [r if counts[r.id] == 1 else replace(r, id=f"{r.id}_{_digest(r.file.relative_to(root))}") for r in records]


def _digest(file: Path) -> str:
    return hashlib.blake2b(file.as_posix().encode(), digest_size=4).hexdigest()
