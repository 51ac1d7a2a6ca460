"""Which columns of a table hold a task's truth, and how a row becomes truth.

A reader returns ``None`` for what a row does not say and raises ``CellError`` for what it says badly: both leave the
task unknown, never negative.
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
"""A column of more different values is free text or a number, and no class."""


@dataclass(frozen=True)
class ClassColumns:
    """Where the classes of a classification task are.

    Give ``column`` (one class an image) or ``columns`` (several may hold at once).

    Attributes:
        column: Column with the name of the one class that holds; blank: unknown.
        columns: Columns with 1 (holds), 0 (does not), blank or -1 (unknown), one a class; the class is called as its
            column, or by the key if this is a mapping ``{class: column}``.
        classes: Class names in channel order; ``null`` takes the values of ``column``, sorted.
        flag: Column with 1 where the image is labelled for the task and 0 where it is not.
    """

    column: str | None = None
    columns: list[str] | dict[str, str] | None = None
    classes: list[str] | None = None
    flag: str | None = None


@dataclass(frozen=True)
class BoxColumns:
    """Where the boxes of a detection task are.

    Attributes:
        boxes: Column with a list ``[[x0, y0, x1, y1], ...]`` in pixels, x1 and y1 exclusive; ``[]``: nothing there.
        labels: Column with a list of the boxes' classes; ``null``: all boxes are of one class.
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
    """Where the masks of a segmentation task are.

    Give ``columns`` (a file a class, which may overlap) or ``column`` with ``values`` (one file of class numbers).

    Attributes:
        columns: Columns with the mask file of each class, ``{class: column}``; pixels above 0 belong to the class.
        column: Column with one mask file for all classes.
        values: Pixel values of each class in that file, ``{class: [values]}``.
        flag: Column with 1 where the image is labelled for the task, even if nothing is there and the cell is blank,
            and 0 where it is not.
        weak: The masks are approximate.
    """

    columns: dict[str, str] = field(default_factory=dict)
    column: str | None = None
    values: dict[str, list[int]] = field(default_factory=dict)
    flag: str | None = None
    weak: bool = False


Columns = ClassColumns | BoxColumns | MaskColumns


class Reader(Protocol):
    """Reads one task's truth from a row."""

    task: Task

    def read(self, row: TableRow) -> Truth | None:
        """Return the truth, or ``None`` where the row does not say.

        Raises:
            CellError: The row says something that cannot be.
        """


class OneClass:
    """One column names the class: a single-label task."""

    def __init__(self, name: str, spec: ClassColumns, flag: str | None, table: Table) -> None:
        assert spec.column is not None
        self.column, self.flag = spec.column, flag
        found = (row.text(spec.column) for row in table.rows if _labelled(row, flag) is not False)
        self.task = Task(name, "classification", _classes(spec.classes, found, table, spec.column))

    def read(self, row: TableRow) -> ClassTruth | None:
        """Return one-hot truth."""
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
    """One 0/1 column a class: a multi-label task."""

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
        """Return 1, 0 or NaN a class."""
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
        """Return the boxes; a blank cell is unknown unless the flag says that someone looked."""
        known = _switch(row, self.flag)
        if known is False or (known is None and not row.text(self.boxes)):
            return None
        boxes = tuple(self._box(row, item) for item in row.items(self.boxes))
        if self.labels is None:
            return BoxTruth(boxes, (0,) * len(boxes))
        names = row.items(self.labels)
        if len(names) != len(boxes):
            fix = f"{len(names)} labels for {len(boxes)} boxes; give each box one"
            raise row.error(self.labels, "not one label a box", fix)
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
            except CellError:  # told when the row is read
                continue


class MaskReader:
    """Mask files, one a class or one for all classes."""

    def __init__(self, name: str, spec: MaskColumns, flag: str | None, root: Path) -> None:
        self.flag, self.root = flag, root
        self.channels: list[tuple[str, tuple[int, ...] | None]] = [(c, None) for c in spec.columns.values()]
        if spec.column:
            self.channels = [(spec.column, tuple(v)) for v in spec.values.values()]
        classes = tuple(spec.columns or spec.values)
        overlap = bool(spec.columns) or len(classes) == 1
        self.task = Task(name, "segmentation", classes, multi_label=overlap, weak=spec.weak)

    def read(self, row: TableRow) -> MaskTruth | None:
        """Return a source a class; a blank cell is not annotated unless the flag says that someone looked."""
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
    """Return what reads a task.

    Args:
        name: Name of the task.
        spec: Its columns.
        flag: Its flag column, if the table has it.
        table: The table; classes that are not given come from it.
        root: Folder of the mask files.
    """
    if isinstance(spec, BoxColumns):
        return BoxReader(name, spec, flag, table)
    if isinstance(spec, MaskColumns):
        return MaskReader(name, spec, flag, root)
    return OneClass(name, spec, flag, table) if spec.column else ManyClasses(name, spec, flag)


def columns_of(spec: Columns) -> list[str]:
    """Return the columns that a task cannot do without (its flag is not one)."""
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
                raise ConfigError(f"{key}: give column (one class an image) or columns (several), not both")
            if isinstance(spec, MaskColumns) and (
                bool(spec.column) == bool(spec.columns) or bool(spec.column) != bool(spec.values)
            ):
                raise ConfigError(f"{key}: give columns (a file a class), or column and values (one file), not both")
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
    """Return the file a cell names.

    Raises:
        DataError: It lies outside the folder.
    """
    path = Path(os.path.abspath(root / row.text(column).replace("\\", "/")))
    if not path.is_relative_to(os.path.abspath(root)):
        raise DataError(
            f"{row.file}: line {row.line}, column {column!r}: {row.text(column)!r} leaves the folder "
            f"{root}; paths in a table are relative to data.init_args.root and stay below it"
        )
    return path


def _switch(row: TableRow, flag: str | None) -> bool | None:
    """Return what the flag says; a blank one says no, having none says nothing."""
    return bool(row.switch(flag)) if flag else None


def _labelled(row: TableRow, flag: str | None) -> bool | None:
    try:
        return _switch(row, flag)
    except CellError:  # told when the row is read
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
            f"{table.file}: column {column!r} holds no class in any labelled row; give classes, or drop the task"
        )
    if len(classes) > MOST_CLASSES:
        shown = ", ".join(classes[:5])
        raise DataError(
            f"{table.file}: column {column!r} holds {len(classes)} different values ({shown}, …), too many for "
            "classes; choose another column, or give classes"
        )
    return tuple(classes)
