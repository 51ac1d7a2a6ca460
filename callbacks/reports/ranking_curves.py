"""Curves of a tested task: ROC, precision and recall, FROC, Dice, reliability, numbers; and its confusion matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from callbacks.reports.reliability_report import TaskReliability
from mtmedformer.metrics.base import TaskMetrics
from mtmedformer.metrics.calibration import Reliability
from mtmedformer.metrics.classification import ClassificationMetrics
from mtmedformer.metrics.curves import Floats, counts_above, operating_points
from mtmedformer.metrics.detection import DetectionMetrics
from mtmedformer.metrics.regression import OrdinalMetrics, RegressionMetrics
from mtmedformer.metrics.segmentation import SegmentationMetrics
from mtmedformer.plots.style import COLOURS, FAINT, INK, STYLE

FALSE_ALARMS = 8.0
"""Largest number of false alarms per image on a FROC curve."""
MAX_POINTS = 1000
"""Points of a curve; longer curves are thinned evenly, both ends are kept."""


class Curve(NamedTuple):
    """A curve as two lists of equal length."""

    x: list[float]
    y: list[float]


@dataclass(frozen=True)
class TaskCurves:
    """What is drawn of one task's test images. What does not apply to the kind of the task is empty.

    Attributes:
        counts: Images (lesions for detection) by class.
        roc: False positive rate and true positive rate by class.
        precision_recall: Recall and precision by class.
        confusion: Images by true and predicted class, where classes exclude each other.
        froc: False alarms per image and sensitivity by class.
        dice: Dice of every image by class.
        numbers: True and predicted number of every image.
    """

    counts: dict[str, int] = field(default_factory=dict)
    roc: dict[str, Curve] = field(default_factory=dict)
    precision_recall: dict[str, Curve] = field(default_factory=dict)
    confusion: list[list[int]] = field(default_factory=list)
    froc: dict[str, Curve] = field(default_factory=dict)
    dice: dict[str, list[float]] = field(default_factory=dict)
    numbers: Curve | None = None


def task_curves(metric: TaskMetrics) -> TaskCurves:
    """Compute the curves of a task's test images; in distributed runs the metric has to be gathered."""
    rows = metric.seen().rows
    if isinstance(metric, ClassificationMetrics):
        return _classification(metric, rows)
    if isinstance(metric, DetectionMetrics):
        return _detection(metric, rows)
    if isinstance(metric, SegmentationMetrics):
        scores = metric.table("scores").numpy()[rows][:, :, 0]
        known = {name: scores[~np.isnan(scores[:, k]), k] for k, name in enumerate(metric.classes)}
        return TaskCurves(counts={n: len(v) for n, v in known.items()}, dice={n: v.tolist() for n, v in known.items()})
    if isinstance(metric, RegressionMetrics):
        return TaskCurves(numbers=_thinned(*reversed(metric.pairs(rows))))
    if isinstance(metric, OrdinalMetrics):
        grades, truth = metric.pairs(rows)
        counts = {name: int((truth == k).sum()) for k, name in enumerate(metric.classes)}
        return TaskCurves(counts=counts, confusion=_confusion(truth, grades, len(metric.classes)))
    return TaskCurves()


def _confusion(truth: Any, predicted: Any, classes: int) -> list[list[int]]:
    """Return the number of images by true and predicted class, from the indices of both."""
    table = np.zeros((classes, classes), np.int64)
    np.add.at(table, (truth, predicted), 1)
    counts: list[list[int]] = table.tolist()
    return counts


def _classification(metric: ClassificationMetrics, rows: Any) -> TaskCurves:
    probabilities = metric.table("probabilities").numpy()[rows].astype(np.float64)
    labels = metric.table("labels").numpy()[rows].astype(np.float64)
    if not metric.multi_label:
        labels[np.isnan(labels).any(axis=1)] = np.nan
    curves = TaskCurves()
    for k, name in enumerate(metric.classes):
        known = ~np.isnan(labels[:, k])
        truth = labels[known, k] == 1
        curves.counts[name] = int(truth.sum())
        if truth.any() and not truth.all():
            order, ends = operating_points(probabilities[known, k])
            tp = counts_above(truth[order][None].astype(np.float64), ends)[0]
            fp = counts_above((~truth[order])[None].astype(np.float64), ends)[0]
            curves.roc[name] = _thinned(fp / fp[-1], tp / tp[-1])
            curves.precision_recall[name] = _thinned(tp[1:] / tp[-1], tp[1:] / (tp[1:] + fp[1:]))
    if not metric.multi_label:
        known = ~np.isnan(labels).any(axis=1)
        truth, predicted = labels[known].argmax(axis=1), probabilities[known].argmax(axis=1)
        curves.confusion.extend(_confusion(truth, predicted, len(metric.classes)))
    return curves


def _detection(metric: DetectionMetrics, rows: Any) -> TaskCurves:
    curves = TaskCurves()
    for name, findings in zip(metric.classes, metric.findings(rows), strict=True):
        lesions, alarms = findings.lesion_score, findings.alarm_score
        curves.counts[name] = len(lesions)
        if len(lesions):
            scores = np.unique(np.concatenate([lesions[np.isfinite(lesions)], alarms]))[::-1]
            rate = np.searchsorted(-np.sort(alarms)[::-1], -scores, side="right") / len(rows)
            share = np.searchsorted(-np.sort(lesions)[::-1], -scores, side="right") / len(lesions)
            near = rate <= FALSE_ALARMS
            curves.froc[name] = _thinned([0.0, *rate[near]], [0.0, *share[near]])
    return curves


def _thinned(x: Sequence[float] | Floats, y: Sequence[float] | Floats) -> Curve:
    """Return a curve of at most ``MAX_POINTS`` points, as plain numbers."""
    kept = np.unique(np.linspace(0, len(x) - 1, min(len(x), MAX_POINTS)).round().astype(int))
    return Curve([float(x[k]) for k in kept], [float(y[k]) for k in kept])


def task_figure(
    curves: TaskCurves,
    reliability: TaskReliability,
    classes: Sequence[str],
    colours: Mapping[str, str] | None = None,
    unit: str = "",
) -> Figure | None:
    """Draw the curves of a task, up to three panels side by side.

    Args:
        curves: Curves of the task.
        reliability: Calibration of the task on the test images.
        classes: Classes of the task. Of two that exclude each other only the second is drawn; the first is its mirror
            image.
        colours: Colours by class; the default gives each class the next colour of ``COLOURS``.
        unit: Unit of the number of a regression.

    Returns:
        The figure, or ``None`` where there is nothing to draw.
    """
    skip_first = bool(curves.confusion) and len(classes) == 2
    palette = colours or {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(classes)}
    shown = {name: palette[name] for name in classes[skip_first:]}
    panels: list[Callable[[Axes], None]] = []
    roc, recall = _of(curves.roc, shown), _of(curves.precision_recall, shown)
    froc, dice = _of(curves.froc, shown), {name: values for name, values in curves.dice.items() if values}
    if roc:
        panels.append(lambda axis: _draw_roc(axis, roc, reliability, shown))
    if recall:
        panels.append(lambda axis: _draw_precision_recall(axis, recall, shown))
    if froc:
        panels.append(lambda axis: _draw_froc(axis, froc, shown))
    numbers = curves.numbers
    if numbers is not None and numbers.x:
        panels.append(lambda axis: _draw_numbers(axis, numbers, reliability.margin, unit))
        panels.append(lambda axis: _draw_differences(axis, numbers, unit))
    if dice:
        panels.append(lambda axis: _draw_dice(axis, dice, palette))
    if any(diagram.count.any() for diagram in reliability.diagrams.values()):
        panels.append(lambda axis: _draw_reliability(axis, reliability, shown))
    if not panels:
        return None
    with mpl.rc_context(STYLE):
        drawn = Figure(figsize=(max(4.6, 9.2 * len(panels) / 3), 3.4), layout="constrained")
        for axis, draw in zip(drawn.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            draw(axis)
    return drawn


def _of(lines: Mapping[str, Curve], shown: Mapping[str, str]) -> dict[str, Curve]:
    return {name: line for name, line in lines.items() if name in shown}


def _draw_roc(axis: Axes, lines: Mapping[str, Curve], reliability: TaskReliability, colours: Mapping[str, str]) -> None:
    axis.plot([0, 1], [0, 1], color=FAINT, ls=":", lw=1)
    for name, line in lines.items():
        axis.plot(line.x, line.y, color=colours[name], label=name)
        youden = reliability.thresholds.get(name, {}).get("youden")
        if youden is not None and youden.specificity is not None:
            axis.plot(1 - youden.specificity, youden.sensitivity, "o", color=colours[name], ms=6, mec=INK, mew=0.8)
    _unit_square(axis, "ROC", "1 − specificity", "sensitivity")


def _draw_precision_recall(axis: Axes, lines: Mapping[str, Curve], colours: Mapping[str, str]) -> None:
    for name, line in lines.items():
        axis.step(line.x, line.y, where="pre", color=colours[name], label=name)
    _unit_square(axis, "Precision and recall", "sensitivity (recall)", "precision")


def _draw_froc(axis: Axes, lines: Mapping[str, Curve], colours: Mapping[str, str]) -> None:
    for name, line in lines.items():
        last = max(line.x[-1], FALSE_ALARMS)
        axis.step([*line.x, last], [*line.y, line.y[-1]], where="post", color=colours[name], label=name)
    _unit_square(axis, "FROC", "false alarms per image", "sensitivity (lesions found)")
    axis.set_xlim(0, FALSE_ALARMS)


def _draw_dice(axis: Axes, values: Mapping[str, list[float]], colours: Mapping[str, str]) -> None:
    for name, dice in values.items():
        axis.hist(dice, bins=np.linspace(0, 1, 21).tolist(), color=colours[name], alpha=0.75, label=name)
    axis.set_title("Dice per image")
    axis.set_xlabel("Dice")
    axis.set_ylabel("images")
    axis.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axis.legend(fontsize=8.5, loc="upper left")


def _draw_numbers(axis: Axes, numbers: Curve, margin: float | None, unit: str) -> None:
    """Draw predictions over truths, with the diagonal and the interval."""
    low, high = min(*numbers.x, *numbers.y), max(*numbers.x, *numbers.y)
    space = 0.04 * (high - low) or 0.5
    ends = np.array([low - space, high + space])
    if margin is not None:
        axis.fill_between(ends, ends - margin, ends + margin, color=FAINT, alpha=0.18, lw=0)
    axis.plot(ends, ends, color=FAINT, ls=":", lw=1)
    axis.plot(numbers.x, numbers.y, "o", color=COLOURS[0], ms=4, alpha=0.6, mew=0)
    axis.set_title("Prediction and truth")
    axis.set(xlim=ends, ylim=ends, xlabel=_with_unit("truth", unit), ylabel=_with_unit("prediction", unit))


def _draw_differences(axis: Axes, numbers: Curve, unit: str) -> None:
    """Draw differences over means, with the bias and the limits of agreement (Bland and Altman)."""
    truth, predicted = np.array(numbers.x), np.array(numbers.y)
    difference = predicted - truth
    bias, spread = float(difference.mean()), float(difference.std())
    axis.axhline(0, color=FAINT, ls=":", lw=1)
    axis.axhline(bias, color=INK, lw=1, label=f"bias {bias:.3g}")
    for end in (bias - 1.96 * spread, bias + 1.96 * spread):
        axis.axhline(end, color=INK, lw=0.8, ls="--", label=None if end < bias else "95 % limits of agreement")
    axis.plot((truth + predicted) / 2, difference, "o", color=COLOURS[0], ms=4, alpha=0.6, mew=0)
    axis.set_title("Differences")
    axis.set(xlabel=_with_unit("mean of both", unit), ylabel=_with_unit("prediction − truth", unit))
    axis.legend(fontsize=8.5, loc="best")


def _with_unit(text: str, unit: str) -> str:
    return f"{text} ({unit})" if unit else text


def _draw_reliability(axis: Axes, reliability: TaskReliability, colours: Mapping[str, str]) -> None:
    axis.plot([0, 1], [0, 1], color=FAINT, ls=":", lw=1)
    for name, diagram in reliability.diagrams.items():
        colour, label = colours.get(name, COLOURS[0]), name or "predicted class"
        if name in reliability.raw_diagrams:
            raw = _filled_bins(reliability.raw_diagrams[name])
            axis.plot(raw.x, raw.y, color=colour, label=f"{label}, uncalibrated", ls="--", lw=1)
        line = _filled_bins(diagram)
        axis.plot(line.x, line.y, color=colour, label=label, marker="o", ms=3.5)
    _unit_square(axis, "Reliability", "predicted probability", "observed frequency")


def _filled_bins(diagram: Reliability) -> Curve:
    """Return confidence and accuracy of the bins that are not empty."""
    filled = ~np.isnan(diagram.confidence) & ~np.isnan(diagram.accuracy)
    return Curve(diagram.confidence[filled].tolist(), diagram.accuracy[filled].tolist())


def _unit_square(axis: Axes, title: str, x: str, y: str) -> None:
    axis.set_title(title)
    axis.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.02), xlabel=x, ylabel=y)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8.5, loc="best")
