"""Columns of a task's labels in a table, as a configuration names them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal

from datamodules.labels_csv.cells import TableRow
from mtmedformer.batch import Task
from mtmedformer.errors import ConfigError

Uncertain = float | Literal["unknown"]
"""Label of a finding that a report leaves open: a probability, 0 to 1, or ``unknown``."""


@dataclass(frozen=True)
class ClassColumns:
    """Columns of a classification task: ``column`` (one class per image) or ``columns`` (several may hold).

    Attributes:
        column: Column with the name of the class; blank: unknown.
        columns: One column per class with 1 (holds), 0 (does not hold), blank or -1 (unknown). The name of a class is
            its column's, or its key in a mapping ``{class: column}``.
        classes: Class names in channel order; ``null`` takes the values of ``column``, sorted.
        flag: Column with 1 where the image is labelled for the task and 0 where it is not.
        uncertain: Label of a cell with -1 in ``columns``: ``unknown``, or a probability such as 0, 1 or 0.5, for all
            classes or by class. A probability between 0 and 1 is used in training only; in validation and test it is
            unknown.
    """

    column: str | None = None
    columns: list[str] | dict[str, str] | None = None
    classes: list[str] | None = None
    flag: str | None = None
    uncertain: Uncertain | dict[str, Uncertain] = "unknown"

    def label_of_uncertain(self, name: str) -> float:
        """Return the label of a cell with -1 for a class; NaN is unknown."""
        value = self.uncertain.get(name, "unknown") if isinstance(self.uncertain, dict) else self.uncertain
        return math.nan if isinstance(value, str) else float(value)


@dataclass(frozen=True)
class PatientColumn:
    r"""Column with the patient, or with a text such as a path in which a pattern finds him.

    Attributes:
        column: The column; ``null`` is that of the image file.
        pattern: Regular expression that finds the patient in the cell: its first group, or the whole match. For
            example ``patient(\d+)`` in ``train/patient00001/study1/view1.jpg``. ``null`` takes the whole cell.
    """

    column: str | None = None
    pattern: str | None = None

    def check(self) -> None:
        """Raise a ``ConfigError`` where the pattern is no regular expression."""
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise ConfigError(
                f"data.init_args.patient.pattern={self.pattern!r}: no regular expression ({error})"
            ) from error

    def read(self, row: TableRow, column: str) -> str:
        """Return the patient of a row.

        Args:
            row: The row.
            column: The column.

        Raises:
            CellError: The cell is blank or no name, or the pattern finds nothing in it.
        """
        text = row.text(column) if self.pattern else row.name(column)
        if not text:
            fix = "fill it; if every image is another patient, set data.init_args.patient_column to null"
            raise row.error(column, "row without a patient", fix)
        if self.pattern is None:
            return text
        found = re.search(self.pattern, text)
        patient = found and (found[1] if found.re.groups else found[0])
        if not patient:
            fix = f"data.init_args.patient.pattern {self.pattern!r} finds none; correct the pattern or the cell"
            raise row.error(column, "no patient in the cell", fix)
        return patient


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


@dataclass(frozen=True)
class ValueColumns:
    """Column of a regression task: a number, or the name of one of several grades in order.

    Attributes:
        column: Column with the number or the grade; blank: unknown.
        unit: Unit of the number, for example ``years``, with which ages as DICOM writes them are read: ``063Y``.
        range: Lowest and highest possible number; other numbers are errors, and their labels unknown. ``null`` takes
            the lowest and the highest number of the column.
        classes: Names of the grades, the lowest first; ``null``: the column has numbers.
        flag: Column with 1 where the image is labelled for the task and 0 where it is not.
    """

    column: str
    unit: str = ""
    range: tuple[float, float] | None = None
    classes: list[str] | None = None
    flag: str | None = None


Columns = ClassColumns | BoxColumns | MaskColumns | ValueColumns


def columns_of(spec: Columns) -> list[str]:
    """Return the columns that a task requires (its flag is optional)."""
    if isinstance(spec, ValueColumns):
        return [spec.column]
    if isinstance(spec, BoxColumns):
        return [c for c in (spec.boxes, spec.labels) if c]
    if isinstance(spec, MaskColumns):
        return [*spec.columns.values(), *([spec.column] if spec.column else [])]
    many = spec.columns.values() if isinstance(spec.columns, dict) else spec.columns or []
    return [spec.column] if spec.column else list(many)


def check_columns(
    classification: dict[str, ClassColumns],
    detection: dict[str, BoxColumns],
    segmentation: dict[str, MaskColumns],
    regression: dict[str, ValueColumns],
) -> dict[str, Columns]:
    """Return all tasks' columns by name; empty where none is given.

    Raises:
        ConfigError: Two tasks have one name, or one is described in no or two ways.
    """
    groups: dict[str, dict[str, Columns]] = {
        "classification": {**classification},
        "detection": {**detection},
        "segmentation": {**segmentation},
        "regression": {**regression},
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
            if isinstance(spec, ClassColumns):
                _check_uncertain(key, spec)
            if isinstance(spec, ValueColumns):
                _check_values(key, spec)
            given = None if isinstance(spec, MaskColumns) else spec.classes
            if given is not None and len(set(given)) < max(1, len(given)):
                raise ConfigError(f"{key}.classes={given}: name each class once, or leave it out")
            specs[name] = spec
    return specs


def _check_uncertain(key: str, spec: ClassColumns) -> None:
    named = spec.uncertain if isinstance(spec.uncertain, dict) else {"": spec.uncertain}
    columns = spec.columns or []
    for name, value in named.items():
        if name and name not in columns:
            raise ConfigError(
                f"{key}.uncertain: {name!r} is no class of the task; its classes are {', '.join(columns)}"
            )
        if not isinstance(value, str) and not 0 <= value <= 1:
            raise ConfigError(f"{key}.uncertain={value:g}: give unknown, or a probability such as 0, 1 or 0.5")
    if spec.column and spec.uncertain != "unknown":
        raise ConfigError(
            f"{key}.uncertain is the label of -1 in columns of 0 and 1; this task has one column of names"
        )


def _check_values(key: str, spec: ValueColumns) -> None:
    if spec.classes is not None and (spec.range is not None or spec.unit):
        raise ConfigError(f"{key}: grades (classes) have neither unit nor range; leave these out, or the classes")
    if spec.classes is not None and len(spec.classes) < 2:
        raise ConfigError(f"{key}.classes={spec.classes}: name at least two grades, the lowest first")
    if spec.range is not None and not -math.inf < spec.range[0] < spec.range[1] < math.inf:
        raise ConfigError(f"{key}.range={list(spec.range)}: give the lowest and a higher possible number")


def described(specs: Mapping[str, Columns], tasks: Mapping[str, Task]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the columns of tasks by kind and name as plain values, as a configuration describes them.

    Args:
        specs: The columns by task.
        tasks: The tasks; their classes are named, so that another table has to have the same.
    """
    kinds: dict[str, dict[str, dict[str, Any]]] = {}
    for name, spec in specs.items():
        if name not in tasks:
            continue
        given = vars(spec)
        changed = {one.name: given[one.name] for one in fields(spec) if given[one.name] != _default(one)}
        if "classes" in given and tasks[name].classes:
            changed["classes"] = list(tasks[name].classes)
        kinds.setdefault(tasks[name].kind, {})[name] = changed
    return kinds


def _default(one: Field[Any]) -> Any:
    return one.default if one.default_factory is MISSING else one.default_factory()
