"""How far probabilities mean what they say: reliability bins and likelihood, for classes and for pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtmedformer.batch import IGNORE, ClassificationTarget, Meta, SegmentationTarget, Task
from mtmedformer.metrics.base import Evaluate, Floats, TaskMetrics
from mtmedformer.metrics.curves import mean_known, ratio

SMALLEST = float(np.finfo(np.float32).eps)
"""Probabilities are kept this far from 0 in the log-likelihood, as in ``ClassificationMetrics``."""


@dataclass(frozen=True)
class Reliability:
    """What was said against what was so, by bins of what was said.

    Attributes:
        edges: (bins + 1,) edges of the bins ``[a, b)``; a confidence of exactly 1 is a last bin of its own.
        count: (bins + 1,) decisions in each bin.
        confidence: (bins + 1,) mean confidence, NaN where a bin is empty.
        accuracy: (bins + 1,) share that was so, NaN where a bin is empty.
    """

    edges: Floats
    count: Floats
    confidence: Floats
    accuracy: Floats

    @property
    def ece(self) -> float:
        """Expected calibration error: the gap of each bin, weighted by its share; NaN without a decision."""
        gaps = np.nan_to_num(np.abs(self.accuracy - self.confidence)) * self.count
        return float(ratio(np.asarray(gaps.sum()), np.asarray(self.count.sum())))


def reliability(probabilities: Floats, targets: Floats, bins: int = 15) -> Reliability:
    """Bin confidences and count how often each was right.

    Args:
        probabilities: Confidence of each decision in [0, 1], any shape.
        targets: Whether it was so, 0 or 1, same shape; NaN counts nowhere.
        bins: Number of equally wide bins.
    """
    p = torch.as_tensor(np.asarray(probabilities, dtype=np.float64)).reshape(1, 1, -1)
    y = torch.as_tensor(np.asarray(targets, dtype=np.float64)).reshape(1, 1, -1)
    return _binned(bin_sums(p, y, bins)[0, 0].numpy(), bins)


def decisions(task: Task, probabilities: Tensor, target: ClassificationTarget | SegmentationTarget) -> list[Tensor]:
    """Return confidence, correctness and likelihood of the truth for each decision of a batch of B images.

    Args:
        task: A classification or segmentation task.
        probabilities: (B, K) or (B, K, H, W), as ``TaskHead.predict`` gives them.
        target: The batch's target.

    Returns:
        Three tensors (B, M, P), NaN where unknown, M rows of P decisions. Exclusive classes (pixels: and background)
        are one row: the probability of the likeliest, whether it is the true one, the probability of the true one.
        Otherwise each class is a row: its probability, whether it is there, the probability of what is so.
    """
    p = probabilities.flatten(2) if probabilities.ndim > 2 else probabilities[:, :, None]
    if isinstance(target, ClassificationTarget):
        truth = target.labels.to(p.dtype)[:, :, None]
    else:
        truth = target.masks.to(p.dtype).masked_fill(target.masks == IGNORE, torch.nan).flatten(2)
    truth = truth.masked_fill(~target.present[:, None, None], torch.nan)
    if task.multi_label or len(task.classes) == 1:
        return [p.masked_fill(truth.isnan(), torch.nan), truth, torch.where(truth == 1, p, 1 - p) + 0 * truth]
    if isinstance(target, SegmentationTarget):
        p = torch.cat([(1 - p.sum(1, keepdim=True)).clamp_min(0), p], dim=1)
        inside = (truth == 1).any(1, keepdim=True)
        truth = torch.where(inside, (truth == 1).to(p.dtype), truth)
        truth = torch.cat([torch.where(inside, 0.0, 1 - truth.sum(1, keepdim=True)), truth], dim=1)
    unknown = truth.isnan().any(1, keepdim=True)
    confidence, winner = p.max(1, keepdim=True)
    right = truth.gather(1, winner)
    likelihood = (p * truth.nan_to_num(0.0)).sum(1, keepdim=True)
    return [part.masked_fill(unknown, torch.nan) for part in (confidence, right, likelihood)]


def bin_sums(confidence: Tensor, correct: Tensor, bins: int) -> Tensor:
    """Return count, sum of confidence and sum of correctness by bin, float64 (B, M, bins + 1, 3).

    Args:
        confidence: (B, M, P) in [0, 1]; NaN where unknown.
        correct: (B, M, P) 0 or 1; NaN where unknown.
        bins: Number of equally wide bins ``[a, b)``; a confidence of exactly 1 is a bin of its own, as in torchmetrics.
    """
    known = ~(confidence.isnan() | correct.isnan())
    edges = torch.linspace(0, 1, bins + 1, device=confidence.device)
    place = torch.bucketize(confidence.nan_to_num(0.0).float().contiguous(), edges, right=True) - 1
    place = place.clamp(0, bins)
    parts = torch.stack([known.double(), confidence.nan_to_num(0.0).double() * known, correct.nan_to_num(0.0).double()])
    sums = parts.new_zeros(3, *confidence.shape[:2], bins + 1)
    sums.scatter_add_(3, place.expand(3, *place.shape), parts * known)
    return sums.permute(1, 2, 3, 0)


class CalibrationMetrics(TaskMetrics):
    """Score probabilities of classes or pixels by what they promise; see ``decisions`` for what is scored.

    ``ece`` is the expected calibration error, ``nll`` the negative log-likelihood a decision, in nats. For
    classification both are those of ``ClassificationMetrics``. Classes that may hold at once are scored one by one as
    ``<metric>/<class>``, and their mean is the overall value.

    Args:
        task: A classification or segmentation task.
        bins: Number of bins of the calibration error.
    """

    primary = "ece"
    higher_is_better = False
    sums: list[Tensor]
    surprise: list[Tensor]

    def __init__(self, task: Task, bins: int = 15) -> None:
        super().__init__(task.classes)
        self.task, self.bins = task, bins
        self.names = task.classes if task.multi_label or len(task.classes) == 1 else ("",)
        self.add_rows("sums", torch.zeros(0, len(self.names), bins + 1, 3, dtype=torch.float64))
        self.add_rows("surprise", torch.zeros(0, len(self.names), dtype=torch.float64))

    def update(
        self, predictions: Tensor, target: ClassificationTarget | SegmentationTarget, meta: Sequence[Meta]
    ) -> None:
        """Keep the bins and the log-likelihood of each labelled image's probabilities, never a pixel."""
        rows = self.register(meta, target.present)
        if rows:
            confidence, correct, likelihood = decisions(self.task, predictions.detach().float(), target)
            self.sums.append(bin_sums(confidence[rows], correct[rows], self.bins).cpu())
            surprise = -likelihood[rows].clamp_min(SMALLEST).log()  # NaN stays NaN
            self.surprise.append(surprise.double().nansum(2).cpu())

    def prepare(self, rows: NDArray[np.int64]) -> Evaluate:
        """Select the rows; see ``TaskMetrics.prepare``."""
        sums, surprise = self.table("sums").numpy()[rows], self.table("surprise").numpy()[rows]
        names = self.names

        def evaluate(weights: Floats) -> dict[str, Floats]:
            binned = np.einsum("rn,nmbs->rmbs", weights, sums)
            counts = binned[..., 0].sum(axis=2)
            ece = ratio(np.abs(binned[..., 2] - binned[..., 1]).sum(axis=2), counts)
            nll = ratio(weights @ surprise, counts)
            values = {"ece": mean_known(ece.T), "nll": mean_known(nll.T)}
            if len(names) > 1:
                values |= {f"ece/{name}": ece[:, m] for m, name in enumerate(names)}
                values |= {f"nll/{name}": nll[:, m] for m, name in enumerate(names)}
            return values

        return evaluate

    def diagrams(self) -> dict[str, Reliability]:
        """Return the reliability diagram of each class that may hold with others, or of the whole decision as ``""``.

        The states have to be gathered (``TaskMetrics.gathered``) where several processes filled them.
        """
        total = self.table("sums").numpy()[self.seen().rows].sum(axis=0)
        return {name: _binned(total[m], self.bins) for m, name in enumerate(self.names)}


def _binned(sums: Floats, bins: int) -> Reliability:
    count, confidence, correct = sums.T
    return Reliability(np.linspace(0, 1, bins + 1), count, ratio(confidence, count), ratio(correct, count))
