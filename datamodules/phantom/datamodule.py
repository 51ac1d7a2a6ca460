"""Phantom: generated chest films and mammograms of several invented sites, written as real DICOM files.

The default data set of every demo and test. Anatomy and truth come from one random stream, the scanner from another, so
that turning a dial of the scanner never changes what is there to be found.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from datamodules.base import MedicalDataModule
from datamodules.phantom.generate import generate, settings_key
from datamodules.phantom.sites import CLASSIFICATION, MASKS, SITE_SETS, PhantomSite, check_sites, tasks_of
from datamodules.public.layout import one_hot, read_table, rows_of
from datamodules.records import BoxTruth, Catalogue, MaskSource, MaskTruth, Record, Split, Truth
from mtmedformer.batch import Task


class PhantomDataModule(MedicalDataModule):
    """Generated chest films and mammograms of several sites, each with its own scanner, prevalence and labels.

    Chest tasks: ``finding`` (clear / ground_glass / consolidation; the denser one counts where both are), ``lesions``
    (boxes), ``lungs`` and ``infection`` (masks). Breast tasks: ``pathology`` (normal / benign / malignant),
    ``lesions`` (mass / calcification), ``breast`` and ``lesion`` (masks). In a set of both organs the tasks of the
    other organ are unknown; ``lesions`` is one task with the classes of both, since no chest holds a breast's mass.

    The images are generated once per settings, in about 7 s of one core for the default 234 films, and reused. The
    default preset suits chests; breasts want ``BreastPreset``, a set of both ``PlainPreset``.

    Args:
        root: Folder under which generated sets are kept, one sub-folder for each choice of settings.
        sites: Sites by name, or the name of a ready-made set: ``chest`` (three sites, about 240 films), ``breast``
            (three sites, 240 mammograms) or ``mixed`` (all six).
        size: Height of the generated images in pixels; mammograms are four fifths as wide, chest films square.
        kwargs: See ``MedicalDataModule``.

    Raises:
        ConfigError: A site's dial is out of range or names an unknown task.
    """

    generated = True

    def __init__(
        self,
        root: Path = Path(".cache/phantom"),
        sites: dict[str, PhantomSite] | Literal["chest", "breast", "mixed"] = "chest",
        size: int = 256,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.root = Path(root)
        self.sites = SITE_SETS[sites] if isinstance(sites, str) else sites
        self.size = size
        check_sites(self.sites, size)

    @property
    def folder(self) -> Path:
        """The generated tree of exactly these settings; also a ``labels.csv`` data set."""
        return self.root / settings_key(self.sites, self.size)

    def prepare_data(self) -> None:
        """Generate the tree unless it is there already."""
        generate(self.folder, self.sites, self.size)
        super().prepare_data()

    def catalogue(self) -> Catalogue:
        """Return the records of the generated tree, generating it if need be."""
        generate(self.folder, self.sites, self.size)
        return read_catalogue(self.folder, tasks_of(self.sites))


def read_catalogue(folder: Path, tasks: Mapping[str, Task]) -> Catalogue:
    """Turn a generated tree into records.

    Args:
        folder: A tree that ``generate`` has written.
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
