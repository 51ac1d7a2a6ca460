"""How the cells of a row become the number or the grade of a regression task."""

from __future__ import annotations

import re

from datamodules.labels_csv.cells import CellError, TableRow, flag_of, may_be_labelled, number
from datamodules.labels_csv.classes import FoundClasses, named_index
from datamodules.labels_csv.columns import ValueColumns
from datamodules.labels_csv.table import Table
from datamodules.records import ValueTruth
from mtmedformer.batch import Task
from mtmedformer.errors import DataError

YEARS = frozenset({"year", "years", "y", "yr", "yrs", "a"})
"""Units with which ages as DICOM writes them are read, in lower case."""

_AGE = re.compile(r"(\d{3})([DWMY])", re.ASCII)
_PER_YEAR = {"D": 365.25, "W": 365.25 / 7, "M": 12.0, "Y": 1.0}


def read_number(text: str, years: bool) -> float | None:
    """Return the number in a text; with ``years`` also an age as DICOM writes it; ``None`` for anything else."""
    value, age = number(text), _AGE.fullmatch(text.upper())
    return int(age[1]) / _PER_YEAR[age[2]] if value is None and age and years else value


class NumberReader:
    """One column of numbers."""

    found: FoundClasses | None = None

    def __init__(self, name: str, spec: ValueColumns, flag: str | None, table: Table) -> None:
        self.column, self.flag, self.unit = spec.column, flag, spec.unit
        self.range = None if spec.range is None else (float(spec.range[0]), float(spec.range[1]))
        self.notes: list[str] = []
        values, refused = [], []
        for row in table.rows:
            if may_be_labelled(row, flag) and row.text(self.column):
                try:
                    values.append(self._number(row))
                except CellError as error:
                    refused.append(error)
        if refused and not values:
            raise DataError(f"{table.file}: no number of {name!r} can be read. {refused[0].detail}")
        observed = (min(values), max(values)) if values else None
        self.task = Task(name, "regression", (), unit=spec.unit, range=self.range or observed)

    def read(self, row: TableRow) -> ValueTruth | None:
        """Return the number; a blank cell is unknown."""
        known = flag_of(row, self.flag)
        if known is False or not row.text(self.column):
            if known:
                raise row.error(self.column, "labelled but no number given", f"give it or set {self.flag} to 0")
            return None
        return ValueTruth(self._number(row))

    def _number(self, row: TableRow) -> float:
        text = row.text(self.column)
        value = read_number(text, self.unit.lower() in YEARS)
        if value is None:
            raise row.error(self.column, "cell is no number", "write digits and a decimal point, or leave it blank")
        if self.range and not self.range[0] <= value <= self.range[1]:
            low, high = self.range
            fix = f"the range of the task is {low:g} to {high:g}; correct it, or leave it blank if it is not known"
            raise row.error(self.column, "number outside the range", fix)
        return value


class GradeReader:
    """One column with the names of grades in order."""

    found: FoundClasses | None = None

    def __init__(self, name: str, spec: ValueColumns, flag: str | None, table: Table) -> None:
        self.column, self.flag = spec.column, flag
        self.notes: list[str] = []
        self.task = Task(name, "regression", tuple(spec.classes or ()))

    def read(self, row: TableRow) -> ValueTruth | None:
        """Return the index of the grade; a blank cell is unknown."""
        index = named_index(self.task, row, self.column, self.flag, "grade")
        return None if index is None else ValueTruth(float(index))
