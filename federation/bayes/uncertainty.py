"""Uncertainty per pixel, box and image from posterior samples, and the choice of the posterior's scale."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_iou

from federation.bayes.posterior import Posterior
from federation.exchange.schema import State
from mtmedformer.errors import ConfigError
from mtmedformer.metrics.base import entropy

LEAST_LOG = 100.0
"""Least log likelihood is minus this value, as in torch's binary cross-entropy."""


@dataclass(frozen=True)
class Uncertainty:
    """Mean prediction and its uncertainty in nats.

    Attributes:
        mean: Probability averaged over the samples.
        entropy: Predictive entropy: the total uncertainty.
        mutual_information: The part of the entropy due to disagreement of the samples, which more data would reduce.
    """

    mean: Tensor
    entropy: Tensor
    mutual_information: Tensor

    def per_image(self) -> tuple[Tensor, Tensor]:
        """Return entropy and mutual information (N,), averaged over everything but the first dimension."""
        return (
            self.entropy.reshape(len(self.entropy), -1).mean(1),
            self.mutual_information.reshape(len(self.mutual_information), -1).mean(1),
        )


def uncertainty(samples: Tensor, classes: int | None = None) -> Uncertainty:
    """Return mean, predictive entropy and mutual information of sampled probabilities.

    Args:
        samples: Probabilities (S, …), one per posterior sample.
        classes: Dimension of ``samples`` (not the first) along which they sum to 1; ``None`` for binary.
    """
    mean = samples.mean(0)
    total = entropy(mean, None if classes is None else classes % samples.ndim - 1)
    within = entropy(samples, classes).mean(0)
    return Uncertainty(mean, total, (total - within).clamp_min(0))


def box_probabilities(
    boxes: Tensor, labels: Tensor, sampled: Sequence[tuple[Tensor, Tensor, Tensor]], iou: float = 0.5
) -> Tensor:
    """Return the score of each box of the mean model in each posterior sample, (S, N), as input of ``uncertainty``.

    A sample's score of a box is the highest score among its own boxes of the same label that overlap it enough; 0
    without such a box.

    Args:
        boxes: Boxes (N, 4) of the mean model, ``xyxy`` in pixels.
        labels: Their labels (N,).
        sampled: For each sample: boxes (M, 4), labels (M,), scores (M,) in [0, 1].
        iou: Least intersection over union of two boxes that count as the same finding.
    """
    rows = []
    for own, kinds, scores in sampled:
        same = (box_iou(boxes, own) >= iou) & (labels[:, None] == kinds)
        seen = torch.where(same, scores, torch.zeros_like(scores))
        rows.append(seen.amax(1) if len(own) else boxes.new_zeros(len(boxes)))
    return torch.stack(rows)


def likelihood_sums(
    posterior: Posterior,
    likelihood: Callable[[State], Mapping[str, Tensor]],
    grid: Sequence[float],
    samples: int = 8,
    seed: int = 0,
    blocks: Sequence[str] | None = None,
) -> dict[str, tuple[list[float], int]]:
    """Return a site's sums of negative log likelihoods by task, one per scale, and its number of labels.

    Args:
        posterior: The global posterior.
        likelihood: From a state to the probability of the given labels by task: one number per label, always in the
            same order.
        grid: Scales of the posterior; 0 is the mean model.
        samples: Posterior samples averaged at each scale above 0.
        seed: Seed of the samples, the same for every scale.
        blocks: Blocks that are sampled; ``None`` samples all.
    """
    sums: dict[str, tuple[list[float], int]] = {}
    for scale in grid:
        totals: dict[str, Tensor] = {}
        draws = samples if scale else 1
        for draw in range(draws):
            for task, values in likelihood(posterior.sample(seed + draw, scale, blocks)).items():
                totals[task] = totals[task] + values.double() if task in totals else values.double()
        for task, total in totals.items():
            surprise = -(total / draws).log().clamp_min(-LEAST_LOG)
            sums.setdefault(task, ([], total.numel()))[0].append(float(surprise.sum()))
    return sums


@dataclass(frozen=True)
class Tuning:
    """The scale of the posterior chosen on the validation sets of all sites.

    Attributes:
        scale: The scale; 0 means that sampling is refused and the mean model predicts.
        nll: Mean negative log likelihood at every scale tried.
        message: The result in one sentence.
    """

    scale: float
    nll: dict[float, float]
    message: str

    @property
    def refused(self) -> bool:
        """Whether sampling was not better than the mean model."""
        return self.scale == 0


def tune_scale(
    sums: Mapping[str, Sequence[float]], counts: Mapping[str, int], grid: Sequence[float], least_gain: float = 0.0
) -> Tuning:
    """Choose the scale of the posterior from the sites' sums of negative log likelihoods.

    Args:
        sums: By site, the sum of negative log likelihoods at each scale of the grid (``likelihood_sums``).
        counts: By site, the number of labels behind the sums.
        grid: The scales; 0, the mean model, must be one of them.
        least_gain: Share by which the negative log likelihood must fall below the mean model's; less is refused.

    Raises:
        ConfigError: When the grid lacks 0, a site's number of sums differs from the grid's, or no site has a label.
    """
    if 0 not in grid:
        raise ConfigError(f"scales: {list(grid)} lack 0, the mean model that sampling is compared with")
    wrong = [site for site in sums if len(sums[site]) != len(grid)]
    if wrong:
        raise ConfigError(f"site {wrong[0]}: {len(sums[wrong[0]])} sums for {len(grid)} scales")
    labels = sum(counts[site] for site in sums)
    if labels == 0:
        raise ConfigError("no site has a validation label, so no scale of the posterior can be chosen")
    means = {scale: sum(sums[site][i] for site in sorted(sums)) / labels for i, scale in enumerate(grid)}
    usable = {scale: value for scale, value in means.items() if math.isfinite(value)}
    best = min(usable, key=lambda scale: (usable[scale], scale), default=0.0)
    plain = means[0]
    if best == 0 or means[best] > (1 - least_gain) * plain:
        tried = {scale: value for scale, value in usable.items() if scale}
        close = min(tried.values(), default=math.nan)
        wish = f"; at least {100 * least_gain:g} % less is required" if close < plain else ""
        result = f"best negative log likelihood {close:.4f} per label, {plain:.4f} without it{wish}"
        return Tuning(0.0, means, f"posterior sampling refused: {result}")
    edge = f"; {best:g} is the largest scale tried" if best == max(grid) else ""
    return Tuning(
        best, means, f"posterior scale {best:g}: negative log likelihood {means[best]:.4f}, {plain:.4f} without{edge}"
    )
