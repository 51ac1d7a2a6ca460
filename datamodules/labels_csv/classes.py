"""The classes that a column of a label table names, with the lines where they are found."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from datamodules.labels_csv.cells import BLANK, LONGEST_NAME, TableRow, flag_of, is_fault, lines, listed, number
from mtmedformer.batch import Task
from mtmedformer.errors import DataError
from mtmedformer.metrics.cases import plain_name

MOST_CLASSES = 50
"""A column with more different values contains text or numbers, not classes."""


@dataclass
class FoundClasses:
    """Values of a column of classes.

    Attributes:
        file: The table.
        column: The column.
        lines: Lines of the labelled rows by value.
        blank: Lines of the labelled rows by word that is read as blank: ``None``, ``NA`` …
    """

    file: Path
    column: str
    lines: dict[str, list[int]] = field(default_factory=dict)
    blank: dict[str, list[int]] = field(default_factory=dict)

    def add(self, value: str, row: TableRow, blank: bool = True) -> None:
        """Add the value of a row.

        Args:
            value: The value.
            row: Its row.
            blank: Whether a word such as ``None`` is read as blank.
        """
        if not value or len(value) > LONGEST_NAME or not value.isprintable() or is_fault(value):
            return  # reading the row reports it
        kind = self.blank if blank and value.lower() in BLANK else self.lines
        kind.setdefault(value, []).append(row.line)

    def classes(self) -> list[str]:
        """Return the values in order, numbers that are equal (``0`` and ``0.0``) once, as the shortest.

        Raises:
            DataError: There is none, or there are too many.
        """
        chosen: dict[float | str, str] = {}
        for value in sorted(self.lines, key=lambda text: (len(text), text)):
            key = number(value)
            chosen.setdefault(value if key is None else key, value)
        classes = sorted(chosen.values())
        place = f"{self.file}: column {self.column!r}"
        if not classes:
            why = f" ({lines(self.blank)} read as blank)" if self.blank else ""
            raise DataError(f"{place} has no class in any labelled row{why}; give classes, or drop the task")
        if len(classes) > MOST_CLASSES:
            raise DataError(
                f"{place} has {len(classes)} different values ({', '.join(classes[:5])}, …), too many for classes; "
                "choose another column, or give classes"
            )
        return classes

    def notes(self, task: Task, negative: Collection[str] = ()) -> list[str]:
        """Return sentences on numbers in several formats that are one class, and on words that are read as blank.

        Args:
            task: The task, with its classes.
            negative: Names of classes of images without a finding, as ``plain_name`` returns them. If one of them is
                found in the column, words such as ``NA`` are unknown labels and need no sentence.
        """
        place, notes = f"{self.file.name}: column {self.column!r}", []
        odd = {
            value: at for value, at in self.lines.items() if value not in task.classes and match(value, task.classes)
        }
        if odd:
            names = ", ".join(sorted({repr(match(value, task.classes)) for value in odd}))
            notes.append(f"{place}: {lines(odd)} read as class {names} of {task.name!r}")
        if self._as_blank(task.classes) and not any(plain_name(value) in negative for value in self.lines):
            one = f". Task {task.name!r} is left with a single class, {', '.join(map(repr, self.lines))}"
            notes.append(f"{place}: {self._as_blank(task.classes)}{one if len(self.lines) == 1 else ''}")
        return notes

    def place(self, label: str) -> str:
        """Return where a class is found, and where words are read as blank that may be another class.

        For example ``labels.csv, column 'label': 1 cell 'x' (line 14)``.
        """
        at = {value: rows for value, rows in self.lines.items() if match(value, [label])}
        alone = at.keys() == self.lines.keys() or label in self.blank
        parts = [part for part in (lines(at), self._as_blank([]) if alone else "") if part]
        return f"{self.file.name}, column {self.column!r}: {'; '.join(parts)}" if parts else ""

    def _as_blank(self, classes: Sequence[str]) -> str:
        """Return the sentence on words that are read as blank, unless they are classes; or nothing."""
        blank = {word: at for word, at in self.blank.items() if word not in classes}
        names = [*blank, *sorted(self.lines)]
        listing = f"if that is a class, list it in the task: classes: [{listed([repr(n) for n in names], 9)}]"
        return f"{lines(blank)} read as blank (unknown); {listing}" if blank else ""


def match(value: str, classes: Sequence[str]) -> str | None:
    """Return the class that a cell names: the same text, or the only class that is the same number."""
    if value in classes:
        return value
    key = number(value)
    equal = [] if key is None else [name for name in classes if number(name) == key]
    return equal[0] if len(equal) == 1 else None


def named_index(task: Task, row: TableRow, column: str, flag: str | None, kind: str) -> int | None:
    """Return the index of the class or grade that a cell names; ``None`` if it is unknown.

    Args:
        task: The task.
        row: The row.
        column: The column with the name.
        flag: The column that marks labelled rows, if any.
        kind: ``class`` or ``grade``, for messages.

    Raises:
        CellError: The row is marked as labelled and names none, or the task has no such class.
    """
    cell, known = row.cells[column], flag_of(row, flag)
    given = {name.lower() for name in task.classes}  # a class may be called "none"
    label = cell if cell.lower() in given else row.name(column)
    if known is False or not label:
        if known:
            raise row.error(column, f"labelled but no {kind} given", f"name a {kind} or set {flag} to 0")
        return None
    return index_of(task, label, row, column)


def index_of(task: Task, value: str, row: TableRow, column: str) -> int:
    """Return the index of the class that a cell names.

    Raises:
        CellError: The task has no such class.
    """
    name = match(value, task.classes)
    if name is None:
        near = difflib.get_close_matches(value.lower(), {one.lower(): one for one in task.classes}, 1, 0.7)
        meant = next((one for one in task.classes if near and one.lower() == near[0]), None)
        hint = f"did you mean {meant!r}? " if meant else ""
        raise row.error(column, "unknown class", f"{hint}the classes of {task.name} are {', '.join(task.classes)}")
    return task.classes.index(name)
