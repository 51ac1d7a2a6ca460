"""COVID-QU-Ex: its two folder trees as records.

The set is composed of many public sets (RSNA, Kermany and QaTa-COV19 among them): class and source coincide, and using
it together with those sets puts copies of images into several splits.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from datamodules.base import MedicalDataModule
from datamodules.public.layout import disjoint_splits, files_below, locate, one_hot, require_records, unique_ids
from datamodules.records import BoxTruth, Catalogue, MaskSource, MaskTruth, Record, Split, Truth
from mtmedformer.batch import Task

PATHOLOGY = {"COVID-19": "covid19", "Non-COVID": "other_pneumonia", "Normal": "no_finding"}
SPLITS: dict[str, Split] = {"Train": "train", "Val": "val", "Test": "test"}
TREES = {"lung": "Lung Segmentation Data", "infection": "Infection Segmentation Data"}
TASKS = (
    Task("pathology", "classification", tuple(PATHOLOGY.values())),
    Task("lungs", "segmentation", ("lungs",)),
    Task("infection", "segmentation", ("infection",)),
    Task("lesions", "detection", ("infection",)),
)
SUBJECT = re.compile(r"^(sub-[A-Za-z0-9]+)")


class CovidQuExDataModule(MedicalDataModule):
    """COVID-QU-Ex: chest radiographs with a class and a lung mask each, and infection masks on 2,913 of them.

    Expected below ``root`` (the archive repeats each tree's folder name):

        Lung Segmentation Data/Lung Segmentation Data/{Train,Val,Test}/{COVID-19,Non-COVID,Normal}/
            images/*.png   lung masks/*.png
        Infection Segmentation Data/Infection Segmentation Data/…/
            images/*.png   lung masks/*.png   infection masks/*.png

    Source: Tahir et al., Computers in Biology and Medicine 2021, doi 10.1016/j.compbiomed.2021.105002;
    https://www.kaggle.com/datasets/anasmohammedtahir/covidqu. Licence: see that page.

    Args:
        root: Folder with ``Lung Segmentation Data`` and/or ``Infection Segmentation Data``.
        tree: The tree whose images and official splits are used. ``both``: those of the lung tree (33,920 images), with
            the infection masks of the images of the same class and name.
        patients: The set has no patient ids. ``subject`` reads ``sub-S0…`` where a file name has it, and drops such
            patients from train (val) if val or test (test) has them too; ``image`` is the published split by image,
            in which those patients are in several splits.
        min_area: Smallest connected component of an infection mask that gives a box, in pixels of the image.
        kwargs: Arguments of `MedicalDataModule`.

    Raises:
        DataError: The layout is not found under ``root``, or a table is incomplete (on ``catalogue`` and ``setup``).
    """

    def __init__(
        self,
        root: Path,
        tree: Literal["lung", "infection", "both"] = "both",
        patients: Literal["subject", "image"] = "subject",
        min_area: int = 25,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.root = Path(root)
        self.tree = tree
        self.patients = patients
        self.min_area = min_area

    def catalogue(self) -> Catalogue:
        """Read the tables and list the files as records; see ``read_catalogue`` in this module."""
        return read_catalogue(self.root, self.tree, self.patients, self.min_area, self.official_splits)


def read_catalogue(
    root: Path,
    tree: Literal["lung", "infection", "both"] = "both",
    patients: Literal["subject", "image"] = "subject",
    min_area: int = 25,
    official: bool = True,
) -> Catalogue:
    """Turn the two folder trees into records.

    The infection masks outline COVID-19 only. They are used on the COVID-19 images; a normal image is a true negative
    if the infection tree has it; a non-COVID pneumonia is *unknown*, even if it has an all-zero mask.

    The arguments are those of `CovidQuExDataModule`; without ``official`` splits no image is dropped.

    Returns:
        ``pathology``, ``lungs``, ``infection`` and ``lesions`` (a box per component of the infection mask).

    Raises:
        DataError: The tree asked for is missing.
    """
    main = "infection" if tree == "infection" else "lung"
    folder = _tree(root, main)
    infection = _infection_masks(folder if tree == "infection" else _tree(root, "infection")) if tree != "lung" else {}

    records, missing = [], 0
    for split_name, split in SPLITS.items():
        for class_name, pathology in PATHOLOGY.items():
            place = folder / split_name / class_name
            lungs = {file.stem: file for file in files_below(place / "lung masks", (".png", ".jpg"))}
            for file in files_below(place / "images", (".png", ".jpg", ".jpeg")):
                truth: dict[str, Truth] = {"pathology": one_hot(TASKS[0].classes, pathology)}
                if file.stem in lungs:
                    truth["lungs"] = MaskTruth((MaskSource(lungs[file.stem]),))
                missing += file.stem not in lungs
                truth |= _infection_truth(class_name, infection, file.stem, min_area)
                subject = SUBJECT.match(file.stem) if patients == "subject" else None
                patient = subject[1] if subject else f"{class_name}/{file.stem}"
                view = re.search(r"_vp-(ap|pa)", file.stem, re.IGNORECASE)
                records.append(
                    Record(
                        f"{pathology}_{file.stem}",
                        file,
                        patient,
                        truth,
                        "covid_qu_ex",
                        view=view[1].upper() if view else None,
                        split=split,
                    )
                )
    require_records(records, "COVID-QU-Ex", folder, len(records))
    records = unique_ids(records)
    notes: list[str] = []
    if official:
        records, notes = disjoint_splits(records, "COVID-QU-Ex")
    notes.append(
        "COVID-QU-Ex: no patient ids are published, so the official splits are by image and patients may be in several "
        "splits; the set also contains images of RSNA, Kermany and QaTa-COV19 (do not test across these sets)"
    )
    if missing:
        notes.append(f"COVID-QU-Ex: {missing} images have no lung mask; 'lungs' is unknown there")
    joined = {(r.file.parent.parent.name, r.file.stem) for r in records if "infection" in r.truth}
    lost = sum(key not in joined for key in infection if key[0] == "COVID-19")
    if tree == "both" and lost:
        notes.append(f"COVID-QU-Ex: {lost} infection masks belong to no image used from the lung tree and are not used")
    tasks = TASKS if tree != "lung" else TASKS[:2]
    return Catalogue({task.name: task for task in tasks}, records, notes)


def _tree(root: Path, which: str) -> Path:
    """Return the folder that holds ``Train``, ``Val`` and ``Test`` of a tree: inside the doubled folder name."""
    name = TREES[which]
    inner = [f"{name}/{name}/{split}" for split in SPLITS]
    single = [f"{name}/{split}" for split in SPLITS]
    expected = [f"{double}|{once}" for double, once in zip(inner, single, strict=True)]
    folder = locate(root, expected, "COVID-QU-Ex") / name
    return folder / name if (folder / name / "Train").is_dir() else folder


def _infection_masks(folder: Path) -> dict[tuple[str, str], Path]:
    """Index the infection masks by class and image name; an image without one is not in the index."""
    return {
        (class_name, file.stem): file
        for split in SPLITS
        for class_name in PATHOLOGY
        for file in files_below(folder / split / class_name / "infection masks", (".png", ".jpg"))
    }


def _infection_truth(class_name: str, masks: dict[tuple[str, str], Path], stem: str, min_area: int) -> dict[str, Truth]:
    file = masks.get((class_name, stem))
    if file is None or class_name == "Non-COVID":
        return {}
    if class_name == "Normal":
        return {"infection": MaskTruth((MaskSource(),)), "lesions": BoxTruth()}
    source = MaskSource(file)
    boxes = BoxTruth(masks=(source,), mask_labels=(0,), components=True, min_area=min_area)
    return {"infection": MaskTruth((source,)), "lesions": boxes}
