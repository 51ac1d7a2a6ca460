"""What a report draws of a task: ROC, precision and recall, FROC, confusion, Dice by image, reliability."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mtmedformer.metrics.base import TaskMetrics
from mtmedformer.metrics.classification import ClassificationMetrics
from mtmedformer.metrics.curves import Floats, counts_above, operating_points
from mtmedformer.metrics.detection import DetectionMetrics
from mtmedformer.metrics.segmentation import SegmentationMetrics
from mtmedformer.plots.style import COLOURS, FAINT, INK, STYLE

Facts = dict[str, Any]
FALSE_ALARMS = 8.0
"""False alarms an image up to which a FROC curve is drawn."""
MOST_POINTS = 1000
"""Points of a curve; of more, as many are kept at even distances, the first and the last among them."""


def curves_of(metric: TaskMetrics) -> Facts:
    """Return what there is to draw of a task's test images; in distributed runs the metric has to be gathered.

    Returns:
        ``counts``, images (boxes for detection) by class; then for classification ``roc`` (false positive rate, true
        positive rate) and ``pr`` (recall, precision) by class, and ``confusion``, true by predicted class, where
        classes exclude each other; for detection ``froc`` (false alarms an image, sensitivity) by class; for
        segmentation ``dice`` of every image by class.
    """
    rows = metric.seen().rows
    if isinstance(metric, ClassificationMetrics):
        return _classification(metric, rows)
    if isinstance(metric, DetectionMetrics):
        found: Facts = {"counts": {}, "froc": {}}
        for name, findings in zip(metric.classes, metric.findings(rows), strict=True):
            lesions, alarms = findings.lesion_score, findings.alarm_score
            found["counts"][name] = len(lesions)
            if len(lesions):
                scores = np.unique(np.concatenate([lesions[np.isfinite(lesions)], alarms]))[::-1]
                rate = np.searchsorted(-np.sort(alarms)[::-1], -scores, side="right") / len(rows)
                share = np.searchsorted(-np.sort(lesions)[::-1], -scores, side="right") / len(lesions)
                near = rate <= FALSE_ALARMS
                found["froc"][name] = _thinned([0.0, *rate[near]], [0.0, *share[near]])
        return found
    if isinstance(metric, SegmentationMetrics):
        scores = metric.table("scores").numpy()[rows][:, :, 0]
        known = {name: scores[~np.isnan(scores[:, k]), k] for k, name in enumerate(metric.classes)}
        return {"counts": {n: len(v) for n, v in known.items()}, "dice": {n: v.tolist() for n, v in known.items()}}
    return {"counts": {}}


def _classification(metric: ClassificationMetrics, rows: Any) -> Facts:
    probabilities = metric.table("probabilities").numpy()[rows].astype(np.float64)
    labels = metric.table("labels").numpy()[rows].astype(np.float64)
    if not metric.multi_label:
        labels[np.isnan(labels).any(axis=1)] = np.nan
    found: Facts = {"counts": {}, "roc": {}, "pr": {}}
    for k, name in enumerate(metric.classes):
        known = ~np.isnan(labels[:, k])
        truth = labels[known, k] == 1
        found["counts"][name] = int(truth.sum())
        if truth.any() and not truth.all():
            order, ends = operating_points(probabilities[known, k])
            tp = counts_above(truth[order][None].astype(np.float64), ends)[0]
            fp = counts_above((~truth[order])[None].astype(np.float64), ends)[0]
            found["roc"][name] = _thinned(fp / fp[-1], tp / tp[-1])
            found["pr"][name] = _thinned(tp[1:] / tp[-1], tp[1:] / (tp[1:] + fp[1:]))
    if not metric.multi_label:
        known = ~np.isnan(labels).any(axis=1)
        table = np.zeros((len(metric.classes), len(metric.classes)), np.int64)
        np.add.at(table, (labels[known].argmax(axis=1), probabilities[known].argmax(axis=1)), 1)
        found["confusion"] = table.tolist()
    return found


def _thinned(x: Sequence[float] | Floats, y: Sequence[float] | Floats) -> list[list[float]]:
    """Return a curve of no more than ``MOST_POINTS`` points, as plain numbers."""
    kept = np.unique(np.linspace(0, len(x) - 1, min(len(x), MOST_POINTS)).round().astype(int))
    return [[float(values[k]) for k in kept] for values in (x, y)]


def task_figure(curves: Facts, reliability: Facts, classes: list[str]) -> Figure | None:
    """Draw all there is of a task, up to three panels side by side.

    Args:
        curves: What ``curves_of`` returned.
        reliability: The task's part of ``reliability.json``, possibly empty.
        classes: The task's classes; one of two that exclude each other is drawn, for the other is its mirror.
    """
    two = "confusion" in curves and len(classes) == 2
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(classes) if not (two and i == 0)}
    panels = [draw for draw in (_roc, _recall, _froc, _dice, _reliable) if draw(None, curves, reliability, colours)]
    if not panels:
        return None
    with mpl.rc_context(STYLE):
        drawn = Figure(figsize=(max(4.6, 9.2 * len(panels) / 3), 3.4), layout="constrained")
        for axis, draw in zip(drawn.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            draw(axis, curves, reliability, colours)
    return drawn


def _roc(axis: Axes | None, curves: Facts, reliability: Facts, colours: dict[str, str]) -> bool:
    lines = {name: line for name, line in curves.get("roc", {}).items() if name in colours}
    if axis is not None:
        axis.plot([0, 1], [0, 1], color=FAINT, ls=":", lw=1)
        for name, (x, y) in lines.items():
            axis.plot(x, y, color=colours[name], label=name)
            for point, reached in reliability.get("thresholds", {}).get(name, {}).items():
                if point == "youden" and reached.get("specificity") is not None:
                    spot = (1 - reached["specificity"], reached["sensitivity"])
                    axis.plot(*spot, "o", color=colours[name], ms=6, mec=INK, mew=0.8)
        _square(axis, "ROC", "1 − specificity", "sensitivity")
    return bool(lines)


def _recall(axis: Axes | None, curves: Facts, reliability: Facts, colours: dict[str, str]) -> bool:
    lines = {name: line for name, line in curves.get("pr", {}).items() if name in colours}
    if axis is not None:
        for name, (x, y) in lines.items():
            axis.step(x, y, where="pre", color=colours[name], label=name)
        _square(axis, "Precision and recall", "sensitivity (recall)", "precision")
    return bool(lines)


def _froc(axis: Axes | None, curves: Facts, reliability: Facts, colours: dict[str, str]) -> bool:
    lines = {name: line for name, line in curves.get("froc", {}).items() if name in colours}
    if axis is not None:
        for name, (x, y) in lines.items():
            last = max(x[-1], FALSE_ALARMS)
            axis.step([*x, last], [*y, y[-1]], where="post", color=colours[name], label=name)
        _square(axis, "FROC", "false alarms an image", "sensitivity (lesions found)")
        axis.set_xlim(0, FALSE_ALARMS)
    return bool(lines)


def _dice(axis: Axes | None, curves: Facts, reliability: Facts, colours: dict[str, str]) -> bool:
    values: dict[str, Any] = {name: v for name, v in curves.get("dice", {}).items() if v}
    if axis is not None:
        for name, dice in values.items():
            axis.hist(dice, bins=np.linspace(0, 1, 21).tolist(), color=colours[name], alpha=0.75, label=name)
        axis.set_title("Dice of each image")
        axis.set_xlabel("Dice")
        axis.set_ylabel("images")
        axis.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axis.legend(fontsize=8.5, loc="upper left")
    return bool(values)


def _reliable(axis: Axes | None, curves: Facts, reliability: Facts, colours: dict[str, str]) -> bool:
    diagrams: dict[str, Any] = reliability.get("bins", {})
    if axis is not None:
        axis.plot([0, 1], [0, 1], color=FAINT, ls=":", lw=1)
        for name in diagrams:
            colour = colours.get(name, COLOURS[0])
            for kind, style in (("bins_raw", {"ls": "--", "lw": 1}), ("bins", {"marker": "o", "ms": 3.5})):
                drawn = reliability.get(kind, {}).get(name)
                if drawn:
                    x, y = _known(drawn)
                    label = (name or "decision") + (" before scaling" if kind == "bins_raw" else "")
                    axis.plot(x, y, color=colour, label=label, **style)  # type: ignore[arg-type]
        _square(axis, "Reliability", "probability said", "share that was so")
    return any(any(bins["count"]) for bins in diagrams.values())


def _known(bins: Facts) -> tuple[Floats, Floats]:
    """Return confidence and accuracy of the bins that hold something."""
    x, y = (np.array([np.nan if v is None else v for v in bins[name]], float) for name in ("confidence", "accuracy"))
    there = ~np.isnan(x) & ~np.isnan(y)
    return x[there], y[there]


def _square(axis: Axes, title: str, x: str, y: str) -> None:
    axis.set_title(title)
    axis.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.02), xlabel=x, ylabel=y)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8.5, loc="best")
