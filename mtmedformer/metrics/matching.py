"""Match predicted boxes with true boxes."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def box_iou(predicted: Floats, true: Floats) -> Floats:
    """Return the intersection over union of xyxy boxes (N, 4) and (M, 4) as (N, M); 0 for boxes without area."""
    low = np.maximum(predicted[:, None, :2], true[None, :, :2])
    high = np.minimum(predicted[:, None, 2:], true[None, :, 2:])
    shared = np.prod(np.clip(high - low, 0, None), axis=2)
    sizes = [np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) for boxes in (predicted, true)]
    union = sizes[0][:, None] + sizes[1][None, :] - shared
    iou: Floats = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    return iou


def match(iou: Floats, thresholds: Floats) -> Bools:
    """Match boxes one to one as COCO does and return which predictions are true positives.

    Going down the scores, each prediction takes the free true box it overlaps most, if by at least the threshold.

    Args:
        iou: (N, M), predictions by falling score.
        thresholds: (T,).

    Returns:
        (N, T).
    """
    hit = np.zeros((len(iou), len(thresholds)), dtype=bool)
    if not iou.size:
        return hit
    free = np.ones((len(thresholds), iou.shape[1]), dtype=bool)
    each = np.arange(len(thresholds))
    last = iou.shape[1] - 1
    for n in np.flatnonzero(iou.max(axis=1) >= thresholds.min()):
        overlap = np.where(free, iou[n], -1.0)
        best = last - overlap[:, ::-1].argmax(axis=1)  # of equal overlaps COCO takes the last
        hit[n] = overlap[each, best] >= thresholds
        free[each[hit[n]], best[hit[n]]] = False
    return hit


def hits(predicted: Floats, true: Floats, rule: Literal["iou", "centre"], iou: float) -> Bools:
    """Return which prediction hits which true box, (N, M); one may hit several and be hit by several.

    Args:
        predicted: (N, 4) xyxy.
        true: (M, 4) xyxy.
        rule: ``iou``: they overlap by at least ``iou``; ``centre``: the prediction's centre lies in the true box.
        iou: Least overlap of the rule ``iou``.
    """
    if rule == "iou":
        return box_iou(predicted, true) >= iou
    centre = (predicted[:, None, :2] + predicted[:, None, 2:]) / 2
    inside: Bools = np.all((centre >= true[None, :, :2]) & (centre < true[None, :, 2:]), axis=2)
    return inside
