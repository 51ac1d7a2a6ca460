"""Phantom: generated chest films and mammograms of several invented sites, written as real DICOM files.

The default data set of every demo and test. Anatomy and truth come from one random stream, the scanner from another, so
that turning a dial of the scanner never changes what is there to be found.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from datamodules.base import MedicalDataModule
from datamodules.phantom.dicom import (
    CLASSIFICATION,
    LESIONS,
    MASKS,
    SYNTAXES,
    Organ,
    PhantomSite,
    generate,
    settings_key,
)
from datamodules.public.layout import one_hot, read_table, rows_of
from datamodules.records import BoxTruth, Catalogue, MaskSource, MaskTruth, Record, Split, Truth
from mtmedformer.batch import Task
from mtmedformer.errors import ConfigError

CHEST_SITES = {
    "north": PhantomSite(),
    "south": PhantomSite(
        gamma=1.15,
        noise=0.025,
        monochrome1=True,
        transfer_syntax="rle",
        labelled={"finding": 1.0, "lungs": 1.0, "infection": 1.0},
    ),
    "east": PhantomSite(
        gamma=0.85,
        contrast=0.9,
        blur=2.0,
        bits=16,
        transfer_syntax="jpeg2000",
        labelled={"finding": 1.0, "lesions": 1.0},
    ),
}
BREAST_SITES = {
    "harbour": PhantomSite("breast", patients=20, bits=16),
    "hill": PhantomSite(
        "breast", patients=20, gamma=1.1, noise=0.025, monochrome1=True, labelled={"pathology": 1.0, "breast": 1.0}
    ),
    "valley": PhantomSite(
        "breast",
        patients=20,
        contrast=0.9,
        blur=1.5,
        transfer_syntax="jpeg2000",
        labelled={"lesions": 1.0, "lesion": 1.0},
    ),
}
PRESETS = {"chest": CHEST_SITES, "breast": BREAST_SITES, "mixed": CHEST_SITES | BREAST_SITES}


def tasks_of(sites: Mapping[str, PhantomSite]) -> dict[str, Task]:
    """Return the tasks of a set of sites; ``lesions`` is shared by the organs and knows the classes of both."""
    organs: list[Organ] = [o for o in ("chest", "breast") if any(s.organ == o for s in sites.values())]
    tasks = [CLASSIFICATION[o] for o in organs]
    tasks.append(Task("lesions", "detection", tuple(name for o in organs for name in LESIONS[o])))
    tasks += [task for o in organs for task in MASKS[o]]
    return {task.name: task for task in tasks}


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
        phantom_seed: Seed of the images; patients of different seeds are different people.
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
        phantom_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.root = Path(root)
        self.sites = PRESETS[sites] if isinstance(sites, str) else sites
        self.size = size
        self.phantom_seed = phantom_seed
        check_sites(self.sites, size)

    @property
    def folder(self) -> Path:
        """The generated tree of exactly these settings; also a ``labels.csv`` data set."""
        return self.root / settings_key(self.sites, self.size, self.phantom_seed)

    def prepare_data(self) -> None:
        """Generate the tree unless it is there already."""
        generate(self.folder, self.sites, self.size, self.phantom_seed)
        super().prepare_data()

    def catalogue(self) -> Catalogue:
        """Return the records of the generated tree, generating it if need be."""
        generate(self.folder, self.sites, self.size, self.phantom_seed)
        return read_catalogue(self.folder, tasks_of(self.sites))


def check_sites(sites: Mapping[str, PhantomSite], size: int) -> None:
    """Raise a ``ConfigError`` naming the first dial that cannot work."""
    if not sites:
        raise ConfigError("data.sites is empty; name at least one site or a preset: chest, breast, mixed")
    for name, site in sites.items():
        key = f"data.sites.{name}"
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise ConfigError(f"data.sites: {name!r} cannot be a folder name; use letters, digits, '_', '-', '.'")
        known = list(tasks_of({name: site}))
        ranges: list[tuple[str, float, float, float]] = [
            ("patients", site.patients, 1, 9999),
            ("prevalence", site.prevalence, 0, 1),
            ("gamma", site.gamma, 0.1, 10),
            ("contrast", site.contrast, 0.05, 10),
            ("noise", site.noise, 0, 1),
            ("blur", site.blur, 0, 100),
            ("size", size if site.size is None else site.size, 32, 4096),
            *[(f"labelled.{task}", share, 0, 1) for task, share in (site.labelled or {}).items()],
        ]
        for dial, value, low, high in ranges:
            if not low <= value <= high:
                raise ConfigError(f"{key}.{dial} is {value}; it must lie in [{low:g}, {high:g}]")
        choices = (("organ", site.organ, CLASSIFICATION), ("transfer_syntax", site.transfer_syntax, SYNTAXES))
        for dial, choice, valid in (*choices, ("bits", site.bits, (8, 12, 16))):
            if choice not in valid:
                raise ConfigError(f"{key}.{dial} is {choice!r}; choose from {', '.join(map(str, valid))}")
        for task in site.labelled or {}:
            if task not in known:
                raise ConfigError(f"{key}.labelled names {task!r}; a {site.organ} site has {', '.join(known)}")


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
