"""Regression of one number per image (age, density, scores), and of ordinal grades."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from mtmedformer.batch import RegressionTarget, Target, Task
from mtmedformer.errors import ConfigError
from mtmedformer.heads.attention_pooling import AttentionPoolingHead
from mtmedformer.losses.regression import CumulativeLink, RegressionLoss, SmoothL1, grade_log_probabilities
from mtmedformer.metrics.base import TaskMetrics
from mtmedformer.metrics.regression import OrdinalMetrics, RegressionMetrics

QUARTERS = 4.0
"""A number is scaled so that its range has this length, which gives it a standard deviation near 1."""

SMALLEST_STEP = 1e-3
"""Least distance of two boundaries between grades, in logits."""


@dataclass
class RegressionOutputs:
    """``scaled`` (B, 1), the number on a scale where its range is [-2, 2]; ``attention`` (B, h, w)."""

    scaled: Tensor
    attention: Tensor


@dataclass
class OrdinalOutputs:
    """Logits of K grades.

    Attributes:
        boundaries: float32 (B, K - 1): the logit that the grade lies above each boundary, decreasing.
        logits: float32 (B, K): logits of the grades, log probabilities before calibration.
        attention: (B, h, w).
    """

    boundaries: Tensor
    logits: Tensor
    attention: Tensor


class _OneNumberHead(AttentionPoolingHead):
    """Computes one number from features that `AttentionPoolingHead` pools, and the losses of it."""

    kind = "regression"

    def __init__(
        self,
        classes: Sequence[str],
        terms: dict[str, RegressionLoss],
        strides: tuple[int, ...],
        width: int | None,
        num_heads: int,
        peak: bool,
    ) -> None:
        super().__init__(classes, 1, strides, width, num_heads, peak)
        self.terms = nn.ModuleDict(terms)
        for term in terms.values():
            term.check(ordinal=bool(classes))

    @abstractmethod
    def learned(self, outputs: Any, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return outputs and truth as a ``RegressionLoss`` reads them."""

    @override
    def loss(self, outputs: Any, target: Target) -> dict[str, Tensor]:
        assert isinstance(target, RegressionTarget)
        learned, truth = self.learned(outputs, target.values.float())
        learned, truth = learned[target.present].float(), truth[target.present]
        with torch.autocast(learned.device.type, enabled=False):
            return {name: term.weight * term(learned, truth) for name, term in self.terms.items()}

    def exported(self, outputs: Any, size: tuple[int, int]) -> dict[str, Tensor]:
        """Return the predictions under the empty name, and ``attention`` (B, h, w)."""
        return {"": self.predict(outputs, size), "attention": outputs.attention.float()}

    def decoded(self, exported: dict[str, Tensor], size: tuple[int, int]) -> Tensor:
        """Return the predictions."""
        return exported[""]


class RegressionHead(_OneNumberHead):
    """Predicts one number per image, in the unit of the labels, from features that `AttentionPoolingHead` pools.

    The number is learned on a scale on which ``range`` is [-2, 2]; predictions are numbers in ``range``. Labels are
    never changed: one outside of ``range`` is learned as it is.

    Args:
        range: Lowest and highest possible value, for example ``[0, 120]`` for an age in years.
        unit: Unit of the number, for example ``years``; that of the data.
        terms: Loss terms by name, summed by their weights; ``None`` is ``SmoothL1``.
        strides: Strides of the pyramid levels whose tokens are pooled.
        width: Channels of the tokens; ``None`` is the width of the pyramid.
        num_heads: Number of attention heads; divides ``width``.
        peak: Also use the channel maxima; without them, the attention map covers all input of the last layer.

    Raises:
        ConfigError: ``range`` is no range, or a term is one of grades.
    """

    def __init__(
        self,
        range: tuple[float, float],
        unit: str = "",
        terms: dict[str, RegressionLoss] | None = None,
        strides: tuple[int, ...] = (8, 16, 32),
        width: int | None = None,
        num_heads: int = 4,
        peak: bool = True,
    ) -> None:
        super().__init__((), terms or {"smooth_l1": SmoothL1()}, strides, width, num_heads, peak)
        low, high = (float(value) for value in range)
        if not -math.inf < low < high < math.inf:
            raise ConfigError(f"RegressionHead: range is {list(range)}; give the lowest and a higher possible value")
        self.range, self.unit = (low, high), unit

    @override
    def forward(self, pyramid: list[Tensor], size: tuple[int, int]) -> RegressionOutputs:
        return RegressionOutputs(*self.pooled(pyramid))

    @override
    def learned(self, outputs: RegressionOutputs, values: Tensor) -> tuple[Tensor, Tensor]:
        low, high = self.range
        return outputs.scaled, (values - (low + high) / 2) * (QUARTERS / (high - low))

    @override
    def predict(self, outputs: RegressionOutputs, size: tuple[int, int]) -> Tensor:
        low, high = self.range
        return (outputs.scaled.float() * ((high - low) / QUARTERS) + (low + high) / 2).clamp(low, high)

    def class_score(self, outputs: RegressionOutputs, label: int) -> Tensor:
        """Return the number on its learned scale, float32 (B,)."""
        return outputs.scaled[:, 0].float()

    @override
    def metrics(self) -> TaskMetrics:
        return RegressionMetrics()

    @override
    def task(self, name: str) -> Task:
        return Task(name, "regression", (), unit=self.unit, range=self.range)


class OrdinalHead(_OneNumberHead):
    r"""Predicts one of several grades in order (density, severity): the ordinal option of `RegressionHead`.

    A cumulative link model: one number $f$ is computed from the features that `AttentionPoolingHead` pools, and the
    grade lies above boundary $k$ with probability $\sigma(f - \theta_k)$. The boundaries
    $\theta_1 < \theta_2 < \dots$ are learned and stay in order, so that the probabilities of the grades are never
    negative.

    Args:
        classes: Names of the grades, the lowest first.
        terms: Loss terms by name, summed by their weights; ``None`` is ``CumulativeLink``.
        strides: Strides of the pyramid levels whose tokens are pooled.
        width: Channels of the tokens; ``None`` is the width of the pyramid.
        num_heads: Number of attention heads; divides ``width``.
        peak: Also use the channel maxima; without them, the attention map covers all input of the last layer.

    Raises:
        ConfigError: There are fewer than two grades, or a term is one of numbers.
    """

    def __init__(
        self,
        classes: Sequence[str],
        terms: dict[str, RegressionLoss] | None = None,
        strides: tuple[int, ...] = (8, 16, 32),
        width: int | None = None,
        num_heads: int = 4,
        peak: bool = True,
    ) -> None:
        if len(classes) < 2:
            raise ConfigError(f"OrdinalHead: classes are {list(classes)}; name at least two grades, the lowest first")
        super().__init__(classes, terms or {"cumulative_link": CumulativeLink()}, strides, width, num_heads, peak)

    @override
    def build(self, channels: int, strides: Sequence[int]) -> None:
        super().build(channels, strides)
        even = torch.arange(1, len(self.classes)) / len(self.classes)
        starts = torch.logit(even)
        steps = starts.diff().expm1().log()  # softplus of which are the steps
        self.boundaries = nn.Parameter(torch.cat([starts[:1], steps]))  # the lowest, and the steps from one to the next

    @override
    def forward(self, pyramid: list[Tensor], size: tuple[int, int]) -> OrdinalOutputs:
        score, attention = self.pooled(pyramid)
        lowest, steps = self.boundaries[:1].float(), F.softplus(self.boundaries[1:].float()) + SMALLEST_STEP
        boundaries = score.float() - torch.cat([lowest, lowest + steps.cumsum(0)])
        return OrdinalOutputs(boundaries, grade_log_probabilities(boundaries), attention)

    @override
    def learned(self, outputs: OrdinalOutputs, values: Tensor) -> tuple[Tensor, Tensor]:
        return outputs.boundaries, values

    @override
    def predict(self, outputs: OrdinalOutputs, size: tuple[int, int]) -> Tensor:
        return outputs.logits.softmax(dim=1)

    def class_logits(self, outputs: OrdinalOutputs, size: tuple[int, int]) -> Tensor:
        """Return the logits of the grades, float32 (B, K)."""
        return outputs.logits

    def scaled(self, outputs: OrdinalOutputs, temperature: float) -> OrdinalOutputs:
        """Return the outputs with the logits of the grades divided by a temperature."""
        return replace(outputs, logits=outputs.logits / temperature)

    def class_score(self, outputs: OrdinalOutputs, label: int) -> Tensor:
        """Return the logit that the grade is this one or a higher one (of the lowest: the second), float32 (B,)."""
        return outputs.boundaries[:, max(0, label - 1)]

    @override
    def metrics(self) -> TaskMetrics:
        return OrdinalMetrics(self.classes)
