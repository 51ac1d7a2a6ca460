"""The invented sites of the phantom: their settings, their tasks and the ready-made sets of sites."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from mtmedformer.batch import Task
from mtmedformer.errors import ConfigError

Organ = Literal["chest", "breast"]
TransferSyntax = Literal["explicit", "rle", "jpeg2000"]

CLASSIFICATION = {
    "chest": Task("finding", "classification", ("clear", "ground_glass", "consolidation")),
    "breast": Task("pathology", "classification", ("normal", "benign", "malignant")),
}
LESIONS = {"chest": ("ground_glass", "consolidation"), "breast": ("mass", "calcification")}
MASKS = {
    organ: tuple(Task(name, "segmentation", (label,), multi_label=True) for name, label in names.items())
    for organ, names in {
        "chest": {"lungs": "lung", "infection": "infection"},
        "breast": {"breast": "breast", "lesion": "lesion"},
    }.items()
}
"""Per organ, the task of its mask and the task of its lesions' mask; one class is one sigmoid channel."""

QUANTITIES = {
    "chest": (
        Task("extent", "regression", (), unit="%", range=(0.0, 100.0)),
        Task("severity", "regression", ("none", "mild", "moderate", "severe")),
    ),
    "breast": (
        Task("density", "regression", (), unit="%", range=(0.0, 100.0)),
        Task("birads_density", "regression", ("A", "B", "C", "D")),
    ),
}
"""Per organ, a number and the grade that follows from it."""

BOUNDARIES = {"chest": (0.0, 12.0, 22.0), "breast": (25.0, 51.5, 77.5)}
"""Per organ, the largest number of each grade but the highest."""


@dataclass(frozen=True)
class PhantomSite:
    """One invented hospital: its patients, its scanner and its labels.

    Attributes:
        organ: ``chest`` (one or two frontal films per patient) or ``breast`` (CC and MLO of both sides).
        patients: Number of patients.
        prevalence: Share of chests, or of single breasts, with a finding.
        gamma: Exponent of the scanner's response; below 1 brightens.
        contrast: Slope of the response about mid-grey.
        noise: Standard deviation of the noise at mid-grey, of a range of 1.
        blur: Standard deviation of the blur in thousandths of the image height.
        inverted: Whether black and white are swapped *without a mark* in the files: a domain shift.
        monochrome1: Whether the files store white as 0 and are marked ``MONOCHROME1``: readers invert them, no shift.
        bits: Bits stored per pixel.
        transfer_syntax: ``explicit`` (uncompressed), ``rle`` or ``jpeg2000`` (lossless).
        size: Image height in pixels; ``null`` uses the data set's.
        marker: Whether a lead marker (side, view) is in the image.
        labelled: Share of images labelled for each task, for example ``{"finding": 1.0, "lungs": 0.25}``; a task that
            is not listed is unlabelled. ``null`` labels everything.
    """

    organ: Organ = "chest"
    patients: int = 64
    prevalence: float = 0.5
    gamma: float = 1.0
    contrast: float = 1.0
    noise: float = 0.015
    blur: float = 0.0
    inverted: bool = False
    monochrome1: bool = False
    bits: Literal[8, 12, 16] = 12
    transfer_syntax: TransferSyntax = "explicit"
    size: int | None = None
    marker: bool = True
    labelled: dict[str, float] | None = None


CHEST_SITES = {
    "north": PhantomSite(),
    "south": PhantomSite(
        gamma=1.15,
        noise=0.025,
        monochrome1=True,
        transfer_syntax="rle",
        labelled={"finding": 1.0, "lungs": 1.0, "infection": 1.0, "extent": 1.0, "severity": 1.0},
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
        "breast",
        patients=20,
        gamma=1.1,
        noise=0.025,
        monochrome1=True,
        labelled={"pathology": 1.0, "breast": 1.0, "density": 1.0, "birads_density": 1.0},
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
SITE_SETS = {"chest": CHEST_SITES, "breast": BREAST_SITES, "mixed": CHEST_SITES | BREAST_SITES}


def tasks_of(sites: Mapping[str, PhantomSite], quantities: bool = False) -> dict[str, Task]:
    """Return the tasks of a set of sites; ``lesions`` is one task with the classes of both organs.

    Args:
        sites: Sites by name.
        quantities: Whether to include numbers and grades.
    """
    organs: list[Organ] = [o for o in ("chest", "breast") if any(s.organ == o for s in sites.values())]
    tasks = [CLASSIFICATION[o] for o in organs]
    tasks.append(Task("lesions", "detection", tuple(name for o in organs for name in LESIONS[o])))
    tasks += [task for o in organs for task in MASKS[o]]
    tasks += [task for o in organs for task in QUANTITIES[o] if quantities]
    return {task.name: task for task in tasks}


def check_sites(sites: Mapping[str, PhantomSite], size: int) -> None:
    """Raise a ``ConfigError`` that names the first setting out of its range."""
    if not sites:
        raise ConfigError("data.sites is empty; name at least one site or a preset: chest, breast, mixed")
    for name, site in sites.items():
        key = f"data.sites.{name}"
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise ConfigError(f"data.sites: {name!r} cannot be a folder name; use letters, digits, '_', '-', '.'")
        known = list(tasks_of({name: site}, quantities=True))
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
        for setting, value, low, high in ranges:
            if not low <= value <= high:
                raise ConfigError(f"{key}.{setting} is {value}; it must lie in [{low:g}, {high:g}]")
        choices = (
            ("organ", site.organ, get_args(Organ)),
            ("transfer_syntax", site.transfer_syntax, get_args(TransferSyntax)),
        )
        for setting, choice, valid in (*choices, ("bits", site.bits, (8, 12, 16))):
            if choice not in valid:
                raise ConfigError(f"{key}.{setting} is {choice!r}; choose from {', '.join(map(str, valid))}")
        for task in site.labelled or {}:
            if task not in known:
                raise ConfigError(f"{key}.labelled names {task!r}; a {site.organ} site has {', '.join(known)}")
