"""How likely the truth is at every temperature: sums over images from which one temperature a task is fitted."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mtmedformer.batch import IGNORE, ClassificationTarget, Meta, SegmentationTarget, Target, Task
from mtmedformer.metrics.base import Evaluate, Floats, TaskMetrics
from mtmedformer.metrics.curves import mean_known, ratio

LOG_TEMPERATURES: Floats = np.arange(-20, 21) * (np.log(10) / 20)
"""Where likelihood is measured: 41 temperatures from 1/10 to 10, evenly in the logarithm, 1 among them exactly."""

PIXELS = 4096
"""Pixels of an image that are looked at: the same ones in every image of one size, spread at random."""


class TemperatureSums(TaskMetrics):
    """Sums of the log-likelihood of the truth at every temperature, a row an image.

    Args:
        task: A classification or segmentation task.
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
            predictions: Class logits (B, C) or (B, C, H, W), as ``TaskHead.class_logits`` gives them.
            target: The batch's target.
            meta: One entry an image.
        """
        rows = self.register(meta, target.present)
        if not rows:
            return
        logits, truth = some_places(predictions.detach()[rows]), some_places(truth_of(self.task, target)[rows])
        curve, decisions = likelihood_curve(logits, truth, not self.task.multi_label and len(self.task.classes) > 1)
        self.curve.append(curve.cpu())
        self.decisions.append(decisions.cpu())

    def prepare(self, rows: NDArray[np.int64]) -> Evaluate:
        """Select the rows; see ``TaskMetrics.prepare``. The value is that at a temperature of 1."""
        curve, decisions = self.table("curve").numpy()[rows], self.table("decisions").numpy()[rows]
        one = len(LOG_TEMPERATURES) // 2

        def evaluate(weights: Floats) -> dict[str, Floats]:
            return {"nll": mean_known(ratio(weights @ curve[:, one, 0], weights @ decisions)[None])}

        return evaluate

    def sums(self) -> tuple[Floats, float, int]:
        """Return the curve (41, 2), the decisions and the images of all rows, which have to be gathered before."""
        rows = self.seen().rows
        curve: Floats = self.table("curve").numpy()[rows].sum(axis=0)
        return curve, float(self.table("decisions").numpy()[rows].sum()), len(rows)


def truth_of(task: Task, target: Target) -> Tensor:
    """Return the truth in the shape of a head's class logits, float32, NaN where unknown.

    Args:
        task: A classification or segmentation task.
        target: Its target in a batch of B images.

    Returns:
        (B, C) or (B, C, H, W) of 0, 1 or NaN. Where classes exclude each other a place is known whole or not at all,
        and a segmentation has the background as channel 0.
    """
    if isinstance(target, ClassificationTarget):
        truth = target.labels.float().clone()
        exclusive = not task.multi_label and len(task.classes) > 1
    else:
        assert isinstance(target, SegmentationTarget)
        truth = target.masks.float().masked_fill(target.masks == IGNORE, torch.nan)
        exclusive = not task.multi_label and len(task.classes) > 1
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
    """Return how unlikely the truth is at every temperature, and how fast that changes with the log temperature.

    Both are sums over an image's decisions, so that sums of sums over images, processes and sites are all that a fit
    needs: nothing of an image leaves it but 82 numbers.

    Args:
        logits: (B, C, P): C classes at P places an image.
        truth: (B, C, P) of 0, 1 or NaN (see ``truth_of``).
        exclusive: Whether the C classes share a softmax; otherwise each is a sigmoid of its own.

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
    """Return (B, C, P): the one place of an image's classes, or pixels of its masks, which are many and much alike."""
    if values.ndim == 2:
        return values[:, :, None]
    flat = values.flatten(2)
    chosen = _chosen(flat.shape[2])
    return flat if chosen is None else flat[:, :, chosen.to(flat.device)]


@lru_cache(maxsize=64)
def _chosen(pixels: int) -> Tensor | None:
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(pixels, generator=generator)[:PIXELS].sort().values if pixels > PIXELS else None
