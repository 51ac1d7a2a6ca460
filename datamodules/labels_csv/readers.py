"""How the cells of a row become a label of a task.

A reader returns ``None`` for a blank label and raises ``CellError`` for an invalid one: both leave the task unknown,
never negative.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any, Protocol

from datamodules.labels_csv.cells import CellError, TableRow, flag_of, may_be_labelled, number, short
from datamodules.labels_csv.classes import FoundClasses, index_of, named_index
from datamodules.labels_csv.columns import BoxColumns, ClassColumns, Columns, MaskColumns, ValueColumns
from datamodules.labels_csv.numbers import GradeReader, NumberReader
from datamodules.labels_csv.table import Table
from datamodules.records import BoxTruth, ClassTruth, MaskSource, MaskTruth, Truth
from mtmedformer.batch import Task
from mtmedformer.errors import ConfigError, DataError


class Reader(Protocol):
    """Reads one task's label from a row.

    Attributes:
        task: The task.
        notes: Sentences for the user on the column.
        found: Lines of the table by class, where the classes were found in a column.
    """

    task: Task
    notes: list[str]
    found: FoundClasses | None

    def read(self, row: TableRow) -> Truth | None:
        """Return the label, or ``None`` where it is unknown.

        Raises:
            CellError: The row has an invalid value.
            DataError: A path is outside the folder.
        """


class OneClass:
    """One column with the name of the class: a task of which exactly one class holds."""

    def __init__(
        self, name: str, spec: ClassColumns, flag: str | None, table: Table, negative: Collection[str]
    ) -> None:
        assert spec.column is not None
        self.column, self.flag = spec.column, flag
        found = FoundClasses(table.file, spec.column)
        for row in table.rows:
            if may_be_labelled(row, flag):
                found.add(row.cells[spec.column], row)
        self.found: FoundClasses | None = found
        self.task = Task(name, "classification", tuple(spec.classes or found.classes()))
        self.notes = found.notes(self.task, negative)

    def read(self, row: TableRow) -> ClassTruth | None:
        """Return the class as 1 and all others as 0."""
        one = named_index(self.task, row, self.column, self.flag, "class")
        return None if one is None else ClassTruth(tuple(float(i == one) for i in range(len(self.task.classes))))


class ManyClasses:
    """One column of 0 and 1 per class: a task of which several classes may hold."""

    found: FoundClasses | None = None

    def __init__(self, name: str, spec: ClassColumns, flag: str | None) -> None:
        columns = spec.columns if isinstance(spec.columns, dict) else {c: c for c in spec.columns or []}
        order = spec.classes or list(columns)
        if set(order) != set(columns):
            raise ConfigError(
                f"data.init_args.classification.{name}: classes {order} are not those of columns {list(columns)}"
            )
        self.columns, self.flag = [columns[c] for c in order], flag
        self.uncertain = [spec.label_of_uncertain(c) for c in order]
        self.notes: list[str] = []
        self.task = Task(name, "classification", tuple(order), multi_label=True)

    def read(self, row: TableRow) -> ClassTruth | None:
        """Return 1, 0, NaN (unknown) or the label of uncertain findings per class."""
        if flag_of(row, self.flag) is False:
            return None
        values = []
        for column, uncertain in zip(self.columns, self.uncertain, strict=True):
            if number(row.text(column)) == -1:
                values.append(uncertain)
            else:
                value = row.switch(column)
                values.append(math.nan if value is None else float(value))
        return None if all(math.isnan(v) for v in values) else ClassTruth(tuple(values))


class BoxReader:
    """Lists of boxes and of their classes."""

    def __init__(self, name: str, spec: BoxColumns, flag: str | None, table: Table) -> None:
        self.boxes, self.labels, self.flag = spec.boxes, spec.labels, flag
        self.found: FoundClasses | None = None
        self.notes: list[str] = []
        classes = spec.classes or [name]
        if spec.labels and not spec.classes:
            self.found = FoundClasses(table.file, spec.labels)
            refused = [error for row in table.rows if may_be_labelled(row, flag) and (error := self._collect(row))]
            if refused and not self.found.lines:
                raise DataError(f"{table.file}: no class of {name!r} can be read. {refused[0].detail}")
            classes = self.found.classes()
        self.task = Task(name, "detection", tuple(classes), weak=spec.weak)
        if self.found is not None:
            self.notes = self.found.notes(self.task)

    def read(self, row: TableRow) -> BoxTruth | None:
        """Return the boxes; a blank cell is unknown, unless the flag is 1."""
        known = flag_of(row, self.flag)
        if known is False or (known is None and not row.text(self.boxes)):
            return None
        boxes = tuple(self._box(row, item) for item in row.items(self.boxes))
        if self.labels is None:
            return BoxTruth(boxes, (0,) * len(boxes))
        names = self._names(row)
        if len(names) != len(boxes):
            fix = f"{len(names)} labels for {len(boxes)} boxes; give each box one"
            raise row.error(self.labels, "not one label per box", fix)
        return BoxTruth(boxes, tuple(index_of(self.task, name, row, self.labels) for name in names))

    def _box(self, row: TableRow, item: Any) -> tuple[float, float, float, float]:
        values = [number(v) for v in item] if isinstance(item, list | tuple) else []
        if len(values) == 4:
            x0, y0, x1, y1 = values
            if x0 is not None and y0 is not None and x1 is not None and y1 is not None:
                return (x0, y0, x1, y1)
            if all(isinstance(v, int | float) and not isinstance(v, bool) for v in item):
                reason, fix = "box with a coordinate that is not a number", "write finite numbers"
                raise row.error(self.boxes, reason, fix)
        fix = f"a box is four numbers [x0, y0, x1, y1], not {short(item)}"
        raise row.error(self.boxes, "box not four numbers", fix)

    def _names(self, row: TableRow) -> list[str]:
        assert self.labels is not None
        names = []
        for item in row.items(self.labels, '["opacity"], one class for each box'):
            if isinstance(item, bool) or not isinstance(item, str | int | float) or not str(item).strip():
                raise row.error(self.labels, "class of a box is no word", 'write a JSON list such as ["opacity"]')
            names.append(str(item).strip())
        return names

    def _collect(self, row: TableRow) -> CellError | None:
        """Add the classes of a row's boxes, or return the error that reading the row will give."""
        assert self.found is not None
        try:
            for name in self._names(row):
                self.found.add(name, row, blank=False)
        except CellError as error:
            return error
        return None


class MaskReader:
    """Mask files: one per class, or one for all classes."""

    found: FoundClasses | None = None

    def __init__(self, name: str, spec: MaskColumns, flag: str | None, root: Path) -> None:
        self.flag, self.root = flag, root
        self.channels: list[tuple[str, tuple[int, ...] | None]] = [(c, None) for c in spec.columns.values()]
        if spec.column:
            self.channels = [(spec.column, tuple(v)) for v in spec.values.values()]
        classes = tuple(spec.columns or spec.values)
        overlap = bool(spec.columns) or len(classes) == 1
        self.notes: list[str] = []
        self.task = Task(name, "segmentation", classes, multi_label=overlap, weak=spec.weak)

    def read(self, row: TableRow) -> MaskTruth | None:
        """Return one source per class; a class with a blank cell is not annotated, unless the flag is 1."""
        known = flag_of(row, self.flag)
        if known is False:
            return None
        sources = tuple(self._source(row, column, values, bool(known)) for column, values in self.channels)
        return MaskTruth(sources) if any(sources) else None

    def _source(self, row: TableRow, column: str, values: tuple[int, ...] | None, known: bool) -> MaskSource | None:
        if not row.text(column):
            return MaskSource() if known else None
        return MaskSource(row.path(column, self.root), values)


def reader(name: str, spec: Columns, flag: str | None, table: Table, root: Path, negative: Collection[str]) -> Reader:
    """Return the reader of a task.

    Args:
        name: Name of the task.
        spec: Its columns.
        flag: Its flag column, if the table has it.
        table: The table; classes that are not given are its values.
        root: Folder of the mask files.
        negative: Names of classes of images without a finding, each as ``plain_name`` returns it.

    Raises:
        DataError: The classes are not given and cannot be found in the table.
        ConfigError: The classes given are not those of the columns.
    """
    if isinstance(spec, BoxColumns):
        return BoxReader(name, spec, flag, table)
    if isinstance(spec, MaskColumns):
        return MaskReader(name, spec, flag, root)
    if isinstance(spec, ValueColumns):
        return (GradeReader if spec.classes else NumberReader)(name, spec, flag, table)
    return OneClass(name, spec, flag, table, negative) if spec.column else ManyClasses(name, spec, flag)
