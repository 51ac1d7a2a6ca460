"""Metrics of segmentation: overlap and surface distance per image and class."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from mtmedformer.batch import IGNORE, Meta, SegmentationTarget
from mtmedformer.metrics.base import Evaluate, Floats, TaskMetrics
from mtmedformer.metrics.curves import nan_mean, weighted_mean

COLUMNS = ("dice", "iou", "empty_correct", "hd95")


class SegmentationMetrics(TaskMetrics):
    """Score the masks of each image, then average over images; pixels that are not annotated never count.

    Per class, and overall as the mean over classes:

    - ``dice`` and ``iou``: over images in which the class is present. A missed structure scores 0. Images without
      the class are left out (empty against empty has no overlap to measure) and are scored by:
    - ``empty_correct``: the share of images without the class in which no pixel was predicted.
    - ``hd95``: 95th percentile of the Hausdorff distance in MONAI's definition (the larger of the two directed
      percentiles; other libraries pool or weight the distances and differ), **in pixels of the network's input**, over
      images where both masks are non-empty. Missed structures do not count: read it beside ``dice``.

    A mask is ``probability > threshold`` in multi-label tasks; in single-label tasks each pixel belongs to the most
    probable of the classes and the background, whose probability is what the classes leave of 1.

    Args:
        classes: Class names in channel order, without background.
        multi_label: Whether a pixel may be of several classes. A task of one class always counts as multi-label.
        threshold: Probability above which a pixel of a multi-label task belongs to the class.
        hausdorff: Whether to compute ``hd95`` (about 10 ms per image and class at 512 x 512).
    """

    primary = "dice"
    scores: list[Tensor]

    def __init__(
        self, classes: Sequence[str], multi_label: bool = False, threshold: float = 0.5, hausdorff: bool = True
    ) -> None:
        super().__init__(classes)
        self.multi_label = multi_label or len(self.classes) == 1
        self.threshold = threshold
        self.hausdorff = hausdorff
        self.add_rows("scores", torch.zeros(0, len(self.classes), len(self._columns), dtype=torch.float64))

    @property
    def _columns(self) -> tuple[str, ...]:
        return COLUMNS if self.hausdorff else COLUMNS[:-1]

    def update(self, predictions: Tensor, target: SegmentationTarget, meta: Sequence[Meta]) -> None:
        """Score the predicted probabilities (B, K, H, W) of the labelled images and keep the scores."""
        rows = self.register(meta, target.present)
        if not rows:
            return
        masks = target.masks[rows]
        known = masks != IGNORE
        predicted = binarise(predictions.detach()[rows], self.multi_label, self.threshold) & known
        scores = [*overlap(predicted, masks == 1, known)]
        if self.hausdorff:
            scores.append(hd95(predicted, masks == 1))
        self.scores.append(torch.stack(scores, dim=-1).cpu())

    @override
    def positives(self, rows: NDArray[np.int64]) -> dict[str, int]:
        there = (~np.isnan(self.table("scores").numpy()[rows][:, :, 0])).sum(axis=0)
        return dict(zip(self.classes, there.tolist(), strict=True))

    @override
    def prepare(self, rows: NDArray[np.int64]) -> Evaluate:
        scores = self.table("scores").numpy()[rows]
        names, classes = self._columns, self.classes

        def evaluate(weights: Floats) -> dict[str, Floats]:
            overall: dict[str, Floats] = {}
            named: dict[str, Floats] = {}
            for m, name in enumerate(names):
                values = [weighted_mean(scores[:, k, m], weights) for k in range(len(classes))]
                overall[name] = nan_mean(np.stack(values))
                named |= {f"{name}/{label}": value for label, value in zip(classes, values, strict=True)}
            return overall | named

        return evaluate


def binarise(probabilities: Tensor, multi_label: bool, threshold: float) -> Tensor:
    """Turn probabilities (B, K, H, W) into masks, bool (B, K, H, W); see ``SegmentationMetrics`` for the rule."""
    if multi_label:
        return probabilities > threshold
    best, winner = probabilities.max(dim=1, keepdim=True)
    foreground = best > 1 - probabilities.sum(dim=1, keepdim=True)
    return torch.zeros_like(probabilities, dtype=torch.bool).scatter_(1, winner, foreground)


def overlap(predicted: Tensor, truth: Tensor, known: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return dice, IoU and whether an empty mask was left empty, each float64 (B, K) with NaN where undefined.

    Args:
        predicted: bool (B, K, H, W) predicted masks, false where not annotated.
        truth: bool (B, K, H, W) true masks.
        known: bool (B, K, H, W) annotated pixels.
    """
    both, area, true_area = (m.sum(dim=(-2, -1)).double() for m in (predicted & truth, predicted, truth))
    dice = torch.where(true_area > 0, 2 * both / (area + true_area), torch.nan)
    iou = torch.where(true_area > 0, both / (area + true_area - both), torch.nan)
    empty = known.any(dim=-1).any(dim=-1) & (true_area == 0)
    return dice, iou, torch.where(empty, (area == 0).double(), torch.nan)


def hd95(predicted: Tensor, truth: Tensor) -> Tensor:
    """Return MONAI's 95 % Hausdorff distance in pixels, float64 (B, K) with NaN where either mask is empty."""
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance

    predicted, truth = predicted.cpu(), truth.cpu()
    result = torch.full(predicted.shape[:2], torch.nan, dtype=torch.float64)
    both = (predicted.flatten(2).any(dim=2) & truth.flatten(2).any(dim=2)).nonzero()
    for b, k in both.tolist():
        pair = predicted[b, k][None, None], truth[b, k][None, None]
        with warnings.catch_warnings():  # MONAI 1.6 calls its own function in a way that it deprecates
            warnings.filterwarnings("ignore", "monai.metrics.utils get_mask_edges", FutureWarning)
            result[b, k] = compute_hausdorff_distance(*pair, include_background=True, percentile=95).item()
    return result
