"""Merge the rows of one image."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from datamodules.labels_csv.cells import CellError
from datamodules.records import ClassTruth, MaskTruth, Record, Truth
from mtmedformer.errors import DataError

T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """The rows of one image, merged.

    Attributes:
        line: Its first line in the table.
        record: The record so far.
        errors: Error by task, where the label could not be read.
        remarks: Cells that were read as blank.
    """

    line: int
    record: Record
    errors: dict[str, CellError] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def merge(self, other: Entry, table: Path) -> Entry:
        """Merge two rows of one image.

        Raises:
            DataError: The rows contradict each other.
        """
        a, b = self.record, other.record
        joined = replace(
            a,
            patient=self._agree(other, "patient", a.patient, b.patient, "", table),
            site=self._agree(other, "site", a.site, b.site, "unknown", table),
            view=self._agree(other, "view", a.view, b.view, None, table),
            laterality=self._agree(other, "laterality", a.laterality, b.laterality, None, table),
            split=self._agree(other, "split", a.split, b.split, None, table),
            size=self._agree(other, "size", a.size, b.size, None, table),
            inverted=self._agree(other, "inverted", a.inverted, b.inverted, None, table),
        )
        for group in {**a.groups, **b.groups}:
            self._agree(other, group, a.groups.get(group), b.groups.get(group), None, table)
        errors = {**self.errors, **other.errors}
        truth = {**a.truth, **b.truth}
        for task in a.truth.keys() & b.truth.keys():
            truth[task] = self._together(other, task, a.truth[task], b.truth[task], table)
        known = {task: label for task, label in truth.items() if task not in errors}
        record = replace(joined, truth=known, groups={**a.groups, **b.groups})
        return Entry(self.line, record, errors, [*self.remarks, *other.remarks])

    def _together(self, other: Entry, task: str, a: Truth, b: Truth, table: Path) -> Truth:
        """Merge two labels of a task: a value that is unknown in one is taken from the other."""
        if isinstance(a, ClassTruth) and isinstance(b, ClassTruth):
            pairs = [
                (None if math.isnan(x) else x, None if math.isnan(y) else y)
                for x, y in zip(a.values, b.values, strict=True)
            ]
            values = [self._agree(other, task, x, y, None, table) for x, y in pairs]
            return ClassTruth(tuple(math.nan if v is None else v for v in values))
        if isinstance(a, MaskTruth) and isinstance(b, MaskTruth):
            channels = zip(a.channels, b.channels, strict=True)
            return MaskTruth(tuple(self._agree(other, task, x, y, None, table) for x, y in channels))
        if a != b:
            raise self._contradiction(other, task, table)
        return a

    def _agree(self, other: Entry, what: str, a: T, b: T, blank: T, table: Path) -> T:
        if a == b or b == blank:
            return a
        if a == blank:
            return b
        raise self._contradiction(other, what, table)

    def _contradiction(self, other: Entry, what: str, table: Path) -> DataError:
        return DataError(
            f"{table}: lines {self.line} and {other.line} name the same image, {self.record.file.name}, but contradict "
            f"each other in {what!r}. Remove one, or put all labels of the image into one row (all its boxes in one "
            "list)."
        )
