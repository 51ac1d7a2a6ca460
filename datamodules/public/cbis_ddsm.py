"""CBIS-DDSM: the TCIA tree or its Kaggle mirror (awsaf49/cbis-ddsm-breast-cancer-image-dataset, JPEG) as records."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from datamodules.base import MedicalDataModule
from datamodules.images.dicom_parsing import reading
from datamodules.images.masks import read_mask
from datamodules.images.presets import BreastPreset, Preset
from datamodules.public.layout import (
    disjoint_splits,
    files_below,
    image_size,
    locate,
    one_hot,
    read_table,
    require_records,
    rows_of,
)
from datamodules.records import BoxTruth, Catalogue, MaskSource, MaskTruth, Record, Split, Truth
from mtmedformer.batch import Task
from mtmedformer.errors import DataError

TYPES = {"mass": "mass", "calc": "calcification"}
CASES = re.compile(r"^(Mass|Calc)-(Training|Test)_(P_\d+)_(LEFT|RIGHT)_(CC|MLO)(?:_(\d+))?$")
BIRADS, DENSITY = ("1", "2", "3", "4", "5"), ("A", "B", "C", "D")
PATHOLOGIES = ("BENIGN_WITHOUT_CALLBACK", "BENIGN", "MALIGNANT")
COLUMNS = [
    "patient_id",
    "left or right breast",
    "image view",
    "abnormality id",
    "assessment",
    "pathology",
    "image file path",
    "ROI mask file path",
]


@dataclass
class LesionRow:
    """One lesion: a row of a case table."""

    kind: str
    roi: str
    pathology: str
    assessment: str


@dataclass
class Film:
    """A mammogram and its lesions of one type, from one case table."""

    name: str
    kind: str
    split: Split
    patient: str
    side: str
    view: str
    density: set[str] = field(default_factory=set)
    lesions: list[LesionRow] = field(default_factory=list)


class CBISDDSMDataModule(MedicalDataModule):
    """CBIS-DDSM: scanned film mammograms with a contour, a pathology and a BI-RADS per lesion; no normal images.

    Expected below ``root``, as TCIA's downloader writes it (the Kaggle mirror's ``csv`` and ``jpeg`` folders too):

        mass_case_description_train_set.csv   calc_case_description_test_set.csv   (and the other two)
        Mass-Training_P_00001_LEFT_CC/…/*.dcm          a mammogram
        Mass-Training_P_00001_LEFT_CC_1/…/*.dcm        mask and cropped image of its lesion 1

    Source: Lee et al., Scientific Data 2017, doi 10.1038/sdata.2017.177; TCIA, doi 10.7937/K9/TCIA.2016.7O02S9CY.
    Licence: CC BY 3.0.

    Args:
        root: Folder with the four ``*_case_description_*_set.csv`` (there or in ``csv``) and the images.
        lesion_types: The tables whose films are used. With ``both``, detection is two tasks, ``masses`` and
            ``calcifications``, because in one task a film would have one class known and the other unknown; else one
            task, ``lesions``.
        benign_without_callback: Label of ``BENIGN_WITHOUT_CALLBACK`` lesions: benign, a class of its own, or unknown.
        lesion_classes: Classes of the boxes: the type of lesion, or each lesion's own pathology.
        preset: Framing and augmentation; by default cropped to the breast and turned to one side.
        kwargs: Arguments of `MedicalDataModule`.

    Raises:
        DataError: The layout is not found under ``root``, or a table is incomplete (on ``catalogue`` and ``setup``).
    """

    negative_of_set = ("benign",)

    def __init__(
        self,
        root: Path,
        lesion_types: Literal["mass", "calc", "both"] = "both",
        benign_without_callback: Literal["benign", "separate", "unknown"] = "benign",
        lesion_classes: Literal["type", "pathology"] = "type",
        preset: Preset | None = BreastPreset(),  # noqa: B008  presets have no state
        **kwargs: Any,
    ) -> None:
        super().__init__(preset=preset, **kwargs)
        self.root = Path(root)
        self.lesion_types = lesion_types
        self.benign_without_callback = benign_without_callback
        self.lesion_classes = lesion_classes

    def catalogue(self) -> Catalogue:
        """Read the tables and list the files as records; see ``read_catalogue`` in this module."""
        return read_catalogue(
            self.root, self.lesion_types, self.benign_without_callback, self.lesion_classes, self.official_splits
        )


def read_catalogue(
    root: Path,
    lesion_types: Literal["mass", "calc", "both"] = "both",
    benign_without_callback: Literal["benign", "separate", "unknown"] = "benign",
    lesion_classes: Literal["type", "pathology"] = "type",
    official: bool = True,
) -> Catalogue:
    """Turn the case tables and the TCIA tree (or the JPEG mirror) into records, one per mammogram and lesion type.

    The paths in the tables do not match the files and in places swap mask and crop. Files are therefore found by the
    first part of the path (``Mass-Training_P_00001_LEFT_CC``, lesions with ``_1`` appended), and the mask is recognised
    by content: it has the size of the mammogram, or at most two values.

    Only the lesions of a table are known: on a film of the mass table without a row in the calcification table,
    calcifications are *unknown*. A film whose mask is not found has unknown boxes and masks. There are no true
    negatives.

    The arguments are those of `CBISDDSMDataModule`; without ``official`` splits no image is dropped.

    Returns:
        ``pathology`` and ``birads`` (the worst of the breast's view over all tables read; assessment 0, incomplete, is
        unknown), ``density``, the detection task(s) and ``lesion``. Patient is ``P_…``: DICOM's own PatientID is a
        view.

    Raises:
        DataError: Tables or images are missing, or a row has unknown values.
    """
    chosen = [kind for kind in TYPES if lesion_types in (kind, "both")]
    name = "{}_case_description_*_set.csv"
    folder = locate(root, [f"{name}|csv/{name}".replace("{}", kind) for kind in chosen], "CBIS-DDSM")
    tables = sorted(file for place in (folder, folder / "csv") for file in place.glob(name.format("*")))
    films = [film for table in tables for film in read_films(table)]
    index = _index(root, folder)
    classes = tuple(TYPES[kind] for kind in chosen)
    views = _views(films)

    records, absent, unlocated, resized = [], 0, 0, 0
    for film in films:
        if film.kind not in chosen:
            continue
        files = index.get(film.name, [])
        if not files:
            absent += 1
            continue
        image = max(files, key=lambda file: (image_size(file) or (0, 0), file.name))
        truth = _labels(views[film.patient, film.side, film.view], benign_without_callback)
        masks = [find_mask(index.get(lesion.roi, []), image_size(image)) for lesion in film.lesions]
        resized += sum(mask is not None and image_size(mask) != image_size(image) for mask in masks)
        located = _lesion_truth(film, masks, classes, lesion_classes, benign_without_callback)
        unlocated += not located
        truth |= located
        records.append(
            Record(
                film.name,
                image,
                film.patient,
                truth,
                "cbis_ddsm",
                view=film.view,
                laterality=film.side,
                split=film.split,
                groups={"client": TYPES[film.kind]},
            )
        )
    require_records(records, "CBIS-DDSM", folder, len(films))
    records, notes = disjoint_splits(records, "CBIS-DDSM") if official else (records, [])
    if absent:
        notes.append(f"CBIS-DDSM: {absent} mammograms of the case tables are not on disk")
    if unlocated:
        notes.append(f"CBIS-DDSM: {unlocated} mammograms lack the mask of a lesion; boxes and masks are unknown there")
    if resized:
        notes.append(f"CBIS-DDSM: {resized} masks differ in size from their mammogram and are resized to it (nearest)")
    tasks = _tasks(classes, lesion_classes, benign_without_callback)
    return Catalogue({task.name: task for task in tasks}, records, notes)


def read_films(table: Path) -> list[Film]:
    r"""Group the rows of a case table by mammogram.

    Handles what the published tables hold: paths that end in ``"\n"``, ``breast density`` beside ``breast_density``.
    """
    films: dict[str, Film] = {}
    for row in rows_of(read_table(table, COLUMNS)):
        name = row["image file path"].split("/")[0]
        roi = row["ROI mask file path"].split("/")[0]
        match = CASES.match(name)
        if match is None or row["pathology"] not in PATHOLOGIES or row["assessment"] not in {"0", *BIRADS}:
            raise DataError(
                f"{table}: a row names image {name!r}, pathology {row['pathology']!r} and assessment "
                f"{row['assessment']!r}; expected e.g. Mass-Training_P_00001_LEFT_CC, {'/'.join(PATHOLOGIES)} and 0–5"
            )
        kind, part, patient, side, view, _ = match.groups()
        split: Split = "train" if part == "Training" else "test"
        film = films.setdefault(name, Film(name, kind.lower(), split, patient, side[0], view))
        film.density.add(row.get("breast_density", row.get("breast density", "")))
        roi = roi if CASES.match(roi) else f"{name}_{row['abnormality id']}"
        film.lesions.append(LesionRow(film.kind, roi, row["pathology"], row["assessment"]))
    return list(films.values())


@dataclass
class _View:
    lesions: list[LesionRow] = field(default_factory=list)
    density: set[str] = field(default_factory=set)


def _views(films: Sequence[Film]) -> dict[tuple[str, str, str], _View]:
    """Collect the lesions of each patient's view over all tables, since labels of an image cover both types."""
    views: dict[tuple[str, str, str], _View] = {}
    for film in films:
        view = views.setdefault((film.patient, film.side, film.view), _View())
        view.lesions += film.lesions
        view.density |= film.density
    return views


def _labels(view: _View, without_callback: str) -> dict[str, Truth]:
    truth: dict[str, Truth] = {}
    worst = max((lesion.pathology for lesion in view.lesions), key=PATHOLOGIES.index)
    unknown = without_callback == "unknown" and worst != "MALIGNANT"
    if not (unknown and any(lesion.pathology == PATHOLOGIES[0] for lesion in view.lesions)):
        merged = "BENIGN" if worst == PATHOLOGIES[0] and without_callback == "benign" else worst
        truth["pathology"] = one_hot(_pathologies(without_callback), merged.lower())
    grades = [lesion.assessment for lesion in view.lesions]
    if "0" not in grades or "5" in grades:
        truth["birads"] = one_hot(BIRADS, max(grades))
    if len(view.density) == 1 and (density := next(iter(view.density))) in {"1", "2", "3", "4"}:
        truth["density"] = one_hot(DENSITY, DENSITY[int(density) - 1])
    return truth


def _lesion_truth(
    film: Film, masks: Sequence[Path | None], classes: tuple[str, ...], lesion_classes: str, without_callback: str
) -> dict[str, Truth]:
    """Return boxes and masks of a film, nothing where a lesion's mask is missing.

    The mask channel of the type that the film's table does not list is not annotated.
    """
    sources = tuple(MaskSource(mask) for mask in masks if mask is not None)
    if len(sources) < len(masks):
        return {}
    name = TYPES[film.kind]
    united = replace(sources[0], also=sources[1:])
    truth: dict[str, Truth] = {"lesion": MaskTruth(tuple(united if each == name else None for each in classes))}
    labels = [_pathology(lesion.pathology, without_callback) for lesion in film.lesions]
    if lesion_classes == "type":
        truth[_detection(name, classes)] = BoxTruth(masks=sources, mask_labels=(0,) * len(sources))
    elif None not in labels:
        known = tuple(_pathologies(without_callback).index(label) for label in labels if label)
        truth[_detection(name, classes)] = BoxTruth(masks=sources, mask_labels=known)
    return truth


def _detection(name: str, classes: tuple[str, ...]) -> str:
    return {"mass": "masses", "calcification": "calcifications"}[name] if len(classes) == 2 else "lesions"


def _tasks(classes: tuple[str, ...], lesion_classes: str, without_callback: str) -> list[Task]:
    pathologies = _pathologies(without_callback)
    boxes = {name: (name,) if lesion_classes == "type" else pathologies for name in classes}
    return [
        Task("pathology", "classification", pathologies),
        Task("birads", "classification", BIRADS),
        Task("density", "classification", DENSITY),
        *(Task(_detection(name, classes), "detection", boxes[name]) for name in classes),
        Task("lesion", "segmentation", classes, multi_label=True),
    ]


def _pathologies(without_callback: str) -> tuple[str, ...]:
    names = tuple(name.lower() for name in PATHOLOGIES)
    return names if without_callback == "separate" else names[1:]


def _pathology(name: str, without_callback: str) -> str | None:
    """Return the class a pathology of the table counts as, ``None`` for unknown."""
    if name != PATHOLOGIES[0] or without_callback == "separate":
        return name.lower()
    return "benign" if without_callback == "benign" else None


def find_mask(files: Sequence[Path], size: tuple[int, int] | None) -> Path | None:
    """Return the mask among a lesion's files (the other file is the cropped image), or ``None``.

    The mask has the mammogram's size. Only where no file or several have it are the pixels looked at: the mask then is
    the one of two grey levels, the larger if there are several.
    """
    files = [file for file in files if image_size(file)]
    full = [file for file in files if image_size(file) == size]
    if len(full) == 1 or size is None:
        return full[0] if full else None
    binary = [file for file in full or files if _is_binary(file)]
    return max(binary, key=lambda file: (image_size(file) or (0, 0), file.name), default=None)


def _is_binary(file: Path) -> bool:
    """Return whether an image holds one or two grey levels, give or take what JPEG leaves beside edges."""
    if file.suffix.lower() == ".dcm":
        values = read_mask(file).astype(np.int64)
    else:  # read_mask would make any JPEG binary
        with reading(file, "a mask"), Image.open(file) as image:
            values = np.asarray(image.convert("L"), np.int64)
    low, high = int(values.min()), int(values.max())
    slack = 0.1 * (high - low)
    return bool(((values - low <= slack) | (high - values <= slack)).mean() > 0.995)


def _index(root: Path, folder: Path) -> dict[str, list[Path]]:
    """Return the image files by DICOM PatientID (a view, or a view and a lesion), from folders or the mirror's."""
    table = folder / "csv" / "dicom_info.csv"
    if table.is_file():
        index: dict[str, list[Path]] = {}
        for row in rows_of(read_table(table, ["PatientID", "image_path"])):
            file = folder.joinpath(*Path(row["image_path"]).parts[-3:])
            if file.is_file():
                index.setdefault(row["PatientID"], []).append(file)
        return {name: sorted(files) for name, files in index.items()}
    first = locate(root, ["Mass-T*_P_*|Calc-T*_P_*"], "CBIS-DDSM images")
    return {case.name: files_below(case, (".dcm",)) for case in sorted(first.iterdir()) if CASES.match(case.name)}
