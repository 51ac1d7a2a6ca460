"""The covid-chestxray dataset: its repository as records.

The lung masks are V7 Labs' (shipped with torchxrayvision) or the repository's ``annotations/lungVAE-masks``, the output
of a network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from PIL import Image

from datamodules.base import MedicalDataModule
from datamodules.images.dicom_parsing import reading
from datamodules.public.layout import files_below, locate, one_hot, read_table, require_records, rows_of
from datamodules.records import Catalogue, ClassTruth, MaskSource, MaskTruth, Record, Truth
from mtmedformer.batch import Task
from mtmedformer.errors import ConfigError, DataError

UNKNOWN = {"", "todo", "unknown"}
PATHOLOGY = ("covid19", "other_pneumonia", "no_finding")
SITES = {"radiopaedia": "radiopaedia", "eurorad": "eurorad", "sirm": "sirm_italy"}
V7_LUNG = (255,)
"""Value of the lungs in V7 Labs' masks; 127 marks other regions (torchxrayvision uses 255 only, too)."""


class CovidChestXrayDataModule(MedicalDataModule):
    """covid-chestxray-dataset: radiographs from publications with a hierarchy of findings and some lung masks.

    Expected below ``root``: a checkout of the repository:

        metadata.csv
        images/*.{jpg,jpeg,png}
        semantic_masks_v7labs_lungs/*.png or annotations/lungVAE-masks/*.png      (optional)

    Source: Cohen et al., arXiv 2006.11988; https://github.com/ieee8023/covid-chestxray-dataset.
    Licence: per image, in the column ``license`` of ``metadata.csv``.

    Args:
        root: The repository's folder.
        findings: Classes of the task ``findings``: steps of the hierarchy, spelt as in the table.
        views: Views to keep; lateral (``L``), CT (``Axial``, ``Coronal``) and others are dropped and counted in a note.
        lung_masks: Folder with lung masks named like the images (``x.png`` or ``x_mask.png``). ``None`` looks for
            ``semantic_masks_v7labs_lungs``, then ``annotations/lungVAE-masks`` (weak), under the root.
        kwargs: Arguments of `MedicalDataModule`.

    Raises:
        DataError: The layout is not found under ``root``, or a table is incomplete (on ``catalogue`` and ``setup``).
    """

    def __init__(
        self,
        root: Path,
        findings: Sequence[str] = ("No Finding", "Pneumonia", "Viral", "COVID-19", "Bacterial", "Fungal"),
        views: Sequence[str] = ("PA", "AP", "AP Supine"),
        lung_masks: Path | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.root = Path(root)
        self.findings = findings
        self.views = views
        self.lung_masks = lung_masks

    def catalogue(self) -> Catalogue:
        """Read the tables and list the files as records; see ``read_catalogue`` in this module."""
        return read_catalogue(self.root, self.findings, self.views, self.lung_masks)


def read_catalogue(
    root: Path,
    findings: Sequence[str] = ("No Finding", "Pneumonia", "Viral", "COVID-19", "Bacterial", "Fungal"),
    views: Sequence[str] = ("PA", "AP", "AP Supine"),
    lung_masks: Path | None = None,
) -> Catalogue:
    """Turn ``metadata.csv`` and ``images`` into records.

    A finding is a path such as ``Pneumonia/Viral/COVID-19``. A class holds if it is a step of that path. Where the path
    stops above the class (``Pneumonia`` alone does not decide ``Viral``), the class is unknown, not absent.

    The arguments are those of `CovidChestXrayDataModule`.

    Returns:
        ``findings`` (several may hold), ``pathology`` (``covid19``, ``other_pneumonia``, ``no_finding``; unknown where
        the path does not decide) and ``lungs`` on the images with a mask.

    Raises:
        DataError: The layout is missing, or the table is incomplete.
        ConfigError: A class of ``findings`` or all ``views`` are not in the table.
    """
    folder = locate(root, ["metadata.csv", "images"], "covid-chestxray-dataset")
    table = folder / "metadata.csv"
    rows = rows_of(read_table(table, ["patientid", "finding", "view", "modality", "folder", "filename", "url"]))
    paths = sorted({tuple(row["finding"].split("/")) for row in rows if row["finding"].lower() not in UNKNOWN})
    _check("findings", findings, {step for path in paths for step in path}, table)
    _check("views", views, {row["view"] for row in rows}, table)
    masks, weak = _lung_masks(folder, lung_masks)

    records: list[Record] = []
    dropped: dict[str, int] = {}
    taken: set[str] = set()
    for row in rows:
        file = folder / (row["folder"] or "images") / row["filename"]
        truth = _finding_truth(row["finding"], paths, findings)
        if row["filename"] in masks:
            truth["lungs"] = MaskTruth((masks[row["filename"]],))
        reason = _reason_to_drop(row, views, truth, taken, file)
        if reason:
            dropped[reason] = dropped.get(reason, 0) + 1
            continue
        taken.add(row["filename"])
        host = urlparse(row["url"]).netloc
        site = next((name for part, name in SITES.items() if part in host), "journals")
        records.append(
            Record(
                row["filename"],
                file,
                row["patientid"],
                truth,
                site,
                view=row["view"],
                weak=frozenset({"lungs"}) & truth.keys() if weak else frozenset(),
                groups={"client": site},
            )
        )
    require_records(records, "covid-chestxray-dataset", folder / "images", len(rows))
    notes = [f"covid-chestxray-dataset: {count} rows dropped: {why}" for why, count in sorted(dropped.items())]
    tasks = [
        Task("findings", "classification", tuple(findings), multi_label=True),
        Task("pathology", "classification", PATHOLOGY),
        Task("lungs", "segmentation", ("lungs",), weak=weak),
    ]
    return Catalogue({task.name: task for task in tasks}, records, notes)


def _check(option: str, chosen: Sequence[str], there: set[str], table: Path) -> None:
    wrong = [value for value in chosen if value not in there]
    if option == "findings" and wrong and not there:
        raise DataError(f"{table}: column 'finding' holds no finding")
    if option == "findings" and (not chosen or wrong):
        raise ConfigError(f"{option}={list(chosen)}: choose from those in {table}: {sorted(there)}")
    if option == "views" and not set(chosen) & there:
        raise ConfigError(f"{option}={list(chosen)}: choose from those in {table}: {sorted(there)}")


def _reason_to_drop(
    row: dict[str, str], views: Sequence[str], truth: dict[str, Truth], taken: set[str], file: Path
) -> str | None:
    if row["modality"] != "X-ray":
        return f"modality {row['modality'] or 'empty'}"
    if row["view"] not in views:
        return f"view {row['view'] or 'empty'}"
    if not truth:
        return "finding todo or unknown"
    if row["filename"] in taken:
        return "the image is listed twice"
    if not file.is_file():
        return "the image is not on disk"
    return None


def _finding_truth(finding: str, paths: Sequence[tuple[str, ...]], classes: Sequence[str]) -> dict[str, Truth]:
    if finding.lower() in UNKNOWN:
        return {}
    path = tuple(finding.split("/"))
    values = [math.nan if _is_open(path, name, paths) else float(name in path) for name in classes]
    truth: dict[str, Truth] = {"findings": ClassTruth(tuple(values))}
    pathology = None
    if "COVID-19" in path:
        pathology = "covid19"
    elif path == ("No Finding",):
        pathology = "no_finding"
    elif "Pneumonia" in path and not _is_open(path, "COVID-19", paths):
        pathology = "other_pneumonia"
    if pathology:
        truth["pathology"] = one_hot(PATHOLOGY, pathology)
    return truth


def _is_open(path: tuple[str, ...], name: str, paths: Sequence[tuple[str, ...]]) -> bool:
    """Return whether ``path`` stops above ``name`` somewhere in the hierarchy, so that it does not decide it."""
    if name in path:
        return False
    return any(name in other[len(path) :] and other[: len(path)] == path for other in paths)


def _lung_masks(folder: Path, chosen: Path | None) -> tuple[dict[str, MaskSource], bool]:
    """Return the lung masks by image name (both spellings) and whether they are the output of a network.

    An all-zero V7 mask belongs to an image that was not annotated, since a chest film shows lungs; it is left out.
    """
    if chosen is not None and not chosen.is_dir():
        raise DataError(f"lung_masks={chosen} is not a folder")
    places = [chosen] if chosen else [folder / "semantic_masks_v7labs_lungs", folder / "annotations" / "lungVAE-masks"]
    place = next((p for p in places if p is not None and p.is_dir()), None)
    if place is None:
        return {}, False
    weak = "lungvae" in place.name.lower()
    files = files_below(folder / "images", (".png", ".jpg", ".jpeg"))
    images = {file.stem: file.name for file in files} | {file.name: file.name for file in files}
    masks = {}
    for file in files_below(place, (".png", ".jpg", ".jpeg")):
        spellings = (file.name, file.stem, file.stem.removesuffix("_mask"))
        name = next((images[spelling] for spelling in spellings if spelling in images), None)
        if name and _any_lung(file):
            masks[name] = MaskSource(file, None if weak else V7_LUNG)
    return masks, weak


def _any_lung(file: Path) -> bool:
    with reading(file, "a lung mask"), Image.open(file) as mask:
        return mask.convert("L").getbbox() is not None
