"""Losses of numbers and of ordinal grades, each a mean over the images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from mtmedformer.errors import ConfigError
from mtmedformer.storage.constructor_arguments import RecordsArguments


class RegressionLoss(RecordsArguments, nn.Module, ABC):
    """A loss of numbers (M = 1), or of the logits of the M = K - 1 boundaries between K grades.

    Args:
        weight: Factor of this term in the task's loss.
    """

    ordinal: ClassVar[bool]
    """Whether the term is for grades; otherwise it is for a number."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    @abstractmethod
    def forward(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Return the mean loss, zero without an image.

        Args:
            outputs: float32 (N, M), labelled images only: the number, scaled so that its range is [-2, 2]; or per
                boundary the logit that the grade lies above it, from the lowest boundary to the highest.
            target: float32 (N,): the number, scaled likewise, or the index of the grade.
        """

    def check(self, ordinal: bool) -> None:
        """Raise ``ConfigError`` where this term does not fit the head."""
        if self.ordinal != ordinal:
            fits = "OrdinalHead" if self.ordinal else "RegressionHead"
            raise ConfigError(f"loss term {type(self).__name__} is for {fits}; choose another term or another head")


class SmoothL1(RegressionLoss):
    """Absolute error, quadratic below ``beta``, as ``torch.nn.SmoothL1Loss``: outliers count less than in squares.

    Args:
        weight: Factor of this term in the task's loss.
        beta: Error below which the loss is quadratic, in quarters of the range; above 0.

    Raises:
        ConfigError: ``beta`` is not above 0.
    """

    ordinal = False

    def __init__(self, weight: float = 1.0, beta: float = 0.5) -> None:
        super().__init__(weight)
        if not beta > 0:
            raise ConfigError(f"loss term SmoothL1: beta is {beta}; it must be above 0")
        self.beta = beta

    @override
    def forward(self, outputs: Tensor, target: Tensor) -> Tensor:
        return _mean(F.smooth_l1_loss(outputs[:, 0], target, reduction="none", beta=self.beta))


class SquaredError(RegressionLoss):
    """Squared error, as ``torch.nn.MSELoss``; its minimum is the mean of the truth."""

    ordinal = False

    @override
    def forward(self, outputs: Tensor, target: Tensor) -> Tensor:
        return _mean((outputs[:, 0] - target).square())


class AbsoluteError(RegressionLoss):
    """Absolute error, as ``torch.nn.L1Loss``; its minimum is the median of the truth."""

    ordinal = False

    @override
    def forward(self, outputs: Tensor, target: Tensor) -> Tensor:
        return _mean((outputs[:, 0] - target).abs())


class CumulativeLink(RegressionLoss):
    """Negative log-likelihood of the grade in a cumulative link (proportional odds) model.

    Reference:
        McCullagh, Regression models for ordinal data, Journal of the Royal Statistical Society B 1980.
    """

    ordinal = True

    @override
    def forward(self, outputs: Tensor, target: Tensor) -> Tensor:
        return _mean(-grade_log_probabilities(outputs).gather(1, target.long()[:, None])[:, 0])


class Coral(RegressionLoss):
    """Binary cross-entropy of every boundary between grades, summed (CORAL).

    Reference:
        Cao, Mirjalili and Raschka, Rank consistent ordinal regression for neural networks, Pattern Recognition Letters
        2020, equation 4.
    """

    ordinal = True

    @override
    def forward(self, outputs: Tensor, target: Tensor) -> Tensor:
        above = (target[:, None] > torch.arange(outputs.shape[1], device=outputs.device)).float()
        return _mean(F.binary_cross_entropy_with_logits(outputs, above, reduction="none").sum(1))


def grade_log_probabilities(boundaries: Tensor) -> Tensor:
    r"""Return the log probabilities (N, K) of the grades.

    $P(y = k) = \sigma(b_{k-1}) - \sigma(b_k)$ with $\sigma(b_{-1}) = 1$ and $\sigma(b_{K-1}) = 0$, computed as
    $\sigma(b_{k-1})\,\sigma(-b_k)\,(1 - e^{b_k - b_{k-1}})$, which does not cancel.

    Args:
        boundaries: (N, K - 1) logits that the grade lies above each boundary, strictly decreasing along a row.
    """
    above = F.pad(F.logsigmoid(boundaries), (1, 0))
    below = F.pad(F.logsigmoid(-boundaries), (0, 1))
    between = torch.log(-torch.expm1(boundaries.diff(dim=1).clamp_max(-1e-6)))  # steps that rounding removed
    return above + below + F.pad(between, (1, 1))


def _mean(losses: Tensor) -> Tensor:
    """Return the mean of (N,) losses; zero, still connected to the graph, without an image."""
    return losses.sum() / max(1, len(losses))
