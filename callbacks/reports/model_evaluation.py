"""Results of a test as dataclasses; the HTML report and the model card are made from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from callbacks.evaluation.familiarity import TestDrift
from callbacks.reports.ranking_curves import TaskCurves
from callbacks.reports.reliability_report import TaskReliability
from mtmedformer.plots.html import number


@dataclass(frozen=True)
class TaskEvaluation:
    """Test results of one task.

    Attributes:
        kind: ``classification``, ``detection``, ``segmentation`` or ``regression``.
        classes: Names of the classes, or of the grades.
        primary: Name of the main metric.
        values: Values by ``<metric>``, ``<metric>/<class>``, ``<metric>/site=<site>`` and ``<metric>/view=<view>``;
            limits of the intervals by ``<metric>_ci_low`` and ``<metric>_ci_high``.
        curves: Curves, confusion matrix and Dice per image.
        reliability: Calibration on the test images.
        unit: Unit of the number of a regression.
        by_case: Whether the results are of cases and not of single images.
    """

    kind: str
    classes: tuple[str, ...]
    primary: str
    values: Mapping[str, float]
    curves: TaskCurves = field(default_factory=TaskCurves)
    reliability: TaskReliability = field(default_factory=TaskReliability)
    unit: str = ""
    by_case: bool = False

    def value(self, metric: str) -> float:
        """Return the value of a metric, NaN where it is unknown."""
        return self.values.get(metric, math.nan)

    def interval_limits(self, metric: str) -> tuple[float, float] | None:
        """Return the limits of the interval of a metric, ``None`` where they are unknown."""
        low, high = self.value(f"{metric}_ci_low"), self.value(f"{metric}_ci_high")
        return None if math.isnan(low) or math.isnan(high) else (low, high)

    def interval(self, metric: str) -> str:
        """Return a value with its interval as text, for example ``0.910 (0.850 to 0.950)``."""
        limits = self.interval_limits(metric)
        text = number(self.value(metric))
        return f"{text} ({number(limits[0])} to {number(limits[1])})" if limits else text

    def groups(self, metric: str, kind: str) -> dict[str, float]:
        """Return the values of a metric by group.

        Args:
            metric: Name of the metric.
            kind: ``site`` or ``view``.
        """
        start = f"{metric}/{kind}="
        return {key.removeprefix(start): value for key, value in self.values.items() if key.startswith(start)}

    @property
    def overall(self) -> dict[str, float]:
        """Values over all images, by ``<metric>`` and ``<metric>/<class>``, without intervals and groups."""
        return {k: v for k, v in self.values.items() if "=" not in k and not k.endswith(("_ci_low", "_ci_high"))}


@dataclass(frozen=True)
class DataDescription:
    """Description of a data set in counts, as ``describe`` of a data module returns it.

    Attributes:
        dataset: Class of the data module.
        image_size: Height and width of the network input.
        preset: Class of the preset that crops and frames the images.
        generated: Whether the images are synthetic.
        official_splits: Whether the splits published with the data set are used.
        seed: Seed of the splits.
        splits: By split: ``patients``, ``images`` and ``labelled`` (images by task).
        sites: Images by site and split.
        views: Images by view.
        weak: Images with approximate truth by task.
        quarantine: Excluded items by reason.
        remarks: Corrected items by reason.
        shared_patients: Patients in more than one split.
        leaks: ``images``, ``compared`` images, and pairs of near-duplicates ``across_splits``, ``across_sites`` and
            ``across_patients``.
    """

    dataset: str
    image_size: list[int]
    preset: str
    generated: bool
    official_splits: bool
    seed: int
    splits: dict[str, dict[str, Any]]
    sites: dict[str, dict[str, int]]
    views: dict[str, int]
    weak: dict[str, int]
    quarantine: dict[str, int]
    remarks: dict[str, int]
    shared_patients: int
    leaks: dict[str, int]

    @classmethod
    def by_site(cls, described: Mapping[str, Any]) -> dict[str, DataDescription]:
        """Return the descriptions by site, of one data set under ``""``.

        Args:
            described: What ``describe`` returned; of a federation it holds the sites' descriptions under ``parts``.
        """
        parts = described.get("parts") or ({"": described} if described else {})
        return {site: cls(**part) for site, part in parts.items()}

    def split_rows(self, tasks: list[str]) -> list[list[Any]]:
        """Return a row per split: name, patients, images, and labelled images of each task."""
        return [
            [split, n["patients"], n["images"], *(n["labelled"].get(task, 0) for task in tasks)]
            for split, n in self.splits.items()
        ]

    def site_rows(self) -> list[list[Any]]:
        """Return a row per site: name, and images for training, validation and test."""
        return [[site, *(n.get(split, 0) for split in ("train", "val", "test"))] for site, n in self.sites.items()]

    def leak_text(self) -> str:
        """Return one sentence with the result of the leak check."""
        leaks, shared = self.leaks, self.shared_patients
        patients = f"{shared} patients are in more than one split" if shared else "No patient is in two splits"
        if leaks["compared"] < 2:
            return f"{patients}; images were not compared for near-duplicates (mtmedformer fingerprint does)."
        some = f" of {leaks['images']}" if leaks["compared"] < leaks["images"] else ""
        rest = " (the others are not decoded here; mtmedformer fingerprint compares all)" if some else ""
        kinds = {"across_splits": "across splits", "across_sites": "across sites", "across_patients": "of two patients"}
        pairs = [f"{leaks[key]} {text}" for key, text in kinds.items() if leaks[key]]
        result = (
            f"near-duplicate pairs: {', '.join(pairs)}"
            if pairs
            else "no near-duplicates across splits, sites or patients"
        )
        return f"{patients}; {result} among {leaks['compared']}{some} images{rest}."


@dataclass(frozen=True)
class ModelDescription:
    """The tested model.

    Attributes:
        name: Class of the module.
        encoder: Name of the encoder.
        parameters: Number of weights.
        checkpoint: File name of the checkpoint, or a note that there is none.
        calibrated: Tasks with a temperature.
    """

    name: str
    encoder: str
    parameters: int
    checkpoint: str
    calibrated: list[str]


@dataclass(frozen=True)
class ModelEvaluation:
    """Everything in a model report except the images.

    Attributes:
        tasks: Results by task.
        score: Mean of the tasks' main metrics.
        data: Description of the data by site; under ``""`` for data that is not divided into sites.
        model: The tested model.
        config: Configuration in YAML, possibly empty.
        versions: Versions of software and hardware by name.
        drift: Familiarity of the test images; ``None`` where the checkpoint has none.
    """

    tasks: dict[str, TaskEvaluation]
    score: float
    data: dict[str, DataDescription]
    model: ModelDescription
    config: str
    versions: dict[str, str]
    drift: TestDrift | None = None

    @property
    def names(self) -> list[str]:
        """Names of the tasks, without those of results by case."""
        return [name for name, task in self.tasks.items() if not task.by_case]
