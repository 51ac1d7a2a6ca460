"""The best, the middling and the worst test images of each task, with truth and prediction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

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
    SegmentationTarget,
    Target,
    Task,
)
from mtmedformer.metrics.matching import box_iou, match
from mtmedformer.metrics.segmentation import binarise, overlap
from mtmedformer.plots.overlays import overlay_figure

Case = tuple[float, int]
"""How good the prediction of an image is, from 0 to 1, and the image's place in the test set."""

IOU, SCORE = 0.3, 0.4
"""A box counts as shown above this score, and as right when it overlaps a true box of its class by this much."""


def quality(task: Task, prediction: Any, target: Target, i: int) -> float | None:
    """Return how good the prediction of one image of a batch is, from 0 to 1.

    Classification: the mean probability given to what is so. Segmentation: the mean Dice of the classes that are there;
    0 where none is and something was drawn. Detection: F1 of the boxes that are shown; where nothing is there, one over
    one and the number of false alarms. ``None`` where the truth is unknown, and where nothing is there and nothing was
    drawn, for there is nothing to see.

    Args:
        task: The task.
        prediction: Of the whole batch, as ``TaskHead.predict`` returns it.
        target: Of the whole batch.
        i: Place of the image in the batch.
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
        found = binarise(prediction[i : i + 1].detach(), task.multi_label or len(task.classes) == 1, 0.5) & known
        dice, _, empty = (part[0].cpu() for part in overlap(found, masks == 1, known))
        if bool((~dice.isnan()).any()):
            return float(dice[~dice.isnan()].mean())
        return 0.0 if bool((empty == 0).any()) else None
    return _boxes(prediction[i], target, i)


def _boxes(found: Mapping[str, torch.Tensor], target: DetectionTarget, i: int) -> float | None:
    shown = (found["scores"] >= SCORE).cpu().numpy()
    boxes, labels = (found[name].detach().cpu().numpy()[shown] for name in ("boxes", "labels"))
    true, classes = target.boxes[i].cpu().numpy(), target.labels[i].cpu().numpy()
    if not len(true):
        return 1 / (1 + len(boxes)) if len(boxes) else None
    right = 0
    for k in np.unique(classes):
        iou = box_iou(boxes[labels == k].astype(float), true[classes == k].astype(float))
        right += int(match(iou, np.array([IOU])).sum())
    return 2 * right / (len(boxes) + len(true))


def chosen(cases: Sequence[Case]) -> dict[str, Case]:
    """Return the worst, the median and the best of the cases of a task; fewer where there are fewer images."""
    ranked = sorted(case for case in cases if not math.isnan(case[0]))
    if not ranked:
        return {}
    picked = {"worst": ranked[0], "median": ranked[(len(ranked) - 1) // 2], "best": ranked[-1]}
    first = {case[1]: name for name, case in reversed(picked.items())}
    return {name: case for name, case in picked.items() if first[case[1]] == name}


def case_figure(
    task: Task, picked: Mapping[str, Case], images: Sequence[Batch], predictions: Sequence[dict[str, Any]]
) -> Figure:
    """Draw the picked images of a task, a row each, with truth and prediction; close the figure after use.

    Args:
        task: The one task that is drawn.
        picked: What ``chosen`` returned.
        images: The images, as batches of one.
        predictions: Their predictions by task.
    """
    with mpl.rc_context({"backend": "agg", "text.parse_math": False}):
        drawn = overlay_figure(images, predictions, {task.name: task}, SCORE)
        for (name, (good, place)), axis in zip(picked.items(), drawn.axes[::3], strict=True):
            axis.set_ylabel(f"{name} ({good:.2f})\ntest image {place + 1}", fontsize=9)
        plt.close(drawn)
    return drawn
