"""COCO's average precision: the official number, and the same for many weightings of the images at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torchmetrics.detection import MeanAveragePrecision

Floats = NDArray[np.float64]

THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""IoU thresholds 0.50, 0.55 … 0.95."""
RECALLS = np.linspace(0, 1, 101)
MAX_DETECTIONS = 100
"""Boxes per image and class, the highest scores, that COCO looks at."""


@dataclass(frozen=True)
class Ranked:
    """Predictions of one class in the whole data set, by falling score.

    Attributes:
        image: (D,) image of each prediction.
        hit: (D, T) whether it is a true positive at each IoU threshold.
        true: (n,) number of true boxes in each image.
    """

    image: NDArray[np.int64]
    hit: NDArray[np.bool_]
    true: Floats


def average_precisions(ranked: Ranked, weights: Floats) -> Floats:
    """Return the average precision at each IoU threshold, (R, T), NaN without true boxes.

    Precision at 101 recalls, each the highest at that recall or beyond, as in pycocotools. Only true positives can
    raise recall or start a new highest precision, so false positives are merely counted.

    Args:
        ranked: Matched predictions.
        weights: (R, n) how often each image counts.
    """
    total = weights @ ranked.true
    result = np.zeros((len(weights), ranked.hit.shape[1]))
    above = np.cumsum(weights[:, ranked.image], axis=1)
    for t in range(ranked.hit.shape[1]):
        places = np.flatnonzero(ranked.hit[:, t])
        if not len(places):
            continue
        tp = np.cumsum(weights[:, ranked.image[places]], axis=1)
        precision = tp / (above[:, places] + np.spacing(1))
        best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        recall = tp / np.maximum(total, 1)[:, None]
        for r in range(len(weights)):
            reached = np.searchsorted(recall[r], RECALLS, side="left")
            result[r, t] = best[r, reached[reached < len(places)]].sum() / len(RECALLS)
    return np.where(total[:, None] > 0, result, np.nan)


def official_average_precisions(
    predicted: list[tuple[Floats, Floats, NDArray[np.int64]]],
    true: list[tuple[Floats, NDArray[np.int64]]],
    classes: int,
) -> Floats:
    """Return torchmetrics' average precision per class and IoU threshold, (K, T), NaN without true boxes.

    Args:
        predicted: Per image boxes (N, 4) xyxy, scores (N,) and labels (N,).
        true: Per image boxes (M, 4) and labels (M,).
        classes: Number of classes K.
    """
    result = np.full((classes, len(THRESHOLDS)), np.nan)
    if not sum(len(labels) for _, labels in true):
        return result
    metric = MeanAveragePrecision(
        iou_thresholds=THRESHOLDS.tolist(),  # torchmetrics' own are float32, so recalls and overlaps that
        rec_thresholds=RECALLS.tolist(),  # equal a threshold fall on the other side of it than in pycocotools
        extended_summary=True,
        backend="faster_coco_eval",
        sync_on_compute=False,  # the rows are gathered already
    )
    metric.warn_on_many_detections = False
    metric.update(
        [{"boxes": _boxes(b), "scores": torch.from_numpy(s), "labels": torch.from_numpy(k)} for b, s, k in predicted],
        [{"boxes": _boxes(b), "labels": torch.from_numpy(k)} for b, k in true],
    )
    values = metric.compute()
    every_size, most_boxes = 0, -1
    precision = values["precision"][..., every_size, most_boxes].double().mean(dim=1).numpy()
    seen = np.atleast_1d(values["classes"].numpy())
    result[seen] = np.where(precision.T < 0, np.nan, precision.T)
    return result


def _boxes(boxes: Floats) -> torch.Tensor:
    return torch.from_numpy(boxes).float()
