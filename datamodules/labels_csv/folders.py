"""The label table of a folder without one: each sub-folder is a class, as in torchvision's ``ImageFolder``."""

from __future__ import annotations

import os
import re
from pathlib import Path

from datamodules.images.dicom_parsing import is_dicom
from datamodules.images.pixels import SUFFIXES, is_litter
from datamodules.labels_csv.cells import SPLITS, TableRow
from datamodules.labels_csv.table import Table
from mtmedformer.errors import DataError

COLUMNS = ["image", "label", "split"]
MASKS = re.compile(r"(.*[_ -])?(masks?|segmentations?|annotations?)", re.IGNORECASE)
"""Names of folders whose images are no films."""


def read_folders(root: Path) -> Table:
    """Return a table with ``image``, ``label`` and ``split`` of a folder whose sub-folders are classes.

    Expected is ``<class>/…/<image>``, or ``<split>/<class>/…/<image>`` with splits called ``train``, ``val`` and
    ``test`` (or as in the column ``split`` of a table). Files in folders of masks are counted, not read.

    Raises:
        DataError: There is no image, images lie outside the classes, or there are fewer than two classes.
    """
    rows: list[TableRow] = []
    loose: list[str] = []
    masks = 0
    for folder, names, files in os.walk(root):
        names[:] = sorted(name for name in names if not is_litter(name))
        below = Path(folder).relative_to(root).parts
        for name in sorted(files):
            file = Path(folder, name)
            if is_litter(name) or not _is_image(file):
                continue
            if any(MASKS.fullmatch(part) for part in below):
                masks += 1
                continue
            split = below[0].lower() if below and below[0].lower() in SPLITS else ""
            classes = below[1:] if split else below
            if not classes:
                loose.append(name)
                continue
            cells = dict(zip(COLUMNS, (file.relative_to(root).as_posix(), classes[0], split), strict=True))
            rows.append(TableRow(root, len(rows) + 1, cells))
    found = sorted({row.cells["label"] for row in rows})
    if loose or len(found) < 2:
        held = f"{len(loose)} images lie in no folder of a class, such as {loose[0]!r}" if loose else (
            f"its images lie in {'one folder of a class, ' + found[0] if found else 'no folder'}"
        )  # fmt: skip
        raise DataError(
            f"{root}: no labels.csv (data.init_args.table), and {held}; write a table with one row per image, or put "
            "the images into one folder per class: root/CLASS/image or root/train/CLASS/image"
        )
    notes = [f"{root.name}: {masks} files in folders of masks are not read; a table can name them"] if masks else []
    return Table(root, COLUMNS, rows, notes)


def _is_image(file: Path) -> bool:
    if file.suffix.lower() in SUFFIXES:
        return True
    if file.suffix and not file.suffix[1:].isdigit():  # the last part of a DICOM UID
        return False
    try:
        with file.open("rb") as opened:
            return is_dicom(opened.read(132))
    except OSError:
        return False
