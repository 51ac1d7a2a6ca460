"""Referral: the Dice of the images that remain when the most uncertain ones are referred to a reader."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from mtmedformer.batch import IGNORE, Meta, SegmentationTarget, Task
from mtmedformer.metrics.base import Evaluate, Floats, TaskMetrics, entropy
from mtmedformer.metrics.curves import ratio
from mtmedformer.metrics.segmentation import binarise, overlap

COVERAGE = 0.8
"""Share of the images that is kept."""


class ReferralMetrics(TaskMetrics):
    r"""Rank the images of a segmentation task by uncertainty, and score those that remain after referral.

    The uncertainty of an image is the predictive entropy of its pixels over the predicted area,
    $\sum_p H(p) / \sum_p p$, in nats: entropy is high at borders, and large structures have long ones.

    - ``dice_at80``: mean Dice of the 80 % most certain images; ``gain_at80``: that, minus the mean Dice of all.
    - ``aurc``: area under the risk-coverage curve, the mean over all coverages of 1 - Dice; lower is better.

    An image's Dice is the mean over the classes it has; images without any are left out, as in ``SegmentationMetrics``.

    Args:
        task: A segmentation task.
        threshold: Probability above which a pixel of a multi-label task belongs to the class.

    Reference:
        Geifman and El-Yaniv, Selective classification for deep neural networks, NeurIPS 2017 (risk and coverage).
    """

    primary = "dice_at80"
    scores: list[Tensor]

    def __init__(self, task: Task, threshold: float = 0.5) -> None:
        super().__init__(task.classes)
        self.task, self.threshold = task, threshold
        self.multi_label = task.multi_label or len(task.classes) == 1
        self.add_rows("scores", torch.zeros(0, 2, dtype=torch.float64))

    def update(self, predictions: Tensor, target: SegmentationTarget, meta: Sequence[Meta]) -> None:
        """Keep Dice and uncertainty of each labelled image, but no pixels."""
        rows = self.register(meta, target.present)
        if not rows:
            return
        p, masks = predictions.detach()[rows].float(), target.masks[rows]
        known = masks != IGNORE
        dice, _, _ = overlap(binarise(p, self.multi_label, self.threshold) & known, masks == 1, known)
        self.scores.append(torch.stack([dice.nanmean(dim=1), mask_uncertainty(p, self.multi_label)], dim=1).cpu())

    @override
    def prepare(self, rows: NDArray[np.int64]) -> Evaluate:
        scores = self.table("scores").numpy()[rows]
        scored = np.flatnonzero(~np.isnan(scores[:, 0]))
        ranked = scored[np.argsort(scores[scored, 1], kind="stable")]
        dice = scores[ranked, 0]

        def evaluate(weights: Floats) -> dict[str, Floats]:
            counts = weights[:, ranked].astype(np.float64)
            reached = np.cumsum(counts, axis=1)
            total = counts.sum(axis=1)
            left = COVERAGE * total[:, None] - (reached - counts)
            kept = np.clip(left, 0, counts)
            at = ratio(kept @ dice, kept.sum(axis=1))
            risks = ratio(np.cumsum(counts * (1 - dice), axis=1), reached)  # of the most certain images up to each
            aurc = ratio((counts * np.nan_to_num(risks)).sum(axis=1), total)
            return {"dice_at80": at, "gain_at80": at - ratio(counts @ dice, total), "aurc": aurc}

        return evaluate


def mask_uncertainty(probabilities: Tensor, multi_label: bool) -> Tensor:
    """Return the uncertainty of each mask: entropy of its pixels over the predicted area, in nats, float64 (B,).

    Args:
        probabilities: (B, K, H, W) as ``TaskHead.predict`` gives them.
        multi_label: Whether classes are decided one by one; otherwise they and the background exclude one another.
    """
    p = probabilities.double()
    if multi_label:
        open_at = entropy(p)
    else:
        open_at = entropy(torch.cat([p, (1 - p.sum(dim=1, keepdim=True)).clamp_min(0)], dim=1), classes=1)
    return open_at.flatten(1).sum(dim=1) / p.flatten(1).sum(dim=1).clamp_min(1)
