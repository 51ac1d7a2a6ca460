"""Read a label table of unknown encoding and separator."""

from __future__ import annotations

import codecs
import csv
import difflib
import io
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from datamodules.labels_csv.cells import TableRow, listed, plain, short
from mtmedformer.errors import DataError, NoImagesError

SEPARATORS = (",", ";", "\t", "|")
LARGEST_CELL = 2**24  # characters; the default limit of the csv module, 128 KiB, is too small for polygons

_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_INVISIBLE = "\ufeff\u200b"  # byte order mark and zero-width space, which editors leave at the ends of cells


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
                hint = f"; did you mean {short(near)}?" if near else "."
                raise DataError(
                    f"{self.file}: no column {column!r} ({why}){hint} The columns are {plain(self.columns)}."
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
    named = re.match(r"sep=(.)\r?\n", text)  # Excel's own first line
    skipped, text = (1, text[named.end() :]) if named else (0, text)
    first = next((line for line in io.StringIO(text, newline=None) if line.strip()), "")
    if not first:
        raise DataError(f"{file}: the table is empty; it needs a header line and one row per image")
    fitting = [s for s in SEPARATORS if key in _first_cells(first, s)]
    separator = named[1] if named else fitting[0] if fitting else max(SEPARATORS, key=first.count)
    rows: list[TableRow] = []
    header: list[str] = []
    repeated = 0
    csv.field_size_limit(LARGEST_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
    line = 1 + skipped
    try:
        for cells in reader:
            start, line = line, reader.line_num + 1 + skipped
            stripped = [cell.strip().strip(_INVISIBLE) for cell in cells]
            if not any(stripped):
                continue
            if not header:
                header = _header(file, stripped)
                continue
            if len(stripped) > len(header) and not any(stripped[len(header) :]):
                stripped = stripped[: len(header)]  # empty columns of a spreadsheet
            if len(stripped) != len(header):
                raise DataError(
                    f"{file}: line {start} has {len(stripped)} cells, the header {len(header)}. Is the file complete? "
                    f'Cells that contain {separator!r} need double quotes around them: "[[1{separator}2]]".'
                )
            if stripped == header:
                repeated += 1
            else:
                rows.append(TableRow(file, start, dict(zip(header, stripped, strict=True))))
    except csv.Error as error:
        where = f"line {line}" if reader.line_num + skipped <= line else f"lines {line} to {reader.line_num + skipped}"
        raise DataError(
            f"{file}: {where}: no row of a table ({error}); is a quote left open? Save it as CSV again"
        ) from None
    if repeated:
        notes.append(f"{file.name}: {repeated} further header line(s) skipped")
    table = Table(file, header, rows, notes)
    table.require([key], "it names the image file of each row; another name is set by data.init_args.image_column")
    if not rows:
        raise NoImagesError(f"{file}: the table has a header but no row")
    return table


def _first_cells(line: str, separator: str) -> list[str]:
    try:
        return [cell.strip().strip(_INVISIBLE) for cell in next(csv.reader([line], delimiter=separator))]
    except csv.Error:  # reading the table reports it
        return []


def _header(file: Path, cells: list[str]) -> list[str]:
    twice = sorted({cell for cell in cells if cell and cells.count(cell) > 1})
    if twice:
        raise DataError(f"{file}: column {plain(list(map(repr, twice)))} appears more than once; rename or remove one")
    return cells


def _text(file: Path, notes: list[str]) -> str:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(
            f"{file} cannot be read ({error.strerror or error}); check data.init_args.root and data.init_args.table"
        ) from error
    encoding = next((name for mark, name in _MARKS.items() if content.startswith(mark)), _unmarked(content))
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError:
        if odd := _mixed(content):
            raise DataError(
                f"{file}: line {listed(odd)} is not UTF-8, but other lines are; save the table as UTF-8"
            ) from None
        text = content.decode("cp1252", errors="replace")
        notes.append(f"{file.name}: not UTF-8; read as Windows-1252. Save it as UTF-8 if names look wrong.")
    if content.startswith((b"PK\x03\x04", b"\xd0\xcf\x11\xe0")):
        raise DataError(f"{file}: not a text table; save an Excel sheet as CSV (UTF-8)")
    if "\x00" in text:
        line = text[: text.index("\x00")].count("\n") + 1
        raise DataError(f"{file}: line {line} has a NUL character, so it is not a text table; save it as CSV (UTF-8)")
    return text


def _mixed(content: bytes) -> list[int]:
    """Return the lines that are not UTF-8 in a file where others are, by its mark or by letters beyond ASCII."""
    lines = content.splitlines()
    odd = [n for n, line in enumerate(lines, 1) if not _is_utf8(line)]
    others = any(not line.isascii() and _is_utf8(line) for line in lines)
    return odd if others or content.startswith(codecs.BOM_UTF8) else []


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def _unmarked(content: bytes) -> str:
    """Return the encoding of a file without mark: UTF-16 if every other byte of its start is 0, else UTF-8."""
    low, high = content[:2000:2].count(0), content[1:2000:2].count(0)
    half = len(content[:2000]) // 2
    return "utf-16-le" if high > 0.8 * half > 0 == low else "utf-16-be" if low > 0.8 * half > 0 == high else "utf-8"
