"""RSNA Pneumonia Detection Challenge (Kaggle, 2018): the challenge's tables and DICOM files as records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datamodules.base import MedicalDataModule
from datamodules.public.layout import files_below, locate, number, one_hot, read_table, require_records, rows_of
from datamodules.records import BoxTruth, Catalogue, Record, Truth
from mtmedformer.batch import Task
from mtmedformer.errors import DataError

LABELS, CLASS_INFO, IMAGES = "stage_2_train_labels.csv", "stage_2_detailed_class_info.csv", "stage_2_train_images"
MAPPING = "pneumonia-challenge-dataset-mappings_2018.json"
PATHOLOGY = {
    "Normal": "normal",
    "No Lung Opacity / Not Normal": "not_normal_no_opacity",
    "Lung Opacity": "lung_opacity",
}
TASKS = (
    Task("pneumonia", "classification", ("absent", "present")),
    Task("pathology", "classification", tuple(PATHOLOGY.values())),
    Task("lesions", "detection", ("lung_opacity",)),
)
SIDE = 1024.0


class RSNAPneumoniaDataModule(MedicalDataModule):
    """RSNA Pneumonia Detection Challenge 2018: chest radiographs with boxes around lung opacities.

    Expected below ``root``:

        stage_2_train_labels.csv (or .zip)              boxes in pixels
        stage_2_train_images/<patientId>.dcm
        stage_2_detailed_class_info.csv                 for the task ``pathology`` (optional)
        pneumonia-challenge-dataset-mappings_2018.json  from rsna.org, for the patients (without it patients leak)

    Source: Shih et al., Radiology: Artificial Intelligence 2019, doi 10.1148/ryai.2019180041;
    https://www.kaggle.com/c/rsna-pneumonia-detection-challenge. Licence: the rules of the challenge; see that page.

    Args:
        root: Folder with ``stage_2_train_labels.csv`` and ``stage_2_train_images``.
        mapping: RSNA's JSON file that maps its image names to NIH's; ``null`` looks for it in ``root`` and beside it.
        kwargs: Arguments of `MedicalDataModule`.

    Raises:
        DataError: The layout is not found under ``root``, or a table is incomplete (on ``catalogue`` and ``setup``).
    """

    def __init__(
        self,
        root: Path,
        mapping: Path | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.root = Path(root)
        self.mapping = mapping

    def catalogue(self) -> Catalogue:
        """Read the tables and list the files as records; see ``read_catalogue`` in this module."""
        return read_catalogue(self.root, self.mapping)


def read_catalogue(root: Path, mapping: Path | None = None) -> Catalogue:
    """Turn the Kaggle layout into records: one per image of ``stage_2_train_images`` (the test images have no labels).

    The arguments are those of `RSNAPneumoniaDataModule`.

    Returns:
        ``pneumonia`` (the challenge's ``Target``), ``pathology`` (the three classes of the detailed class table,
        unknown without it) and ``lesions``; ``Target=0`` is a true negative of the boxes.

    Raises:
        DataError: A file is missing or incomplete, or a row contradicts itself.
    """
    folder = locate(root, [f"{LABELS}|{LABELS}.zip", IMAGES], "RSNA pneumonia")
    notes: list[str] = []
    boxes = read_boxes(next(f for f in (folder / LABELS, folder / f"{LABELS}.zip") if f.exists()))
    classes = _pathology(folder / CLASS_INFO, notes)
    nih = _patients(folder, mapping, notes)
    files = {file.stem: file for file in files_below(folder / IMAGES, (".dcm", ".png", ".jpg"))}

    records = []
    for name, own_boxes in boxes.items():
        if name not in files:
            continue
        truth: dict[str, Truth] = {
            "pneumonia": one_hot(TASKS[0].classes, "present" if own_boxes else "absent"),
            "lesions": BoxTruth(tuple(own_boxes), (0,) * len(own_boxes)),
        }
        if name in classes:
            truth["pathology"] = one_hot(TASKS[1].classes, classes[name])
        records.append(
            Record(name, files[name], nih.get(name, name), truth, "rsna_pneumonia", size=(int(SIDE), int(SIDE)))
        )
    require_records(records, "RSNA pneumonia", folder / IMAGES, len(boxes))
    if len(records) < len(boxes):
        notes.append(f"RSNA pneumonia: {len(boxes) - len(records)} of {len(boxes)} labelled images are not on disk")
    lost = len({r.id for r in records} - nih.keys()) if nih else 0
    if lost:
        notes.append(f"RSNA pneumonia: {lost} images are not in the NIH mapping; each counts as a patient of its own")
    return Catalogue({task.name: task for task in TASKS}, records, notes)


def read_boxes(file: Path) -> dict[str, list[tuple[float, float, float, float]]]:
    """Read the label table: per image its boxes ``(x0, y0, x1, y1)``, an empty list where ``Target`` is 0.

    The table has one row per box (``x, y`` is its top-left corner) and rows with ``Target=0`` without box; it may be a
    ``.zip``.
    """
    boxes: dict[str, list[tuple[float, float, float, float]]] = {}
    for row in rows_of(read_table(file, ["patientId", "x", "y", "width", "height", "Target"])):
        own_boxes = boxes.setdefault(row["patientId"], [])
        cells = [number(row, column, file) for column in ("x", "y", "width", "height")]
        if row["Target"] not in {"0", "1"} or (row["Target"] == "1") != (None not in cells):
            raise DataError(
                f"{file}: image {row['patientId']} has Target {row['Target']!r} and box {cells}; Target is 1 with a "
                "box and 0 without"
            )
        if row["Target"] == "1":
            x, y, width, height = (float(cell or 0.0) for cell in cells)
            if width <= 0 or height <= 0:
                raise DataError(f"{file}: image {row['patientId']} has a box of {width} × {height} pixels")
            own_boxes.append((x, y, min(x + width, SIDE), min(y + height, SIDE)))
    return boxes


def _pathology(file: Path, notes: list[str]) -> dict[str, str]:
    if not file.exists():
        notes.append(f"RSNA pneumonia: {file.name} is absent, so the task 'pathology' is unknown in every image")
        return {}
    rows = rows_of(read_table(file, ["patientId", "class"]))
    unknown = sorted({row["class"] for row in rows} - PATHOLOGY.keys())
    if unknown:
        raise DataError(f"{file}: column 'class' holds {unknown}; known are {sorted(PATHOLOGY)}")
    return {row["patientId"]: PATHOLOGY[row["class"]] for row in rows}


def _patients(folder: Path, mapping: Path | None, notes: list[str]) -> dict[str, str]:
    """Return the NIH patient of each image: the images' own ``patientId`` is an image id, not a patient's."""
    if mapping is not None and not mapping.is_file():
        raise DataError(f"mapping={mapping} is not a file; expected RSNA's {MAPPING}")
    file = mapping or next((f for f in (folder / MAPPING, folder.parent / MAPPING) if f.is_file()), None)
    if file is None:
        notes.append(
            f"RSNA pneumonia: PATIENTS LEAK BETWEEN SPLITS. {MAPPING} (from rsna.org) is absent, so every image counts "
            "as a patient of its own. The 26,684 images come from 11,439 NIH patients, and a random 80/20 split "
            "by image shares 71 % of its test images' patients with train. Put the file under root or set `mapping`."
        )
        return {}
    try:
        pairs = json.loads(file.read_text(encoding="utf-8"))
        return {pair["subset_img_id"]: "nih" + pair["img_id"].split("_")[0] for pair in pairs}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file} is not RSNA's mapping: expected a JSON list of objects with 'subset_img_id' and 'img_id' "
            f"({type(error).__name__})"
        ) from error
