"""Calibration of class and pixel probabilities: reliability bins, and likelihood by temperature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from mtmedformer.batch import (
    IGNORE,
    ClassificationTarget,
    DetectionTarget,
    Meta,
    RegressionTarget,
    SegmentationTarget,
    Target,
    Task,
)
from mtmedformer.metrics.base import Evaluate, Floats, TaskMetrics
from mtmedformer.metrics.curves import nan_mean, ratio

SMALLEST = float(np.finfo(np.float32).eps)
"""Probabilities are kept this far from 0 in the log-likelihood, as in ``ClassificationMetrics``."""


@dataclass(frozen=True)
class Reliability:
    """Confidence against accuracy, by bins of confidence.

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
    """Bin confidences and count the correct decisions of each bin.

    Args:
        probabilities: Confidence of each decision in [0, 1], any shape.
        targets: Whether it was so, 0 or 1, same shape; NaN counts nowhere.
        bins: Number of equally wide bins.
    """
    p = torch.as_tensor(np.asarray(probabilities, dtype=np.float64)).reshape(1, 1, -1)
    y = torch.as_tensor(np.asarray(targets, dtype=np.float64)).reshape(1, 1, -1)
    return _binned(bin_sums(p, y, bins)[0, 0].numpy(), bins)


def class_target(task: Task, target: Target) -> ClassificationTarget | SegmentationTarget:
    """Return the target of a probabilistic task as classes or masks; grades are exclusive classes."""
    assert not isinstance(target, DetectionTarget)
    return target.one_hot(len(task.classes)) if isinstance(target, RegressionTarget) else target


def decisions(task: Task, probabilities: Tensor, target: Target) -> list[Tensor]:
    """Return confidence, correctness and likelihood of the truth for each decision of a batch of B images.

    Args:
        task: A task of classes, masks or grades.
        probabilities: (B, K) or (B, K, H, W), as ``TaskHead.predict`` gives them.
        target: The batch's target.

    Returns:
        Three tensors (B, M, P), NaN where unknown, M rows of P decisions. Exclusive classes (pixels: and background)
        are one row: the probability of the likeliest, whether it is the true one, the probability of the true one.
        Otherwise each class is a row: its probability, whether it is there, the probability of what is so.
    """
    target = class_target(task, target)
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
    """Calibration error and likelihood of the probabilities of classes or pixels; ``decisions`` defines what is scored.

    ``ece`` is the expected calibration error, ``nll`` the negative log-likelihood a decision, in nats. For
    classification both are those of ``ClassificationMetrics``. Classes that may hold at once are scored one by one as
    ``<metric>/<class>``, and their mean is the overall value.

    Args:
        task: A task of classes, masks or grades.
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

    def update(self, predictions: Tensor, target: Target, meta: Sequence[Meta]) -> None:
        """Keep the bins and the log-likelihood of each labelled image's probabilities, never a pixel."""
        rows = self.register(meta, target.present)
        if rows:
            confidence, correct, likelihood = decisions(self.task, predictions.detach().float(), target)
            self.sums.append(bin_sums(confidence[rows], correct[rows], self.bins).cpu())
            surprise = -likelihood[rows].clamp_min(SMALLEST).log()  # NaN stays NaN
            self.surprise.append(surprise.double().nansum(2).cpu())

    @override
    def prepare(self, rows: NDArray[np.int64]) -> Evaluate:
        sums, surprise = self.table("sums").numpy()[rows], self.table("surprise").numpy()[rows]
        names = self.names

        def evaluate(weights: Floats) -> dict[str, Floats]:
            binned = np.einsum("rn,nmbs->rmbs", weights, sums)
            counts = binned[..., 0].sum(axis=2)
            ece = ratio(np.abs(binned[..., 2] - binned[..., 1]).sum(axis=2), counts)
            nll = ratio(weights @ surprise, counts)
            values = {"ece": nan_mean(ece.T), "nll": nan_mean(nll.T)}
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


LOG_TEMPERATURES: Floats = np.arange(-20, 21) * (np.log(10) / 20)
"""Where likelihood is measured: 41 temperatures from 1/10 to 10, evenly in the logarithm, 1 among them exactly."""

PIXELS = 4096
"""Pixels of an image that are looked at: the same ones in every image of one size, spread at random."""


class TemperatureSums(TaskMetrics):
    """Sums of the log-likelihood of the truth at every temperature, one row per image.

    Args:
        task: A task of classes, masks or grades.
    """

    primary = "nll"
    higher_is_better = False
    curve: list[Tensor]
    decisions: list[Tensor]

    def __init__(self, task: Task) -> None:
        super().__init__(task.classes)
        self.task = task
        self.add_rows("curve", torch.zeros(0, len(LOG_TEMPERATURES), 2, dtype=torch.float64))
        self.add_rows("decisions", torch.zeros(0, dtype=torch.float64))

    def update(self, predictions: Tensor, target: Target, meta: Sequence[Meta]) -> None:
        """Add the labelled images of a batch.

        Args:
            predictions: Class logits (B, C) or (B, C, H, W), as from ``Calibratable.class_logits``.
            target: The batch's target.
            meta: One entry an image.
        """
        rows = self.register(meta, target.present)
        if not rows:
            return
        logits, truth = some_places(predictions.detach()[rows]), some_places(truth_of(self.task, target)[rows])
        curve, decisions = likelihood_curve(logits, truth, self.task.exclusive)
        self.curve.append(curve.cpu())
        self.decisions.append(decisions.cpu())

    @override
    def prepare(self, rows: NDArray[np.int64]) -> Evaluate:
        """Select the rows. The value is that at a temperature of 1."""
        curve, decisions = self.table("curve").numpy()[rows], self.table("decisions").numpy()[rows]
        one = len(LOG_TEMPERATURES) // 2

        def evaluate(weights: Floats) -> dict[str, Floats]:
            return {"nll": nan_mean(ratio(weights @ curve[:, one, 0], weights @ decisions)[None])}

        return evaluate

    def sums(self) -> tuple[Floats, float, int]:
        """Return the curve (41, 2), the decisions and the images of all rows, which have to be gathered before."""
        rows = self.seen().rows
        curve: Floats = self.table("curve").numpy()[rows].sum(axis=0)
        return curve, float(self.table("decisions").numpy()[rows].sum()), len(rows)


def truth_of(task: Task, target: Target) -> Tensor:
    """Return the truth in the shape of a head's class logits, float32, NaN where unknown.

    Args:
        task: A task of classes, masks or grades.
        target: Its target in a batch of B images.

    Returns:
        (B, C) or (B, C, H, W) of 0, 1 or NaN. Where classes exclude each other a place is known whole or not at all,
        and a segmentation has the background as channel 0.
    """
    target, exclusive = class_target(task, target), task.exclusive
    if isinstance(target, ClassificationTarget):
        truth = target.labels.float().clone()
    else:
        truth = target.masks.float().masked_fill(target.masks == IGNORE, torch.nan)
        if exclusive:
            inside = (truth == 1).any(1, keepdim=True)
            truth = torch.where(inside, (truth == 1).float(), truth)
            background = torch.where(inside, 0.0, 1 - truth.sum(1, keepdim=True))
            truth = torch.cat([background, truth], dim=1)
    if exclusive:
        truth = truth.masked_fill(truth.isnan().any(1, keepdim=True), torch.nan)
    truth[~target.present] = torch.nan
    return truth


def likelihood_curve(logits: Tensor, truth: Tensor, exclusive: bool) -> tuple[Tensor, Tensor]:
    """Return the negative log-likelihood at every temperature, and its derivative by the log temperature.

    Both are sums over an image's decisions, so that sums of sums over images, processes and sites are all that a fit
    needs: an image contributes 82 numbers only.

    Args:
        logits: (B, C, P): C classes at P places per image.
        truth: (B, C, P) of 0, 1 or NaN (see ``truth_of``).
        exclusive: Whether the C classes share a softmax; otherwise each has its own sigmoid.

    Returns:
        float64 (B, 41, 2): negative log-likelihood in nats, and its slope, at ``LOG_TEMPERATURES``; and (B,) the number
        of decisions.
    """
    known = ~truth.isnan()
    z, y = logits.double(), truth.nan_to_num(0.0).double()
    curve = z.new_zeros(len(z), len(LOG_TEMPERATURES), 2)
    for i, temperature in enumerate(np.exp(LOG_TEMPERATURES)):
        u = z / temperature
        if exclusive:
            nll = -(y * F.log_softmax(u, dim=1))
            slope = (y - u.softmax(dim=1)) * u
        else:
            nll = F.softplus(u) - y * u
            slope = (y - u.sigmoid()) * u
        curve[:, i, 0] = (nll * known).sum((1, 2))
        curve[:, i, 1] = (slope * known).sum((1, 2))
    return curve, (known.any(1) if exclusive else known).flatten(1).sum(1).double()


def some_places(values: Tensor) -> Tensor:
    """Return (B, C, P): the classes of an image as one place, or a subset of the pixels of its masks."""
    if values.ndim == 2:
        return values[:, :, None]
    flat = values.flatten(2)
    chosen = _chosen(flat.shape[2])
    return flat if chosen is None else flat[:, :, chosen.to(flat.device)]


@lru_cache(maxsize=64)
def _chosen(pixels: int) -> Tensor | None:
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(pixels, generator=generator)[:PIXELS].sort().values if pixels > PIXELS else None
