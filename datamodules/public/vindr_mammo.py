"""VinDr-Mammo: its annotation tables and DICOM files as records."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datamodules.base import MedicalDataModule
from datamodules.images.presets import BreastPreset, Preset
from datamodules.public.layout import (
    clipped,
    disjoint_splits,
    files_below,
    locate,
    number,
    one_hot,
    read_table,
    require_records,
    rows_of,
)
from datamodules.records import Catalogue, ClassTruth, Record, Split, Truth
from mtmedformer.batch import Task
from mtmedformer.errors import ConfigError, DataError

BREASTS, FINDINGS, METADATA = "breast-level_annotations.csv", "finding_annotations.csv", "metadata.csv"
CATEGORIES = (
    "Mass",
    "Suspicious Calcification",
    "Focal Asymmetry",
    "Architectural Distortion",
    "Asymmetry",
    "Skin Thickening",
    "Suspicious Lymph Node",
    "Nipple Retraction",
    "Global Asymmetry",
    "Skin Retraction",
)
BIRADS, DENSITY = ("1", "2", "3", "4", "5"), ("A", "B", "C", "D")
SPLITS: dict[str, Split] = {"training": "train", "test": "test"}


class VinDrMammoDataModule(MedicalDataModule):
    """VinDr-Mammo: 5,000 digital mammography exams with BI-RADS, density and boxes; no masks, no pathology.

    BI-RADS is the readers' assessment, not a diagnosis. Expected below ``root``:

        breast-level_annotations.csv   finding_annotations.csv   metadata.csv (optional: scanners)
        images/<study_id>/<image_id>.dicom

    Source: Nguyen et al., Scientific Data 2023, doi 10.1038/s41597-023-02100-7;
    https://physionet.org/content/vindr-mammo/1.0.0/. Licence: PhysioNet Restricted Health Data License 1.5.0.

    Args:
        root: Folder with the two tables and ``images``.
        categories: Classes of ``lesions`` and ``findings``, as the table spells them; boxes of other categories are
            dropped.
        birads_positive: Lowest BI-RADS of a breast that makes the image suspicious.
        preset: Framing and augmentation; by default cropped to the breast and turned to one side.
        kwargs: Arguments of `MedicalDataModule`.

    Raises:
        DataError: The layout is not found under ``root``, or a table is incomplete (on ``catalogue`` and ``setup``).
    """

    def __init__(
        self,
        root: Path,
        categories: Sequence[str] = CATEGORIES,
        birads_positive: int = 4,
        preset: Preset | None = BreastPreset(),  # noqa: B008  presets have no state
        **kwargs: Any,
    ) -> None:
        super().__init__(preset=preset, **kwargs)
        self.root = Path(root)
        self.categories = categories
        self.birads_positive = birads_positive

    def catalogue(self) -> Catalogue:
        """Read the tables and list the files as records; see ``read_catalogue`` in this module."""
        return read_catalogue(self.root, self.categories, self.birads_positive)


def read_catalogue(root: Path, categories: Sequence[str] = CATEGORIES, birads_positive: int = 4) -> Catalogue:
    """Turn the two annotation tables and ``images/<study>/<image>.dicom`` into records.

    Boxes are clipped to the image (43 coordinates of the published table lie outside). An image whose only row is
    ``No Finding`` is a true negative; one with a finding but no box is *unknown* for ``lesions``. A box with several
    categories takes the first one listed that is among ``categories``; the task ``findings`` carries all of them.

    The arguments are those of `VinDrMammoDataModule`.

    Returns:
        ``birads``, ``suspicion``, ``density``, ``findings`` (several may hold) and ``lesions``. Patient is
        ``study_id``.

    Raises:
        DataError: A table is missing or incomplete, or a row has unknown values.
        ConfigError: An unknown category.
    """
    wrong = [name for name in categories if name not in CATEGORIES]
    if wrong or not categories:
        raise ConfigError(f"categories: {wrong or 'empty'}; valid are {', '.join(CATEGORIES)}")
    folder = locate(root, [BREASTS, FINDINGS, "images"], "VinDr-Mammo")
    files = {file.stem: file for file in files_below(folder / "images", (".dicom", ".dcm", ".png", ".jpg"))}
    scanners = _scanners(folder / METADATA)
    table = folder / BREASTS
    columns = ["study_id", "image_id", "laterality", "view_position", "height", "width", "breast_birads"]
    breasts = rows_of(read_table(table, [*columns, "breast_density", "split"]))
    findings = _findings(folder / FINDINGS)

    records, empty = [], 0
    for row in breasts:
        if row["image_id"] not in files:
            continue
        height, width = (number(row, side, table) or 0.0 for side in ("height", "width"))
        if height <= 0 or width <= 0 or row["split"] not in SPLITS:
            raise DataError(f"{table}: image {row['image_id']} has size {width} × {height} and split {row['split']!r}")
        truth: dict[str, Truth] = {}
        birads = _last(r"([1-5])", row["breast_birads"], table)
        density = _last(r"([A-D])", row["breast_density"], table)
        if birads:
            truth["birads"] = one_hot(BIRADS, birads)
            truth["suspicion"] = one_hot(
                ("negative", "positive"), "positive" if int(birads) >= birads_positive else "negative"
            )
        if density:
            truth["density"] = one_hot(DENSITY, density)
        if row["image_id"] in findings:
            labels_of_image, lost = _finding_truth(findings[row["image_id"]], categories, width, height)
            truth |= labels_of_image
            empty += lost
        records.append(
            Record(
                row["image_id"],
                files[row["image_id"]],
                row["study_id"],
                truth,
                "vindr_mammo",
                view=row["view_position"],
                laterality=row["laterality"],
                split=SPLITS[row["split"]],
                groups={"client": scanners[row["image_id"]]} if row["image_id"] in scanners else {},
                size=(int(height), int(width)),
            )
        )
    require_records(records, "VinDr-Mammo", folder / "images", len(breasts))
    missing = len(breasts) - len(records)
    records, notes = disjoint_splits(records, "VinDr-Mammo")
    if missing:
        notes.append(f"VinDr-Mammo: {missing} of {len(breasts)} listed images are not on disk")
    if empty:
        notes.append(f"VinDr-Mammo: {empty} boxes lie wholly outside their image; 'lesions' is unknown there")
    unknown = sum("lesions" not in r.truth for r in records)
    if unknown:
        notes.append(f"VinDr-Mammo: {unknown} images have no usable finding row; 'lesions' is unknown there")
    tasks = (
        Task("birads", "classification", BIRADS),
        Task("suspicion", "classification", ("negative", "positive")),
        Task("density", "classification", DENSITY),
        Task("findings", "classification", tuple(categories), multi_label=True),
        Task("lesions", "detection", tuple(categories)),
    )
    return Catalogue({task.name: task for task in tasks}, records, notes)


def _last(pattern: str, cell: str, table: Path) -> str | None:
    """Return the letter or digit a cell such as ``BI-RADS 4`` or ``DENSITY C`` ends in; ``None`` for an empty one."""
    if not cell:
        return None
    match = re.search(pattern + "$", cell)
    if match is None:
        raise DataError(f"{table}: {cell!r} is neither a BI-RADS such as 'BI-RADS 4' nor a density such as 'DENSITY C'")
    return match[1]


class _Finding:
    """A row of the finding table: its categories and its box ``(x0, y0, x1, y1)``, if it has one."""

    def __init__(self, row: dict[str, str], table: Path) -> None:
        try:
            self.categories = [str(name) for name in ast.literal_eval(row["finding_categories"])]
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
            cell = row["finding_categories"]
            raise DataError(f"{table}: finding_categories {cell!r} is not a list such as ['Mass']") from error
        unknown = [name for name in self.categories if name not in (*CATEGORIES, "No Finding")]
        if unknown:
            raise DataError(f"{table}: unknown finding categories {unknown}; known are {', '.join(CATEGORIES)}")
        x0, y0, x1, y1 = (number(row, corner, table) for corner in ("xmin", "ymin", "xmax", "ymax"))
        self.box: tuple[float, float, float, float] | None = None
        if x0 is not None and y0 is not None and x1 is not None and y1 is not None:
            self.box = (x0, y0, x1, y1)


def _findings(table: Path) -> dict[str, list[_Finding]]:
    columns = ["image_id", "finding_categories", "xmin", "ymin", "xmax", "ymax"]
    findings: dict[str, list[_Finding]] = {}
    for row in rows_of(read_table(table, columns)):
        findings.setdefault(row["image_id"], []).append(_Finding(row, table))
    return findings


def _finding_truth(
    rows: Sequence[_Finding], categories: Sequence[str], width: float, height: float
) -> tuple[dict[str, Truth], int]:
    present = {name for row in rows for name in row.categories}
    truth: dict[str, Truth] = {"findings": ClassTruth(tuple(float(name in present) for name in categories))}
    boxes, labels = [], []
    for row in rows:
        label = next((categories.index(name) for name in row.categories if name in categories), None)
        if label is None:
            continue
        if row.box is None:
            return truth, 0
        boxes.append(row.box)
        labels.append(label)
    box_truth, lost = clipped(boxes, labels, width, height)
    return (truth, lost) if lost else (truth | {"lesions": box_truth}, 0)


def _scanners(table: Path) -> dict[str, str]:
    """Return the scanner model of each image from ``metadata.csv``, if it is there: a natural split into sites."""
    if not table.is_file():
        return {}
    rows = rows_of(read_table(table, []))
    image = next((name for name in rows[0] if name in {"SOP Instance UID", "image_id"}), None)
    model = next((name for name in rows[0] if "Model Name" in name), None)
    return {row[image]: row[model] for row in rows if row[model]} if image and model else {}
