"""Find the layout of a public data set under a root, read its label tables, and split its records."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pandas as pd
import pydicom
from PIL import Image

from datamodules.images.dicom_parsing import reading
from datamodules.images.pixels import is_litter
from datamodules.records import BoxTruth, ClassTruth, Record
from mtmedformer.errors import DataError

log = logging.getLogger(__name__)

DEPTH = 3
"""Number of folder levels below the root that are searched."""

MOST_FOLDERS = 20_000
"""Number of folders after which the search is given up (the root may be a home folder)."""


def locate(root: Path, expected: Sequence[str], dataset: str) -> Path:
    """Find the folder at or below ``root`` that contains every expected entry.

    Downloads put a data set into further folders (``archive/chest_xray/chest_xray``). The root is therefore searched
    breadth-first, ``DEPTH`` levels deep; the first match in level and name order is returned.

    Args:
        root: Folder given by the user.
        expected: Paths or glob patterns relative to the folder; ``a|b`` accepts either.
        dataset: Name of the data set, for the error.

    Raises:
        DataError: The root is missing, or no folder has every entry; the error names the closest folder.
    """
    if not root.is_dir():
        raise DataError(f"{dataset}: root {root} is not a folder; expected {_listing(expected)} under root")
    closest, most, visited = root, -1, 0
    level = [root]
    for _ in range(DEPTH + 1):
        for folder in level[: MOST_FOLDERS - visited]:
            matches = sum(_has(folder, entry) for entry in expected)
            if matches == len(expected):
                return folder
            if matches > most:
                closest, most = folder, matches
        visited += len(level)
        if visited >= MOST_FOLDERS:
            break
        level = [Path(e.path) for folder in level for e in _entries(folder) if e.is_dir()]
    missing = [entry for entry in expected if not _has(closest, entry)]
    content = ", ".join(sorted(e.name for e in _entries(closest))[:8]) or "nothing"
    raise DataError(
        f"{dataset}: not found: expected {_listing(expected)} under root {root}; closest is {closest}, which lacks "
        f"{_listing(missing)} and holds {content}"
    )


def _listing(entries: Sequence[str]) -> str:
    return ", ".join(entry.replace("|", " or ") for entry in entries)


def _has(folder: Path, entry: str) -> bool:
    return any(next(folder.glob(choice), None) is not None for choice in entry.split("|"))


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    if not os.access(folder, os.R_OK | os.X_OK):
        log.warning("%s cannot be read and was not searched; check its permissions", folder)
        return []
    with os.scandir(folder) as entries:
        return sorted((e for e in entries if not is_litter(e.name)), key=lambda e: e.name)


def files_below(folder: Path, suffixes: Iterable[str]) -> list[Path]:
    """Return every file below a folder with one of the suffixes (any case), without system files, in path order."""
    wanted = tuple(suffix.lower() for suffix in suffixes)
    matches = []
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not is_litter(name))
        matches += [Path(where, name) for name in names if name.lower().endswith(wanted) and not is_litter(name)]
    return sorted(matches)


@lru_cache(maxsize=65536)
def image_size(file: Path) -> tuple[int, int] | None:
    """Return (height, width) in pixels from an image file's header, ``None`` if the file cannot be read."""
    try:
        with reading(file, "an image"):
            if file.suffix.lower() == ".dcm":
                header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=["Rows", "Columns"])
                return int(header.Rows), int(header.Columns)
            with Image.open(file) as image:
                return image.height, image.width
    except DataError as error:
        log.warning("%s; the image is not used", error)
        return None


def read_table(file: Path, columns: Sequence[str], sep: str = ",") -> pd.DataFrame:
    r"""Read a label table as stripped text; blanks and ``NaN`` are not interpreted.

    Args:
        file: CSV (optionally zipped) or Excel.
        columns: Required columns; header cells are stripped before they are compared.
        sep: Separator of a CSV.

    Returns:
        One row per line; every cell is a string without surrounding white space (``"x.dcm\n"`` becomes ``"x.dcm"``).

    Raises:
        DataError: The file is empty, cannot be parsed or lacks a column.
    """
    try:
        if file.suffix.lower() in {".xlsx", ".xls"}:
            table = pd.read_excel(file, dtype=str, keep_default_na=False)
        else:
            table = pd.read_csv(file, sep=sep, dtype=str, keep_default_na=False, index_col=False, encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"label table {file} does not exist; expected the columns {', '.join(columns)}") from error
    except Exception as error:  # pandas, openpyxl and zipfile raise many kinds on a broken file, none a common base
        raise DataError(
            f"label table {file} cannot be read ({type(error).__name__}); check whether it is complete"
        ) from error
    table.columns = pd.Index([str(name).strip() for name in table.columns])
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise DataError(
            f"label table {file} lacks the column(s) {', '.join(missing)}; it has {', '.join(table.columns)}"
        )
    if table.empty:
        raise DataError(f"label table {file} has no rows")
    stripped: pd.DataFrame = table.apply(lambda cells: cells.astype(str).str.strip())
    return stripped


def rows_of(table: pd.DataFrame) -> list[dict[str, str]]:
    """Return the rows of a table from ``read_table`` as dictionaries, in order."""
    return [{str(name): str(cell) for name, cell in row.items()} for row in table.to_dict("records")]


def number(row: Mapping[str, str], column: str, file: Path) -> float | None:
    """Return a cell as a finite number, ``None`` where it is empty or ``nan``.

    Raises:
        DataError: The cell holds anything else.
    """
    cell = row[column]
    if cell.lower() in {"", "nan", "none", "na"}:
        return None
    try:
        value = float(cell)
    except ValueError:
        value = float("nan")
    if not -1e9 < value < 1e9:
        raise DataError(f"{file}: column {column!r} holds {cell!r}, which is not a number")
    return value


def one_hot(classes: Sequence[str], name: str) -> ClassTruth:
    """Return the label of a task of which exactly one class holds."""
    return ClassTruth(tuple(float(name == each) for each in classes))


def clipped(
    boxes: Sequence[tuple[float, float, float, float]], labels: Sequence[int], width: float, height: float
) -> tuple[BoxTruth, int]:
    """Clip boxes to an image of ``width`` × ``height`` pixels.

    Returns:
        The boxes with an area after clipping, and the number of boxes without.
    """
    kept, kept_labels = [], []
    for (x0, y0, x1, y1), label in zip(boxes, labels, strict=True):
        box = (max(x0, 0.0), max(y0, 0.0), min(x1, width), min(y1, height))
        if box[2] > box[0] and box[3] > box[1]:
            kept.append(box)
            kept_labels.append(label)
    return BoxTruth(tuple(kept), tuple(kept_labels)), len(boxes) - len(kept)


def disjoint_splits(records: Sequence[Record], dataset: str) -> tuple[list[Record], list[str]]:
    """Remove patients of the official test split from train and val, and patients of val from train.

    The test split stays as published, so results remain comparable; no patient is in two splits.

    Returns:
        The kept records in order, and a note for the user if some were dropped.
    """
    members = {split: {r.patient for r in records if r.split == split} for split in ("val", "test")}
    shut = {"train": members["val"] | members["test"], "val": members["test"], "test": set(), None: set()}
    kept = [r for r in records if r.patient not in shut[r.split]]
    if len(kept) == len(records):
        return kept, []
    lost = [r for r in records if r.patient in shut[r.split]]
    return kept, [
        f"{dataset}: {len(lost)} images of {len({r.patient for r in lost})} patients were dropped from train or val, "
        "because the official val or test split has other images of the same patients"
    ]


def unique_ids(records: Sequence[Record]) -> list[Record]:
    """Append ``_2``, ``_3`` … to repeated ids, in order."""
    seen: dict[str, int] = {}
    result = []
    for record in records:
        count = seen[record.id] = seen.get(record.id, 0) + 1
        result.append(record if count == 1 else replace(record, id=f"{record.id}_{count}"))
    return result


def require_records(records: Sequence[Record], dataset: str, root: Path, listed: int) -> None:
    """Raise a ``DataError`` if no image of a table was found."""
    if not records:
        raise DataError(f"{dataset}: none of the {listed} labelled images was found under root {root}")
