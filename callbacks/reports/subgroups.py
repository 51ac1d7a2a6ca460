"""Results by site, view and further groups: counts, intervals, remarks on small groups, and a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib as mpl
from matplotlib.figure import Figure

from mtmedformer.plots.html import number
from mtmedformer.plots.style import COLOURS, FAINT, INK, STYLE

FEW = 20
"""With fewer patients than this a value of a group is remarked on."""

OVER_CLASSES = ("balanced_accuracy", "kappa")
"""Metrics that need images of at least two classes."""


@dataclass(frozen=True)
class Subgroup:
    """The test images of one group.

    Attributes:
        column: ``site``, ``view`` or a group column.
        name: Its value.
        images: Number of images, or of cases where these are scored; ``None`` where it is not known.
        patients: Number of their patients, likewise.
        counts: Images (lesions for detection) by class.
    """

    column: str
    name: str
    images: int | None
    patients: int | None
    counts: Mapping[str, int]

    @property
    def is_small(self) -> bool:
        """Whether it has so few patients that its values are uncertain."""
        return self.patients is not None and self.patients < FEW

    @property
    def key(self) -> str:
        """End of the keys of its values."""
        return f"/{self.column}={self.name}"

    def __str__(self) -> str:
        return f"{self.column} {self.name}"


def subgroups(values: Mapping[str, float]) -> list[Subgroup]:
    """Return the groups of the columns that have at least two.

    Args:
        values: Values of one task, by the keys of ``TaskMetrics.report``.
    """
    counted = [key.split("/", 1)[1] for key in values if key.startswith(("n_images/", "n_cases/"))]
    bare = [key.split("/", 1)[1] for key in values if "=" in key and key.count("/") == 1]
    found = [_subgroup(key, values) for key in dict.fromkeys([*counted, *bare])]
    columns = [group.column for group in found]
    return [group for group in found if columns.count(group.column) > 1]


def _subgroup(key: str, values: Mapping[str, float]) -> Subgroup:
    column, _, name = key.partition("=")
    counts = {
        other.removeprefix("n_positive/").removesuffix(f"/{key}"): int(count)
        for other, count in values.items()
        if other.startswith("n_positive/") and other.endswith(f"/{key}")
    }
    patients = values.get(f"n_patients/{key}")
    images = values.get(f"n_images/{key}", values.get(f"n_cases/{key}"))
    return Subgroup(
        column, name, None if images is None else int(images), None if patients is None else int(patients), counts
    )


def remarks(groups: Sequence[Subgroup], values: Mapping[str, float]) -> list[str]:
    """Return sentences on groups of one class, for which means over classes are not defined, and of few patients.

    Args:
        groups: The groups of a task.
        values: Values of the task.
    """
    alone = []
    for group in groups:
        present = [name for name, count in group.counts.items() if count]
        undefined = any(m in values and math.isnan(values.get(f"{m}{group.key}", math.nan)) for m in OVER_CLASSES)
        if undefined and len(group.counts) > 1 and len(present) == 1:
            alone.append(f"{group} (only {present[0]})")
    few = [f"{group} ({group.patients})" for group in groups if group.is_small]
    sentences = []
    if alone:
        sentences.append(f"one class only, so that means over classes are not defined (–): {', '.join(alone)}.")
    if few:
        sentences.append(f"fewer than {FEW} patients, so that values are uncertain: {', '.join(few)}.")
    return sentences


def with_interval(values: Mapping[str, float], metric: str, group: Subgroup, digits: int = 3) -> str:
    """Return a value of a group with its interval as text, – where it is not defined."""
    value, low, high = (values.get(f"{metric}{end}{group.key}", math.nan) for end in ("", "_ci_low", "_ci_high"))
    if math.isnan(value):
        return "–"
    text = number(value, digits)
    return text if math.isnan(low) or math.isnan(high) else f"{text} ({number(low, digits)} to {number(high, digits)})"


def subgroup_figure(values: Mapping[str, float], metric: str, groups: Sequence[Subgroup]) -> Figure | None:
    """Draw a metric with its interval for every group, and for all images as a line.

    Args:
        values: Values of one task.
        metric: The metric.
        groups: The groups of the task.

    Returns:
        The figure; ``None`` where no group has a value.
    """
    shown = [group for group in groups if not math.isnan(values.get(f"{metric}{group.key}", math.nan))]
    if not shown:
        return None
    with mpl.rc_context(STYLE):
        drawn = Figure(figsize=(6.4, 0.9 + 0.27 * len(shown)), layout="constrained")
        axis = drawn.subplots()
        axis.axvline(values.get(metric, math.nan), color=INK, lw=1, ls="--", label="all images")
        columns = list(dict.fromkeys(group.column for group in shown))
        for place, group in enumerate(shown):
            value, low, high = (
                values.get(f"{metric}{end}{group.key}", math.nan) for end in ("", "_ci_low", "_ci_high")
            )
            colour = COLOURS[columns.index(group.column) % len(COLOURS)]
            if not math.isnan(low):
                axis.plot([low, high], [place, place], color=colour, lw=2, alpha=0.6)
            axis.plot(value, place, "o", color=colour, ms=6, mfc="white" if group.is_small else colour)
        axis.set_yticks(range(len(shown)), [str(group) for group in shown])
        axis.set_ylim(len(shown) - 0.4, -0.6)
        axis.set_xlabel(metric)
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="y", color=FAINT, alpha=0.15)
        axis.legend(fontsize=8.5, loc="best")
    return drawn
