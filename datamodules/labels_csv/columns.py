"""Columns of a task's labels in a table, as a configuration names them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from mtmedformer.batch import Task
from mtmedformer.errors import ConfigError


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
            if isinstance(spec, ValueColumns):
                _check_values(key, spec)
            given = None if isinstance(spec, MaskColumns) else spec.classes
            if given is not None and len(set(given)) < max(1, len(given)):
                raise ConfigError(f"{key}.classes={given}: name each class once, or leave it out")
            specs[name] = spec
    return specs


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
