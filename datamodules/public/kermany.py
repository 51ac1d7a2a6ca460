"""Kermany's paediatric chest radiographs: the Mendeley archive or its Kaggle mirror as records."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from datamodules.base import MedicalDataModule
from datamodules.public.layout import disjoint_splits, files_below, locate, one_hot, require_records, unique_ids
from datamodules.records import Catalogue, Record, Split, Truth
from mtmedformer.batch import Task

TASKS = (
    Task("pneumonia", "classification", ("absent", "present")),
    Task("pathology", "classification", ("normal", "bacterial_pneumonia", "viral_pneumonia")),
)
MENDELEY = re.compile(r"^(NORMAL|BACTERIA|VIRUS)-(\d+)-\d+$", re.IGNORECASE)
PERSON = re.compile(r"^(person\d+)_(virus|bacteria)_\d+$", re.IGNORECASE)
NORMAL = re.compile(r"(IM-\d+)-\d+", re.IGNORECASE)
CAUSES = {"bacteria": "bacterial_pneumonia", "virus": "viral_pneumonia"}


class KermanyDataModule(MedicalDataModule):
    """Kermany's paediatric chest radiographs: normal, bacterial or viral pneumonia; no boxes, no masks.

    Expected below ``root``, from Mendeley Data or the Kaggle mirror, whose file names differ:

        train/{NORMAL,PNEUMONIA}/*.jpeg   test/{NORMAL,PNEUMONIA}/*.jpeg   val/… (mirror only)

    Source: Kermany et al., Cell 2018, doi 10.1016/j.cell.2018.02.010; Mendeley Data, doi 10.17632/rscbjbr9sj.3;
    https://www.kaggle.com/datasets/paultimothymooney/chest-xray-pneumonia. Licence: CC BY 4.0.

    Args:
        root: Folder with ``train`` and ``test`` (``chest_xray``), or a folder that contains it.
        numbering: Whether ``person7`` of train and of test are one child (``shared``, safe: the train images are
            dropped) or numbers start again in each split (``per_split``: no image is dropped).
        official_val: Keep the mirror's validation folder (16 images) as validation; otherwise it joins train, from
            which a validation split is drawn by patient.
        kwargs: Arguments of `MedicalDataModule`.

    Raises:
        DataError: The layout is not found under ``root``, or a table is incomplete (on ``catalogue`` and ``setup``).
    """

    def __init__(
        self,
        root: Path,
        numbering: Literal["shared", "per_split"] = "shared",
        official_val: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.root = Path(root)
        self.numbering = numbering
        self.official_val = official_val

    def catalogue(self) -> Catalogue:
        """Read the tables and list the files as records; see ``read_catalogue`` in this module."""
        return read_catalogue(self.root, self.numbering, self.official_val, self.official_splits)


def read_catalogue(
    root: Path,
    numbering: Literal["shared", "per_split"] = "shared",
    official_val: bool = False,
    official: bool = True,
) -> Catalogue:
    """Turn ``{train,val,test}/{NORMAL,PNEUMONIA}`` into records, mirror or Mendeley layout alike.

    The arguments are those of `KermanyDataModule`; without ``official`` splits no image is dropped.

    Returns:
        ``pneumonia`` from the folder; ``pathology`` from the folder and the file name, unknown where the name does not
        contain virus or bacteria.

    Raises:
        DataError: The layout is missing or has no image.
    """
    folder = locate(root, ["train/NORMAL", "train/PNEUMONIA", "test/NORMAL", "test/PNEUMONIA"], "Kermany chest X-ray")
    splits: dict[str, Split] = {"train": "train", "val": "val" if official_val else "train", "test": "test"}
    records, unnamed = [], 0
    for name, split in splits.items():
        for finding in ("NORMAL", "PNEUMONIA"):
            for file in files_below(folder / name / finding, (".jpeg", ".jpg", ".png")):
                patient, pathology = _parse(file.stem, finding)
                unnamed += patient is None
                truth: dict[str, Truth] = {
                    "pneumonia": one_hot(TASKS[0].classes, "present" if finding == "PNEUMONIA" else "absent")
                }
                if pathology:
                    truth["pathology"] = one_hot(TASKS[1].classes, pathology)
                key = patient or f"{name}/{finding}/{file.stem}"
                key = f"{split}/{key}" if numbering == "per_split" else key
                records.append(Record(file.stem, file, key, truth, "kermany", split=split))
    require_records(records, "Kermany chest X-ray", folder, len(records))
    records = unique_ids(records)
    notes: list[str] = []
    if official:
        records, notes = disjoint_splits(records, "Kermany chest X-ray")
    if notes:
        notes.append("Kermany chest X-ray: set `numbering: per_split` if patient numbers start again in each split")
    if unnamed:
        notes.append(
            f"Kermany chest X-ray: {unnamed} file names contain no patient; each counts as a patient of its own"
        )
    counts = Counter("pathology" in r.truth for r in records)
    if counts[False]:
        notes.append(
            f"Kermany chest X-ray: {counts[False]} names contain neither virus nor bacteria; 'pathology' is unknown"
        )
    return Catalogue({task.name: task for task in TASKS}, records, notes)


def _parse(stem: str, finding: str) -> tuple[str | None, str | None]:
    """Return patient and pathology of a file: ``person1_virus_6``, ``NORMAL2-IM-0059-0001``, ``VIRUS-1004-0001``."""
    if match := MENDELEY.match(stem):
        kind = match[1].lower()
        return f"accession{match[2]}", "normal" if finding == "NORMAL" else CAUSES.get(kind)
    if finding == "NORMAL":
        match = NORMAL.search(stem)
        return (match[1].upper() if match else None), "normal"
    if match := PERSON.match(stem):
        return match[1].lower(), CAUSES[match[2].lower()]
    lowered = stem.lower()
    return None, next((name for cause, name in CAUSES.items() if cause in lowered), None)
