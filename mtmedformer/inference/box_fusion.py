"""Weighted boxes fusion: the boxes that several models predict in one image become one list."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]


def fuse_boxes(members: Sequence[dict[str, Tensor]], iou: float = 0.55) -> tuple[dict[str, Tensor], Tensor]:
    """Fuse the boxes of several models in one image.

    Boxes are taken by descending score. Each joins the fused box of its class with the largest overlap above ``iou``,
    or starts one of its own. A fused box has the mean coordinates of its boxes, weighted by their scores. Its score is
    their mean score, times the share of the models that found it: a box of one model out of five keeps a fifth.

    Args:
        members: For each model ``boxes`` (N, 4) xyxy, ``scores`` (N,) and ``labels`` (N,).
        iou: Overlap (intersection over union) above which two boxes are one object.

    Returns:
        The fused boxes in the same format, the best first, and the score of each fused box in each model (N, models):
        the largest one of its boxes, 0 where the model did not find it.

    Reference:
        Solovyev et al., Weighted boxes fusion: Ensembling boxes from different object detection models, Image and
        Vision Computing 107 (2021), with equal weights of the models.
    """
    boxes, scores = (np.concatenate([_array(one[name]) for one in members]) for name in ("boxes", "scores"))
    labels = np.concatenate([one["labels"].cpu().numpy() for one in members])
    origin = np.concatenate([np.full(len(one["labels"]), n) for n, one in enumerate(members)])
    clusters: list[list[int]] = []
    fused, kinds = np.zeros((len(boxes), 4)), np.zeros(len(boxes), labels.dtype)
    for i in np.argsort(-scores, kind="stable"):
        overlaps = np.where(
            kinds[: len(clusters)] == labels[i], _overlaps(boxes[i], fused[: len(clusters)]), 0.0
        )  # of other classes none
        best = int(overlaps.argmax()) if len(overlaps) else -1
        if best < 0 or overlaps[best] <= iou:
            best = len(clusters)
            clusters.append([])
            kinds[best] = labels[i]
        clusters[best].append(int(i))
        weights = np.maximum(scores[clusters[best]], np.finfo(np.float64).tiny)
        fused[best] = weights @ boxes[clusters[best]] / weights.sum()
    by_model = np.zeros((len(clusters), len(members)))
    total = np.zeros(len(clusters))
    for row, cluster in enumerate(clusters):
        np.maximum.at(by_model[row], origin[cluster], scores[cluster])
        total[row] = scores[cluster].mean() * min(len(cluster), len(members)) / len(members)
    order = np.argsort(-total, kind="stable")
    device, dtype = members[0]["boxes"].device, torch.float32
    return {
        "boxes": torch.from_numpy(fused[order]).to(device, dtype),
        "scores": torch.from_numpy(total[order]).to(device, dtype),
        "labels": torch.from_numpy(kinds[order]).to(device),
    }, torch.from_numpy(by_model[order]).to(device, dtype)


def _overlaps(box: Floats, others: Floats) -> Floats:
    """Return the intersection over union of a box (4,) with others (N, 4)."""
    size = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    shared = np.prod(np.maximum(size, 0), axis=1)
    areas = np.prod(others[:, 2:] - others[:, :2], axis=1) + np.prod(box[2:] - box[:2])
    overlaps: Floats = shared / np.maximum(areas - shared, np.finfo(np.float64).tiny)
    return overlaps


def _array(values: Tensor) -> Floats:
    converted: Floats = values.double().cpu().numpy()
    return converted
