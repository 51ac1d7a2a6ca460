"""The best, median and worst test images of a task, with truth and prediction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure

from mtmedformer.batch import (
    IGNORE,
    Batch,
    ClassificationTarget,
    DetectionTarget,
    RegressionTarget,
    SegmentationTarget,
    Target,
    Task,
)
from mtmedformer.metrics.matching import box_iou, match
from mtmedformer.metrics.regression import median_grade
from mtmedformer.metrics.segmentation import binarise, overlap
from mtmedformer.plots.overlays import overlay_figure

IOU, SCORE = 0.3, 0.4
"""A box is drawn from this score on; it is correct if it overlaps a true box of its class by this much."""


class Case(NamedTuple):
    """A test image.

    Attributes:
        quality: Quality of its prediction, from 0 to 1.
        position: Its position in the test set.
        classes: The classes of the task that are true in it.
    """

    quality: float
    position: int
    classes: tuple[str, ...] = ()


def prediction_quality(task: Task, prediction: Any, target: Target, i: int) -> float | None:
    """Rate the prediction of one image of a batch from 0 to 1.

    Classification: mean probability of the true labels. Segmentation: mean Dice of the classes that are present; 0
    where none is present and something was predicted. Detection: F1 of the boxes with a sufficient score; without a
    true box ``1 / (1 + false alarms)``. Regression: 1 minus the error as a share of the range, or of the distance of
    the lowest and the highest grade. ``None`` where the truth is unknown, and where nothing is present and nothing was
    predicted.

    Args:
        task: The task.
        prediction: Prediction of the whole batch, as ``TaskHead.predict`` returns it.
        target: Target of the whole batch.
        i: Index of the image in the batch.
    """
    if not bool(target.present[i]):
        return None
    if isinstance(target, ClassificationTarget):
        p, truth = prediction[i].float().cpu(), target.labels[i].cpu()
        known = ~truth.isnan()
        if not task.multi_label and len(task.classes) > 1:
            return float((p * truth).sum()) if bool(known.all()) else None
        return float(torch.where(truth == 1, p, 1 - p)[known].mean()) if bool(known.any()) else None
    if isinstance(target, SegmentationTarget):
        masks = target.masks[i : i + 1]
        known = masks != IGNORE
        predicted = binarise(prediction[i : i + 1].detach(), task.multi_label or len(task.classes) == 1, 0.5) & known
        dice, _, empty = (part[0].cpu() for part in overlap(predicted, masks == 1, known))
        if bool((~dice.isnan()).any()):
            return float(dice[~dice.isnan()].mean())
        return 0.0 if bool((empty == 0).any()) else None
    if isinstance(target, RegressionTarget):
        return _value_quality(task, prediction[i], target, i)
    return _box_quality(prediction[i], target, i)


def _value_quality(task: Task, prediction: torch.Tensor, target: RegressionTarget, i: int) -> float:
    """Return 1 minus the error as a share of the range, or of the largest possible distance of grades."""
    truth = float(target.values[i])
    if task.classes:
        return 1 - abs(int(median_grade(prediction[None])) - truth) / (len(task.classes) - 1)
    low, high = task.range or (0.0, 1.0)
    return max(0.0, 1 - abs(float(prediction[0]) - truth) / (high - low))


def _box_quality(prediction: Mapping[str, torch.Tensor], target: DetectionTarget, i: int) -> float | None:
    drawn = (prediction["scores"] >= SCORE).cpu().numpy()
    boxes, labels = (prediction[name].detach().cpu().numpy()[drawn] for name in ("boxes", "labels"))
    true_boxes, true_labels = target.boxes[i].cpu().numpy(), target.labels[i].cpu().numpy()
    if not len(true_boxes):
        return 1 / (1 + len(boxes)) if len(boxes) else None
    correct = 0
    for k in np.unique(true_labels):
        iou = box_iou(boxes[labels == k].astype(float), true_boxes[true_labels == k].astype(float))
        correct += int(match(iou, np.array([IOU])).sum())
    return 2 * correct / (len(boxes) + len(true_boxes))


def select_cases(cases: Sequence[Case], classes: Sequence[str] = ()) -> dict[str, Case]:
    """Return the ``worst``, ``median`` and ``best`` case, and the median case of each class that is in none of them.

    Args:
        cases: The cases; fewer than three give fewer names.
        classes: Classes of the task.
    """
    ranked = sorted(case for case in cases if not math.isnan(case.quality))
    if not ranked:
        return {}
    selected = {"worst": ranked[0], "median": ranked[(len(ranked) - 1) // 2], "best": ranked[-1]}
    for name in classes:
        own = [case for case in ranked if name in case.classes]
        if own and not any(name in case.classes for case in selected.values()):
            selected[f"{name}, median"] = own[(len(own) - 1) // 2]
    first_name = {case.position: name for name, case in reversed(selected.items())}
    return {name: case for name, case in selected.items() if first_name[case.position] == name}


def case_figure(
    task: Task,
    cases: Mapping[str, Case],
    images: Sequence[Batch],
    predictions: Sequence[dict[str, Any]],
    colours: Mapping[tuple[str, str], str],
) -> Figure:
    """Draw the selected images of a task, one per row, with truth and prediction.

    Args:
        task: The task that is drawn.
        cases: The cases by name, from ``select_cases``.
        images: The images, as batches of one.
        predictions: Their predictions by task.
        colours: Colours of masks and boxes by task and class.
    """
    with mpl.rc_context({"backend": "agg", "text.parse_math": False}):
        drawn = overlay_figure(images, predictions, {task.name: task}, SCORE, colours)
        for (name, case), axis in zip(cases.items(), drawn.axes[::3], strict=True):
            axis.set_ylabel(f"{name} ({case.quality:.2f})\ntest image {case.position + 1}", fontsize=9)
        plt.close(drawn)
    return drawn
