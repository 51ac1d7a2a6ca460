"""Read a label table of unknown encoding and separator, with cells that are numbers, flags or lists.

Every error names file, line and column.
"""

from __future__ import annotations

import ast
import codecs
import csv
import difflib
import io
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtmedformer.errors import DataError, NoImagesError

BLANK = frozenset({"", "nan", "na", "n/a", "none", "null"})
"""Text of cells without a value, in lower case."""

SEPARATORS = (",", ";", "\t", "|")
LARGEST_CELL = 2**24  # characters; the default limit of the csv module, 128 KiB, is too small for polygons


class CellError(Exception):
    """A cell with an invalid value, with a ``reason`` that can be counted and a ``detail`` with place and fix."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class TableRow:
    """One row: its table, its first line (the header is line 1) and its stripped cells by column."""

    file: Path
    line: int
    cells: dict[str, str]

    def text(self, column: str | None) -> str:
        """Return a cell's text; an empty string where it is blank or the column is missing."""
        cell = self.cells.get(column, "") if column else ""
        return "" if cell.lower() in BLANK else cell

    def switch(self, column: str) -> bool | None:
        """Return a cell of 0 or 1 (false or true, no or yes), ``None`` where it is blank.

        Raises:
            CellError: The cell has another value.
        """
        cell = self.text(column).lower()
        if not cell:
            return None
        if cell in ("1", "1.0", "true", "yes"):
            return True
        if cell in ("0", "0.0", "false", "no"):
            return False
        raise self.error(column, "cell neither 0 nor 1", "write 0, 1 or leave it blank")

    def items(self, column: str) -> list[Any]:
        """Return the items of a cell with a JSON or Python list; a blank cell has none.

        Raises:
            CellError: The cell is no list.
        """
        cell = self.text(column)
        if not cell:
            return []
        value: Any = None
        try:
            value = json.loads(cell)
        except ValueError:
            try:
                value = ast.literal_eval(cell)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                raise self.error(column, "cell not a list", "write a JSON list such as [[10, 20, 30, 40]]") from None
        except RecursionError:
            raise self.error(column, "cell not a list", "its brackets nest too deep") from None
        if not isinstance(value, list | tuple):
            raise self.error(column, "cell not a list", "write a JSON list, [] for none")
        return list(value)

    def size(self, height: str, width: str) -> tuple[int, int] | None:
        """Return ``(height, width)`` from two columns, ``None`` where one is blank or absent."""
        if not (self.text(height) and self.text(width)):
            return None
        values = []
        for column in (height, width):
            try:
                number = float(self.text(column))
            except ValueError:
                number = math.nan
            if not (number > 0 and number == math.floor(number) < 2**31):
                raise self.error(column, "image size not a whole number", "write pixels, or leave it blank")
            values.append(int(number))
        return (values[0], values[1])

    def error(self, column: str, reason: str, fix: str) -> CellError:
        """Return an error about one cell."""
        cell = self.cells.get(column, "")
        shown = cell if len(cell) <= 60 else cell[:57] + "..."
        return CellError(reason, f"{self.file.name} line {self.line}, column {column!r}: {shown!r}; {fix}")


@dataclass(frozen=True)
class Table:
    """A table as text.

    Attributes:
        file: The file.
        columns: Column names in order.
        rows: The rows that are not blank.
        notes: Sentences for the user on the encoding.
    """

    file: Path
    columns: list[str]
    rows: list[TableRow]
    notes: list[str]

    def require(self, columns: Iterable[str], why: str) -> None:
        """Raise unless every column exists.

        Raises:
            DataError: A column is missing; the error names its purpose, the nearest name and all columns.
        """
        for column in columns:
            if column not in self.columns:
                near = self.nearest(column)
                hint = f"; did you mean {near!r}?" if near else ""
                raise DataError(
                    f"{self.file}: no column {column!r} ({why}){hint} The columns are {', '.join(self.columns)}."
                )

    def nearest(self, column: str) -> str | None:
        """Return the column with the most similar name, or ``None``."""
        lowered = {name.lower(): name for name in self.columns}
        similar = difflib.get_close_matches(column.lower(), lowered, 1, 0.8)
        return lowered[similar[0]] if similar else None


def read_labels(file: Path, key: str) -> Table:
    """Read a table of unknown encoding and separator.

    Args:
        file: A text table with a header line; UTF-8, UTF-16 (with its mark) or Windows-1252; separated by comma,
            semicolon, tab or bar.
        key: A required column; the separator is the one with which the header has it.

    Raises:
        DataError: The file is missing, empty or no text, lacks the column, or a row has more or fewer cells than the
            header.
    """
    notes: list[str] = []
    text = _text(file, notes)
    first = next((line for line in text.splitlines() if line.strip()), "")
    if not first:
        raise DataError(f"{file}: the table is empty; it needs a header line and one row per image")
    fitting = [s for s in SEPARATORS if key in (cell.strip() for cell in next(csv.reader([first], delimiter=s)))]
    separator = fitting[0] if fitting else max(SEPARATORS, key=first.count)
    rows: list[TableRow] = []
    header: list[str] = []
    csv.field_size_limit(LARGEST_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    line = 1
    try:
        for cells in reader:
            start, line = line, reader.line_num + 1
            stripped = [cell.strip() for cell in cells]
            if not any(stripped):
                continue
            if not header:
                header = _header(file, stripped)
            elif len(stripped) != len(header):
                raise DataError(
                    f"{file}: line {start} has {len(stripped)} cells, the header {len(header)}. Is the file complete? "
                    f'Cells that contain {separator!r} need double quotes around them: "[[1{separator}2]]".'
                )
            else:
                rows.append(TableRow(file, start, dict(zip(header, stripped, strict=True))))
    except csv.Error as error:
        raise DataError(
            f"{file}: line {reader.line_num} is not a line of a table ({error}); save it as CSV again"
        ) from None
    table = Table(file, header, rows, notes)
    table.require([key], "it names the image file of each row")
    if not rows:
        raise NoImagesError(f"{file}: the table has a header but no row")
    return table


def _header(file: Path, cells: list[str]) -> list[str]:
    twice = sorted({cell for cell in cells if cell and cells.count(cell) > 1})
    if twice:
        raise DataError(f"{file}: column {', '.join(map(repr, twice))} appears more than once; rename or remove one")
    return cells


def _text(file: Path, notes: list[str]) -> str:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(
            f"{file} cannot be read ({error.strerror or error}); check data.init_args.root and data.init_args.table"
        ) from error
    marks = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
    encoding = next((name for mark, name in marks.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError:
        text = content.decode("cp1252", errors="replace")
        notes.append(f"{file.name}: not UTF-8; read as Windows-1252. Save it as UTF-8 if names look wrong.")
    if "\x00" in text:
        raise DataError(f"{file}: not a text table; save an Excel sheet as CSV (UTF-8)")
    return text
