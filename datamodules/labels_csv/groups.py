"""Groups of images by further columns of a label table: sex, scanner, bands of age or of another number."""

from __future__ import annotations

import math
import warnings
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from pydicom import dcmread

from datamodules.images.dicom_parsing import is_dicom
from datamodules.labels_csv.cells import LONGEST_NAME, TableRow, number
from datamodules.labels_csv.numbers import read_number
from datamodules.records import Record
from mtmedformer.errors import ConfigError
from mtmedformer.metrics.subgroups import MOST_VALUES

AGE_BOUNDS = (18.0, 40.0, 60.0, 80.0)
"""Bounds of the bands of a group column called ``age``, where no others are configured."""


HEADER = {"sex": "PatientSex", "age": "PatientAge", "manufacturer": "Manufacturer"}
"""Groups that a DICOM header has, and their attributes."""


class GroupColumns:
    """Columns by which results are reported, images selected and federations split.

    ``sex``, ``age`` and ``manufacturer`` are read from the headers of DICOM files where the table has no such column.

    Args:
        columns: Their names; ``None`` is ``client``, where the table has it.
        bands: Bounds by column of the numbers that are cut into bands.

    Attributes:
        names: Names of all columns.

    Raises:
        ConfigError: Bounds are missing, not in rising order or no finite numbers.
    """

    def __init__(self, columns: Sequence[str] | None, bands: Mapping[str, Sequence[float]]) -> None:
        self._configured = list(dict.fromkeys([*(columns or []), *bands]))
        self.names = [*(["client"] if columns is None else []), *self._configured]
        self.bands = _checked(bands, columns or [])

    def required(self, columns: Collection[str]) -> list[str]:
        """Return the configured columns that a table must have.

        Args:
            columns: Columns of the table.
        """
        return [name for name in self._configured if name in columns or name not in HEADER]

    def of(self, row: TableRow, file: Path) -> dict[str, str]:
        """Return the groups of an image by column, where they are known.

        Args:
            row: Its row.
            file: Its file.

        Raises:
            CellError: A cell is no name.
        """
        texts = {name: row.name(name) for name in self.names}
        if absent := [name for name in self._configured if name in HEADER and name not in row.cells]:
            texts |= read_groups(file, absent)
        return {name: group for name, text in texts.items() if (group := self._group(name, text))}

    def remarks(self, row: TableRow, groups: Mapping[str, str]) -> list[str]:
        """Return what is read as blank: cells of numbers that are none."""
        return [f"{column} that is no number" for column in self.bands if row.text(column) and column not in groups]

    def notes(self, records: Sequence[Record], table: str) -> list[str]:
        """Return a sentence for each column with more numbers than are reported one by one."""
        notes = []
        for column in self.names:
            values = {record.groups[column] for record in records if column in record.groups}
            if len(values) > MOST_VALUES and all(number(value) is not None for value in values):
                notes.append(
                    f"{table}: column {column!r} has {len(values)} different numbers; no results are reported by it. "
                    f"Cut it into bands with data.init_args.group_bands, for example {{{column}: [40, 60]}}"
                )
        return notes

    def _group(self, column: str, text: str) -> str:
        if column not in self.bands or not text:
            return text
        value = read_number(text, years=True)
        return "" if value is None else band(value, self.bands[column])


def read_groups(file: Path, names: Collection[str]) -> dict[str, str]:
    """Return groups of an image from its DICOM header; what is missing or not valid is left out.

    Args:
        file: The image file; one that is not DICOM, or cannot be read, has no groups.
        names: Some of ``HEADER``.
    """
    try:
        with file.open("rb") as stream:
            if not is_dicom(stream.read(132)):
                return {}
        with warnings.catch_warnings():  # warnings of pydicom contain values of the header
            warnings.simplefilter("ignore")
            header = dcmread(file, force=True, stop_before_pixels=True, specific_tags=[HEADER[name] for name in names])
        values = {name: " ".join(str(header.get(HEADER[name]) or "").split()) for name in names}
    except Exception:  # a broken header may raise anything in the parser; decoding the file reports it
        return {}
    if values.get("sex", "M").upper() not in ("F", "M", "O"):
        del values["sex"]
    return {
        name: value for name, value in values.items() if value and len(value) <= LONGEST_NAME and value.isprintable()
    }


def band(value: float, bounds: Sequence[float]) -> str:
    """Return the name of the band of a number: ``under 40``, ``40-59``, ``60 and over`` for bounds of 40 and 60.

    Args:
        value: The number. A bound belongs to the band above it.
        bounds: Bounds in rising order. Between whole bounds a name counts in whole numbers, as ages are.
    """
    place = bisect_right(bounds, value)
    if place == 0:
        return f"under {bounds[0]:g}"
    if place == len(bounds):
        return f"{bounds[-1]:g} and over"
    low, high = bounds[place - 1], bounds[place]
    whole = all(float(bound).is_integer() for bound in bounds)
    return f"{low:g}-{high - 1:g}" if whole and high - low > 1 else f"{low:g} to under {high:g}"


def _checked(bands: Mapping[str, Sequence[float]], columns: Sequence[str]) -> dict[str, list[float]]:
    """Return the bounds by column, with those of a group column called ``age`` where it has none."""
    for column, bounds in bands.items():
        rising = all(low < high for low, high in pairwise(bounds))
        if not bounds or not rising or not all(math.isfinite(bound) for bound in bounds):
            raise ConfigError(
                f"data.init_args.group_bands.{column}={list(bounds)}: give numbers in rising order, as in [40, 60]"
            )
    ages = {column: AGE_BOUNDS for column in columns if column.lower() == "age"}
    return {column: [float(bound) for bound in bounds] for column, bounds in {**ages, **bands}.items()}
