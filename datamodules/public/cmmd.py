"""CMMD, the Chinese Mammography Database: the TCIA tree and its clinical table as records; no official split."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pydicom
from pydicom.errors import InvalidDicomError

from datamodules.base import MedicalDataModule
from datamodules.images.presets import BreastPreset, Preset
from datamodules.public.layout import files_below, locate, one_hot, read_table, require_records, rows_of, unique_ids
from datamodules.records import Catalogue, ClassTruth, Record, Truth
from mtmedformer.batch import Task
from mtmedformer.errors import DataError

TABLE = "CMMD_clinicaldata_revision"
TASKS = (
    Task("pathology", "classification", ("benign", "malignant")),
    Task("abnormality", "classification", ("mass", "calcification"), multi_label=True),
)
ABNORMALITY = {"mass": {"mass"}, "calcification": {"calcification"}, "both": {"mass", "calcification"}}
PATIENT = re.compile(r"^D[12]-\d{4}$")
VIEWS = {"399162004": "CC", "399368009": "MLO", "R-10242": "CC", "R-10226": "MLO"}
"""View codes of ``ViewCodeSequence``: SNOMED CT, and the older SNOMED RT codes for the same views."""
HEADER = ["PatientID", "ImageLaterality", "Laterality", "ViewPosition", "ViewCodeSequence"]


class CMMDDataModule(MedicalDataModule):
    """CMMD: digital mammograms with a biopsy-proven pathology per breast; no boxes, masks or normal breasts.

    Expected below ``root``, as TCIA's downloader writes it:

        CMMD_clinicaldata_revision.xlsx (or .csv)
        CMMD/D1-0001/…/*.dcm

    Source: Cui et al., The Chinese Mammography Database, TCIA 2021, doi 10.7937/tcia.eqde-4b16.
    Licence: CC BY 4.0.

    Args:
        root: Folder with ``CMMD_clinicaldata_revision.xlsx`` (or ``.csv``) and the DICOM tree.
        keep_unlabelled: Keep the images of breasts without a row, without any label (for prediction).
        preset: Framing and augmentation; by default cropped to the breast and turned to one side.
        kwargs: Arguments of `MedicalDataModule`.

    Raises:
        DataError: The layout is not found under ``root``, or a table is incomplete (on ``catalogue`` and ``setup``).
    """

    negative_of_set = ("benign",)

    def __init__(
        self,
        root: Path,
        keep_unlabelled: bool = False,
        preset: Preset | None = BreastPreset(),  # noqa: B008  presets have no state
        **kwargs: Any,
    ) -> None:
        super().__init__(preset=preset, **kwargs)
        self.root = Path(root)
        self.keep_unlabelled = keep_unlabelled

    def catalogue(self) -> Catalogue:
        """Read the tables and list the files as records; see ``read_catalogue`` in this module."""
        return read_catalogue(self.root, self.keep_unlabelled)


def read_catalogue(root: Path, keep_unlabelled: bool = False) -> Catalogue:
    """Turn the NBIA tree and the clinical table into records; side and view are read from the DICOM headers.

    The table has one row per **breast**; many women were imaged on both sides but have one row. The other breast is
    unknown, never negative.

    The arguments are those of `CMMDDataModule`.

    Returns:
        ``pathology`` and ``abnormality`` (``both`` sets both classes). ``groups["client"]`` is the sub-collection
        D1/D2.

    Raises:
        DataError: The layout is missing, or a row of the table has unknown values.
    """
    folder = locate(root, [f"{TABLE}.xlsx|{TABLE}.csv"], "CMMD")
    labels = _labels(next(f for f in (folder / f"{TABLE}.xlsx", folder / f"{TABLE}.csv") if f.exists()))
    files = files_below(folder, (".dcm",))
    records, sideless, unlabelled = [], 0, 0
    broken: list[str] = []
    for file in files:
        patient, side, view = _header(file, folder, broken)
        truth = labels.get((patient, side or ""), {})
        sideless += side is None
        unlabelled += not truth
        if truth or keep_unlabelled:
            name = "_".join(part for part in (patient, side, view) if part)
            groups = {"client": patient[:2]}
            records.append(Record(name, file, patient, truth, "cmmd", view=view, laterality=side, groups=groups))
    require_records(records, "CMMD", folder, len(labels))
    records = unique_ids(records)
    notes = []
    if unlabelled:
        fate = "kept without labels" if keep_unlabelled else "dropped"
        notes.append(f"CMMD: {unlabelled} of {len(files)} images show a breast without a row in the table; {fate}")
    if sideless:
        notes.append(f"CMMD: {sideless} images have no laterality in their header, so they have no label")
    if broken:
        notes.append(
            f"CMMD: {len(broken)} of those are not readable as DICOM (download them again): {', '.join(broken[:5])}"
        )
    absent = len(labels.keys() - {(r.patient, r.laterality) for r in records})
    if absent:
        notes.append(f"CMMD: {absent} of {len(labels)} labelled breasts have no image on disk")
    return Catalogue({task.name: task for task in TASKS}, records, notes)


def _labels(file: Path) -> dict[tuple[str, str], dict[str, Truth]]:
    """Return the truth by patient and side; of several rows per breast, the worst pathology and every abnormality."""
    by_breast: dict[tuple[str, str], tuple[set[str], set[str]]] = {}
    for row in rows_of(read_table(file, ["ID1", "LeftRight", "abnormality", "classification"])):
        pathology, kind, side = row["classification"].lower(), row["abnormality"].lower(), row["LeftRight"].upper()[:1]
        if pathology not in TASKS[0].classes or kind not in ABNORMALITY or side not in {"L", "R"}:
            raise DataError(
                f"{file}: a row holds LeftRight {row['LeftRight']!r}, abnormality {row['abnormality']!r} and "
                f"classification {row['classification']!r}; expected L/R, {'/'.join(ABNORMALITY)} and Benign/Malignant"
            )
        pathologies, kinds = by_breast.setdefault((row["ID1"], side), (set(), set()))
        pathologies.add(pathology)
        kinds |= ABNORMALITY[kind]
    return {
        key: {
            "pathology": one_hot(TASKS[0].classes, "malignant" if "malignant" in pathologies else "benign"),
            "abnormality": ClassTruth(tuple(float(name in kinds) for name in TASKS[1].classes)),
        }
        for key, (pathologies, kinds) in by_breast.items()
    }


def _header(file: Path, folder: Path, broken: list[str]) -> tuple[str, str | None, str | None]:
    """Return patient (from the folder names, else the header), side and view of a DICOM file; list it if broken."""
    named = next((part for part in file.relative_to(folder).parts if PATIENT.match(part)), None)
    try:
        header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=HEADER)
    except (InvalidDicomError, OSError, ValueError, AttributeError, EOFError, NotImplementedError):
        broken.append(file.name)
        return named or file.stem, None, None
    side = str(header.get("ImageLaterality") or header.get("Laterality") or "").strip().upper()[:1]
    codes = [str(item.get("CodeValue", "")) for item in header.get("ViewCodeSequence") or []]
    view = next((VIEWS[code] for code in codes if code in VIEWS), None) or str(header.get("ViewPosition") or "") or None
    return named or str(header.get("PatientID", "")), side if side in {"L", "R"} else None, view
