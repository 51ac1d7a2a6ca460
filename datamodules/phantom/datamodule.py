"""Phantom: generated chest films and mammograms of several invented sites, written as real DICOM files.

The default data set of every demo and test. Anatomy and labels come from one random stream, the scanner from another:
a changed scanner setting leaves the anatomy and the labels as they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from datamodules.base import MedicalDataModule
from datamodules.loading.catalogue import choose_tasks
from datamodules.phantom.generate import generate, settings_key
from datamodules.phantom.sites import CLASSIFICATION, MASKS, QUANTITIES, SITE_SETS, PhantomSite, check_sites, tasks_of
from datamodules.public.layout import one_hot, read_table, rows_of
from datamodules.records import BoxTruth, Catalogue, MaskSource, MaskTruth, Record, Split, Truth, ValueTruth
from mtmedformer.batch import Task


class PhantomDataModule(MedicalDataModule):
    """Generated chest films and mammograms of several sites, each with its own scanner, prevalence and labels.

    Chest tasks: ``finding`` (clear / ground_glass / consolidation; the denser one if both are present), ``lesions``
    (boxes), ``lungs`` and ``infection`` (masks). Breast tasks: ``pathology`` (normal / benign / malignant),
    ``lesions`` (mass / calcification), ``breast`` and ``lesion`` (masks). In a set of both organs the tasks of the
    other organ are unknown; ``lesions`` is one task with the classes of both, since a chest has no masses of a breast.
    With ``quantities`` there are also numbers and grades: of a chest ``extent`` (percent of the lung fields with
    opacities) and ``severity`` (none / mild / moderate / severe), of a breast ``density`` (percent of fibroglandular
    tissue) and ``birads_density`` (A to D).

    The images are generated once for each choice of settings, in about 7 s on one core for the default 234 films. The
    default preset is for chests; use ``BreastPreset`` for breasts and ``PlainPreset`` for a set of both.

    Args:
        root: Folder of the generated sets, with one sub-folder for each choice of settings.
        sites: Sites by name, or the name of a ready-made set: ``chest`` (three sites, about 240 films), ``breast``
            (three sites, 240 mammograms) or ``mixed`` (all six).
        size: Height of the generated images in pixels; mammograms are four fifths as wide, chest films square.
        quantities: Whether the tasks include numbers and grades.
        kwargs: Arguments of `MedicalDataModule`.

    Raises:
        ConfigError: A site's setting is out of its range or names an unknown task.
    """

    generated = True

    def __init__(
        self,
        root: Path = Path(".cache/phantom"),
        sites: dict[str, PhantomSite] | Literal["chest", "breast", "mixed"] = "chest",
        size: int = 256,
        quantities: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.root = Path(root)
        self.sites = SITE_SETS[sites] if isinstance(sites, str) else sites
        self.size = size
        self.quantities = quantities
        check_sites(self.sites, size)
        self.tasks = choose_tasks(tasks_of(self.sites, quantities), self.only_tasks)

    @property
    def folder(self) -> Path:
        """The generated folder of exactly these settings; also a data set for `LabelsCSVDataModule`."""
        return self.root / settings_key(self.sites, self.size)

    def prepare_data(self) -> None:
        """Generate the images unless they exist."""
        generate(self.folder, self.sites, self.size)
        super().prepare_data()

    def catalogue(self) -> Catalogue:
        """Return the records of the generated images; generate them if they do not exist."""
        generate(self.folder, self.sites, self.size)
        return read_catalogue(self.folder, tasks_of(self.sites, self.quantities))


def read_catalogue(folder: Path, tasks: Mapping[str, Task]) -> Catalogue:
    """Turn a generated folder into records.

    Args:
        folder: A folder that ``generate`` has written.
        tasks: The tasks of its sites, see ``tasks_of``.
    """
    table = read_table(folder / "labels.csv", ["image", "site", "client", "patient", "split", "organ"])
    classes = tasks["lesions"].classes
    records = []
    for row in rows_of(table):
        truth: dict[str, Truth] = {}
        if row["has_cls"] == "1":
            task = CLASSIFICATION[row["organ"]]
            truth[task.name] = one_hot(task.classes, row["label"])
        if row["has_det"] == "1":
            boxes = tuple(tuple(map(float, box)) for box in json.loads(row["boxes"]))
            truth["lesions"] = BoxTruth(boxes, tuple(classes.index(k) for k in json.loads(row["box_labels"])))  # type: ignore[arg-type]
        for task in MASKS[row["organ"]]:
            if row[f"has_{task.name}"] == "1":
                truth[task.name] = MaskTruth((MaskSource(folder / row[f"mask_{task.name}"]),))
        for task in QUANTITIES[row["organ"]]:
            if task.name in tasks and row[task.name]:
                value = task.classes.index(row[task.name]) if task.classes else float(row[task.name])
                truth[task.name] = ValueTruth(value)
        split: Split = row["split"]  # type: ignore[assignment]
        file = folder / row["image"]
        records.append(
            Record(
                id=f"{row['site']}/{file.stem}",
                file=file,
                patient=row["patient"],
                truth=truth,
                site=row["site"],
                view=row["view"],
                laterality=row["laterality"] or None,
                split=split,
                groups={"client": row["client"], "organ": row["organ"]},
            )
        )
    return Catalogue(dict(tasks), records)
