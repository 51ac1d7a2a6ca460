"""Columns of a task's labels in a table, and how a row becomes a label.

A reader returns ``None`` for a blank label and raises ``CellError`` for an invalid one: both leave the task unknown,
never negative.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from datamodules.labels_csv.table import CellError, Table, TableRow
from datamodules.records import BoxTruth, ClassTruth, MaskSource, MaskTruth, Truth
from mtmedformer.batch import Task
from mtmedformer.errors import ConfigError, DataError

MOST_CLASSES = 50
"""A column with more different values contains text or numbers, not classes."""


@dataclass(frozen=True)
class ClassColumns:
    """Columns of a classification task: ``column`` (one class per image) or ``columns`` (several may hold).

    Attributes:
        column: Column with the name of the class; blank: unknown.
        columns: One column per class with 1 (holds), 0 (does not hold), blank or -1 (unknown). The name of a class is
            its column's, or its key in a mapping ``{class: column}``.
        classes: Class names in channel order; ``null`` takes the values of ``column``, sorted.
        flag: Column with 1 where the image is labelled for the task and 0 where it is not.
    """

    column: str | None = None
    columns: list[str] | dict[str, str] | None = None
    classes: list[str] | None = None
    flag: str | None = None


@dataclass(frozen=True)
class BoxColumns:
    """Columns of a detection task.

    Attributes:
        boxes: Column with a list ``[[x0, y0, x1, y1], ...]`` in pixels, x1 and y1 exclusive; ``[]``: annotated without
            a box; blank: unknown.
        labels: Column with a list of the boxes' classes; ``null``: all boxes have one class.
        classes: Class names in channel order; ``null`` takes those of ``labels``, sorted (without ``labels``: the
            task's name).
        flag: Column with 1 where the image is labelled for the task and 0 where it is not.
        weak: The boxes are approximate.
    """

    boxes: str = "boxes"
    labels: str | None = "box_labels"
    classes: list[str] | None = None
    flag: str | None = None
    weak: bool = False


@dataclass(frozen=True)
class MaskColumns:
    """Columns of a segmentation task: ``columns`` (one file per class, may overlap) or ``column`` with ``values``.

    Attributes:
        columns: Column with the mask file of each class, ``{class: column}``.
        column: Column with one mask file for all classes.
        values: Pixel values of each class in that file, ``{class: [values]}``.
        flag: Column with 1 where the image is labelled for the task (a blank mask is then empty) and 0 where it is not.
        weak: The masks are approximate.
    """

    columns: dict[str, str] = field(default_factory=dict)
    column: str | None = None
    values: dict[str, list[int]] = field(default_factory=dict)
    flag: str | None = None
    weak: bool = False


Columns = ClassColumns | BoxColumns | MaskColumns


class Reader(Protocol):
    """Reads one task's label from a row."""

    task: Task

    def read(self, row: TableRow) -> Truth | None:
        """Return the label, or ``None`` where it is unknown.

        Raises:
            CellError: The row has an invalid value.
        """


class OneClass:
    """One column with the name of the class: a task of which exactly one class holds."""

    def __init__(self, name: str, spec: ClassColumns, flag: str | None, table: Table) -> None:
        assert spec.column is not None
        self.column, self.flag = spec.column, flag
        found = (row.text(spec.column) for row in table.rows if _labelled(row, flag) is not False)
        self.task = Task(name, "classification", _classes(spec.classes, found, table, spec.column))

    def read(self, row: TableRow) -> ClassTruth | None:
        """Return the class as 1 and all others as 0."""
        cell, known = row.cells[self.column], _switch(row, self.flag)
        label = cell if cell in self.task.classes else row.text(self.column)  # a class may be called "none"
        if known is False or not label:
            if known:
                raise row.error(self.column, "labelled but no class given", f"name a class or set {self.flag} to 0")
            return None
        return ClassTruth(tuple(float(i == _index(self.task, label, row, self.column)) for i in range(self.size)))

    @property
    def size(self) -> int:
        """Number of classes."""
        return len(self.task.classes)


class ManyClasses:
    """One column of 0 and 1 per class: a task of which several classes may hold."""

    def __init__(self, name: str, spec: ClassColumns, flag: str | None) -> None:
        columns = spec.columns if isinstance(spec.columns, dict) else {c: c for c in spec.columns or []}
        order = spec.classes or list(columns)
        if set(order) != set(columns):
            raise ConfigError(
                f"data.init_args.classification.{name}: classes {order} are not those of columns {list(columns)}"
            )
        self.columns, self.flag = [columns[c] for c in order], flag
        self.task = Task(name, "classification", tuple(order), multi_label=True)

    def read(self, row: TableRow) -> ClassTruth | None:
        """Return 1, 0 or NaN (unknown) per class."""
        if _switch(row, self.flag) is False:
            return None
        values = []
        for column in self.columns:
            uncertain = row.text(column) in ("-1", "-1.0")
            value = None if uncertain else row.switch(column)
            values.append(math.nan if value is None else float(value))
        return None if all(math.isnan(v) for v in values) else ClassTruth(tuple(values))


class BoxReader:
    """Lists of boxes and of their classes."""

    def __init__(self, name: str, spec: BoxColumns, flag: str | None, table: Table) -> None:
        self.boxes, self.labels, self.flag = spec.boxes, spec.labels, flag
        classes = spec.classes or [name]
        if spec.labels and not spec.classes:
            classes = list(_classes(None, self._found(table, spec.labels), table, spec.labels))
        self.task = Task(name, "detection", tuple(classes), weak=spec.weak)

    def read(self, row: TableRow) -> BoxTruth | None:
        """Return the boxes; a blank cell is unknown, unless the flag is 1."""
        known = _switch(row, self.flag)
        if known is False or (known is None and not row.text(self.boxes)):
            return None
        boxes = tuple(self._box(row, item) for item in row.items(self.boxes))
        if self.labels is None:
            return BoxTruth(boxes, (0,) * len(boxes))
        names = row.items(self.labels)
        if len(names) != len(boxes):
            fix = f"{len(names)} labels for {len(boxes)} boxes; give each box one"
            raise row.error(self.labels, "not one label per box", fix)
        return BoxTruth(boxes, tuple(_index(self.task, str(n).strip(), row, self.labels) for n in names))

    def _box(self, row: TableRow, item: Any) -> tuple[float, float, float, float]:
        try:
            x0, y0, x1, y1 = (float(v) for v in item)
        except (TypeError, ValueError):
            fix = f"a box is four numbers [x0, y0, x1, y1], not {str(item)[:40]}"
            raise row.error(self.boxes, "box not four numbers", fix) from None
        return (x0, y0, x1, y1)

    def _found(self, table: Table, column: str) -> Iterable[str]:
        for row in table.rows:
            if _labelled(row, self.flag) is False:
                continue
            try:
                yield from (str(name).strip() for name in row.items(column))
            except CellError:  # reported when the row is read
                continue


class MaskReader:
    """Mask files: one per class, or one for all classes."""

    def __init__(self, name: str, spec: MaskColumns, flag: str | None, root: Path) -> None:
        self.flag, self.root = flag, root
        self.channels: list[tuple[str, tuple[int, ...] | None]] = [(c, None) for c in spec.columns.values()]
        if spec.column:
            self.channels = [(spec.column, tuple(v)) for v in spec.values.values()]
        classes = tuple(spec.columns or spec.values)
        overlap = bool(spec.columns) or len(classes) == 1
        self.task = Task(name, "segmentation", classes, multi_label=overlap, weak=spec.weak)

    def read(self, row: TableRow) -> MaskTruth | None:
        """Return one source per class; a class with a blank cell is not annotated, unless the flag is 1."""
        known = _switch(row, self.flag)
        if known is False:
            return None
        sources = tuple(self._source(row, column, values, bool(known)) for column, values in self.channels)
        return MaskTruth(sources) if any(sources) else None

    def _source(self, row: TableRow, column: str, values: tuple[int, ...] | None, known: bool) -> MaskSource | None:
        if not row.text(column):
            return MaskSource() if known else None
        return MaskSource(path_in(self.root, row, column), values)


def reader(name: str, spec: Columns, flag: str | None, table: Table, root: Path) -> Reader:
    """Return the reader of a task.

    Args:
        name: Name of the task.
        spec: Its columns.
        flag: Its flag column, if the table has it.
        table: The table; classes that are not given are its values.
        root: Folder of the mask files.
    """
    if isinstance(spec, BoxColumns):
        return BoxReader(name, spec, flag, table)
    if isinstance(spec, MaskColumns):
        return MaskReader(name, spec, flag, root)
    return OneClass(name, spec, flag, table) if spec.column else ManyClasses(name, spec, flag)


def columns_of(spec: Columns) -> list[str]:
    """Return the columns that a task requires (its flag is optional)."""
    if isinstance(spec, BoxColumns):
        return [c for c in (spec.boxes, spec.labels) if c]
    if isinstance(spec, MaskColumns):
        return [*spec.columns.values(), *([spec.column] if spec.column else [])]
    many = spec.columns.values() if isinstance(spec.columns, dict) else spec.columns or []
    return [spec.column] if spec.column else list(many)


def check_columns(
    classification: dict[str, ClassColumns], detection: dict[str, BoxColumns], segmentation: dict[str, MaskColumns]
) -> dict[str, Columns]:
    """Return all tasks' columns by name.

    Raises:
        ConfigError: No task is given, two have one name, or one is described in no or two ways.
    """
    groups: dict[str, dict[str, Columns]] = {
        "classification": {**classification},
        "detection": {**detection},
        "segmentation": {**segmentation},
    }
    specs: dict[str, Columns] = {}
    for kind, group in groups.items():
        for name, spec in group.items():
            key = f"data.init_args.{kind}.{name}"
            if name in specs:
                raise ConfigError(f"{key}: another task is called {name!r}; give each its own name")
            if isinstance(spec, ClassColumns) and bool(spec.column) == bool(spec.columns):
                raise ConfigError(f"{key}: give column (one class per image) or columns (several), not both")
            if isinstance(spec, MaskColumns) and (
                bool(spec.column) == bool(spec.columns) or bool(spec.column) != bool(spec.values)
            ):
                raise ConfigError(
                    f"{key}: give columns (one file per class), or column and values (one file), not both"
                )
            given = None if isinstance(spec, MaskColumns) else spec.classes
            if given is not None and len(set(given)) < max(1, len(given)):
                raise ConfigError(f"{key}.classes={given}: name each class once, or leave it out")
            specs[name] = spec
    if not specs:
        raise ConfigError(
            "data.init_args: name at least one task under classification, detection or segmentation, for example "
            "classification: {finding: {column: label}}"
        )
    return specs


def path_in(root: Path, row: TableRow, column: str) -> Path:
    """Return the path of the file that a cell names.

    Raises:
        DataError: The path is outside the folder.
    """
    path = Path(os.path.abspath(root / row.text(column).replace("\\", "/")))
    if not path.is_relative_to(os.path.abspath(root)):
        raise DataError(
            f"{row.file}: line {row.line}, column {column!r}: {row.text(column)!r} is outside the folder "
            f"{root}; paths in a table are relative to data.init_args.root and stay below it"
        )
    return path


def _switch(row: TableRow, flag: str | None) -> bool | None:
    """Return the flag; a blank cell is ``False``, a task without flag has ``None``."""
    return bool(row.switch(flag)) if flag else None


def _labelled(row: TableRow, flag: str | None) -> bool | None:
    try:
        return _switch(row, flag)
    except CellError:  # reported when the row is read
        return False


def _index(task: Task, name: str, row: TableRow, column: str) -> int:
    if name not in task.classes:
        raise row.error(column, "unknown class", f"the classes of {task.name} are {', '.join(task.classes)}")
    return task.classes.index(name)


def _classes(given: list[str] | None, found: Iterable[str], table: Table, column: str) -> tuple[str, ...]:
    if given:
        return tuple(given)
    classes = sorted(set(found) - {""})
    if not classes:
        raise DataError(
            f"{table.file}: column {column!r} has no class in any labelled row; give classes, or drop the task"
        )
    if len(classes) > MOST_CLASSES:
        shown = ", ".join(classes[:5])
        raise DataError(
            f"{table.file}: column {column!r} has {len(classes)} different values ({shown}, …), too many for "
            "classes; choose another column, or give classes"
        )
    return tuple(classes)
