"""QaTa-COV19-v2: its folders as records.

The usual validation split is LViT's (Li et al., IEEE TMI 2023), two Excel lists that are not part of the download.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from datamodules.base import MedicalDataModule
from datamodules.public.layout import disjoint_splits, files_below, locate, read_table, require_records, unique_ids
from datamodules.records import BoxTruth, Catalogue, MaskSource, MaskTruth, Record, Split, Truth
from mtmedformer.batch import Task
from mtmedformer.errors import DataError

TASKS = (
    Task("infection", "segmentation", ("infection",)),
    Task("lesions", "detection", ("infection",)),
)
FOLDERS: dict[str, Split] = {"Train Set": "train", "Test Set": "test"}
SUBJECT = re.compile(r"^(sub-[A-Za-z0-9]+)")


class QaTaCov19DataModule(MedicalDataModule):
    """QaTa-COV19-v2: COVID-19 chest radiographs with infection masks; every image is positive.

    Expected below ``root``:

        Train Set/Images/*.png   Train Set/Ground-truths/mask_*.png
        Test Set/Images/*.png    Test Set/Ground-truths/mask_*.png

    Source: Degerli et al., IEEE ICIP 2022, doi 10.1109/ICIP46576.2022.9897412;
    https://www.kaggle.com/datasets/aysendegerli/qatacov19-dataset. Licence: see that page.

    Args:
        root: ``QaTa-COV19-v2`` or a folder that contains it.
        val_ids: LViT's ``Val_ID.xlsx`` (column ``Image``, names of masks): those training images become validation.
            ``null`` draws the validation split by patient.
        only_subjects: Keep only the files named ``sub-…``; the others are also in COVID-QU-Ex.
        min_area: Smallest connected component of a mask that gives a box, in pixels of the image.
        kwargs: Arguments of `MedicalDataModule`.

    Raises:
        DataError: The layout is not found under ``root``, or a table is incomplete (on ``catalogue`` and ``setup``).
    """

    def __init__(
        self,
        root: Path,
        val_ids: Path | None = None,
        only_subjects: bool = False,
        min_area: int = 25,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.root = Path(root)
        self.val_ids = val_ids
        self.only_subjects = only_subjects
        self.min_area = min_area

    def catalogue(self) -> Catalogue:
        """Read the tables and list the files as records; see ``read_catalogue`` in this module."""
        return read_catalogue(self.root, self.val_ids, self.only_subjects, self.min_area, self.official_splits)


def read_catalogue(
    root: Path,
    val_ids: Path | None = None,
    only_subjects: bool = False,
    min_area: int = 25,
    official: bool = True,
) -> Catalogue:
    """Turn ``{Train Set,Test Set}/{Images,Ground-truths}`` into records.

    The arguments are those of `QaTaCov19DataModule`; without ``official`` splits no image is dropped.

    Returns:
        ``infection`` and ``lesions`` (a box per component). No classification task: every image is positive.

    Raises:
        DataError: The layout or ``val_ids`` is missing, or none of its names is a training image.
    """
    expected = [f"{name}/{part}" for name in FOLDERS for part in ("Images", "Ground-truths")]
    folder = locate(root, expected, "QaTa-COV19-v2")
    records, without, skipped = [], 0, 0
    for name, split in FOLDERS.items():
        masks = {
            file.stem.removeprefix("mask_"): file for file in files_below(folder / name / "Ground-truths", (".png",))
        }
        for file in files_below(folder / name / "Images", (".png",)):
            subject = SUBJECT.match(file.stem)
            if only_subjects and subject is None:
                skipped += 1
                continue
            if file.stem not in masks:
                without += 1
                continue
            source = MaskSource(masks[file.stem])
            truth: dict[str, Truth] = {
                "infection": MaskTruth((source,)),
                "lesions": BoxTruth(masks=(source,), mask_labels=(0,), components=True, min_area=min_area),
            }
            patient = subject[1] if subject else file.stem
            view = re.search(r"_vp-(ap|pa)", file.stem, re.IGNORECASE)
            records.append(
                Record(
                    file.stem,
                    file,
                    patient,
                    truth,
                    "qata_cov19",
                    view=view[1].upper() if view else None,
                    split=split,
                )
            )
    require_records(records, "QaTa-COV19-v2", folder, len(records) + without + skipped)
    if val_ids is not None:
        records = _with_validation(records, val_ids)
    nameless = sum(SUBJECT.match(r.file.stem) is None for r in records)
    records = unique_ids(records)
    notes: list[str] = []
    if official:
        records, notes = disjoint_splits(records, "QaTa-COV19-v2")
    if nameless:
        notes.append(
            f"QaTa-COV19-v2: {nameless} images have no subject in their name, so each counts as a patient of its own; "
            "they are also in COVID-QU-Ex (`only_subjects: true` leaves them out)"
        )
    if skipped:
        notes.append(f"QaTa-COV19-v2: {skipped} images without a subject were left out (only_subjects)")
    if without:
        notes.append(f"QaTa-COV19-v2: {without} images without a mask were dropped")
    return Catalogue({task.name: task for task in TASKS}, records, notes)


def _with_validation(records: list[Record], file: Path) -> list[Record]:
    """Mark the listed training images as validation; the list names masks, with or without ``.png``."""
    names = {row.removeprefix("mask_").removesuffix(".png") for row in read_table(file, ["Image"])["Image"]}
    absent = names - {r.file.stem for r in records if r.split == "train"}
    if len(absent) == len(names):
        raise DataError(f"{file}: none of its {len(names)} names is an image of the Train Set")
    return [replace(r, split="val") if r.split == "train" and r.file.stem in names else r for r in records]
