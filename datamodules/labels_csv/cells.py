"""One row of a label table, and its cells as text, flags, numbers, lists and paths.

Every error names file, line and column.
"""

from __future__ import annotations

import ast
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.records import Split
from mtmedformer.errors import DataError

BLANK = frozenset({"", "nan", "-nan", "na", "n/a", "#n/a", "#na", "<na>", "none", "null"})
"""Text of cells without a value, in lower case."""

YES = frozenset({"true", "t", "yes", "y", "x", "✓", "on", "present", "positive", "pos"})
NO = frozenset({"false", "f", "no", "n", "off", "absent", "negative", "neg"})
"""Words of a cell that holds 1 or 0, in lower case."""

SPLITS: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
"""Words for a split, in lower case."""

LONGEST_NAME = 200
"""Longest class, patient, site or other name in characters; more is free text, or two rows that an open quote joins."""

LONGEST_PATH, LONGEST_PART = 4096, 255
"""Longest path and part of a path in bytes (Linux; other systems have smaller limits)."""

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_FAULT = re.compile(r"#(REF!|VALUE!|NAME\?|DIV/0!|NUM!|NULL!|SPILL!|CALC!)")  # of a formula in a spreadsheet
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class CellError(Exception):
    """A cell with an invalid value, with a ``reason`` that can be counted and a ``detail`` with place and fix."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True, eq=False)
class TableRow:
    """One row: its table, its first line (the header is line 1) and its stripped cells by column."""

    file: Path
    line: int
    cells: dict[str, str]

    def text(self, column: str | None) -> str:
        """Return a cell's text; an empty string where it is blank or the column is missing."""
        cell = self.cells.get(column, "") if column else ""
        return "" if cell.lower() in BLANK else cell

    def name(self, column: str | None) -> str:
        """Return a cell's text as a name.

        Raises:
            CellError: It is too long, has line breaks or other control characters, or is the fault of a formula.
        """
        text = self.text(column)
        if column and is_fault(text):
            raise self.error(column, "cell is a fault of a formula", "write its value")
        if column and (len(text) > LONGEST_NAME or _UNPRINTABLE.search(text)):
            raise self.error(
                column, "cell is no name", f"write at most {LONGEST_NAME} characters in one line; is a quote left open?"
            )
        return text

    def switch(self, column: str) -> bool | None:
        """Return a cell of 0 or 1 (also as 0.0, N, no, false, absent; Y, yes, true, x, present), ``None`` if blank.

        Raises:
            CellError: The cell has another value.
        """
        cell = self.text(column).lower()
        if not cell:
            return None
        value = number(cell)
        if value == 1 or cell in YES:
            return True
        if value == 0 or cell in NO:
            return False
        raise self.error(column, "cell neither 0 nor 1", "write 0 or 1, or leave it blank")

    def items(self, column: str, example: str = "[[10, 20, 30, 40]]") -> list[Any]:
        """Return the items of a cell with a JSON or Python list; a blank cell has none.

        Args:
            column: The column.
            example: A list of the right form, for the error.

        Raises:
            CellError: The cell is no list.
        """
        cell = self.text(column)
        if not cell:
            return []
        value: Any = None
        try:
            value = json.loads(cell)
        except (ValueError, RecursionError):
            try:
                value = ast.literal_eval(cell)
            except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
                value = None
        if not isinstance(value, list | tuple):
            raise self.error(column, "cell not a list", f"write a JSON list such as {example}, or [] for none")
        return list(value)

    def size(self, height: str, width: str) -> tuple[int, int] | None:
        """Return ``(height, width)`` from two columns, ``None`` where both are blank or absent.

        Raises:
            CellError: One is no whole number above 0, or is blank and the other is not.
        """
        if not (self.text(height) or self.text(width)):
            return None
        values = []
        for column in (height, width):
            value = number(self.text(column))
            if value is None or not (0 < value < 2**31 and value == math.floor(value)):
                raise self.error(column, "image size not a whole number", "write pixels, or leave both blank")
            values.append(int(value))
        return (values[0], values[1])

    def path(self, column: str, root: Path) -> Path:
        """Return the path of the file that a cell names.

        Raises:
            CellError: No file can have this name.
            DataError: The path is outside the folder.
        """
        text = self.text(column).replace("\\", "/")
        sizes = [len(part) for part in os.fsencode(text).split(b"/")]
        if _UNPRINTABLE.search(text) or max(sizes) > LONGEST_PART or sum(sizes) + len(sizes) > LONGEST_PATH:
            raise self.error(column, "path no file can have", "name one file, without line breaks")
        path = Path(os.path.abspath(root / text))
        if not path.is_relative_to(os.path.abspath(root)):
            raise DataError(
                f"{self.file}: line {self.line}, column {column!r}: {text!r} is outside the folder {root}; paths in a "
                "table are relative to data.init_args.root and stay below it"
            )
        return path

    def error(self, column: str, reason: str, fix: str) -> CellError:
        """Return an error about one cell."""
        return CellError(
            reason, f"{self.file.name} line {self.line}, column {column!r}: {short(self.cells.get(column, ''))}; {fix}"
        )


def flag_of(row: TableRow, flag: str | None) -> bool | None:
    """Return the flag of a task; a blank cell is ``False``, a task without flag has ``None``."""
    return bool(row.switch(flag)) if flag else None


def may_be_labelled(row: TableRow, flag: str | None) -> bool:
    """Return whether a row may be labelled; one with an unreadable flag is quarantined when it is read."""
    try:
        return flag_of(row, flag) is not False
    except CellError:
        return True


def number(value: object) -> float | None:
    """Return a finite number, given as one or as text with digits and a decimal point; ``None`` for anything else."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    if isinstance(value, str) and not _NUMBER.fullmatch(value):
        return None
    try:
        result = float(value)
    except OverflowError:  # an integer of more than 308 digits
        return None
    return result if math.isfinite(result) else None


def is_fault(text: str) -> bool:
    """Return whether a text is what a spreadsheet shows in place of a value that it cannot compute."""
    return bool(_FAULT.fullmatch(text))


def short(value: object) -> str:
    """Return a value as quoted text of at most 60 characters, without control characters."""
    text = value if isinstance(value, str) else str(value)
    return repr(text if len(text) <= 60 else text[:57] + "...")


def plain(names: Sequence[str]) -> str:
    """Return names joined by commas; one that is long or has control characters is quoted, and at most 60 are given."""
    return listed([name if name.isprintable() and len(name) <= 60 else short(name) for name in names], 60)


def listed(words: Sequence[object], most: int = 5) -> str:
    """Return the first of several words or numbers, and how many there are more."""
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(map(str, words[:most])) + more


def lines(rows: Mapping[str, Sequence[int]]) -> str:
    """Return how many cells have which text, and the first lines of each: ``6 cells 'None' (lines 3, 5, 7)``."""
    return " and ".join(
        f"{len(at)} cell{'s' if len(at) > 1 else ''} {short(text)} (line{'s' if len(at) > 1 else ''} {listed(at)})"
        for text, at in rows.items()
    )
