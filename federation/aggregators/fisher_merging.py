"""Merging by curvature at its absolute size: Fisher merging, and inverse variance, its opposite."""

from __future__ import annotations

import math

from torch import Tensor
from typing_extensions import override

from federation.aggregators.base import Exchange
from federation.aggregators.fedavg import FedAvg, Weights
from federation.bayes.curvature import Curvature, SquaredGradients, normalise
from federation.bayes.fisher import Fisher
from federation.bayes.posterior import LEAST_CURVATURE, relative_precision
from federation.exchange.update import BlockUpdate

UNCLIPPED = (1e-30, 1e30)
"""Range of the relative curvature, so wide that nothing is clipped."""


class FisherMerging(FedAvg):
    r"""Weight every element of every site by its curvature, $\sum n_k \lambda_k \Delta_k / \sum n_k \lambda_k$.

    This is ``BayesianAggregator`` without its precautions: curvature is not brought to one scale per tensor, not
    tempered and not clipped, so the site with the largest loss dominates. It serves as a baseline.

    Args:
        curvature: Measures the curvature; ``None`` is the Fisher information after each site's training.
        weights: As in ``FedAvg``.

    Reference:
        Matena and Raffel, Merging Models with Fisher-Weighted Averaging, NeurIPS 2022, equation 5.
    """

    def __init__(self, curvature: Curvature | None = None, weights: Weights = "num_examples") -> None:
        super().__init__(weights)
        self.curvature = Fisher() if curvature is None else curvature
        self.exchange = Exchange(curvature=self.curvature)

    @override
    def relative(self, curvature: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
        return normalise(curvature, "element", 1.0, *UNCLIPPED)

    @override
    def weight(self, site: str, block: BlockUpdate, key: str) -> Tensor | float:
        scale = max(block.scale[key], LEAST_CURVATURE) if key in block.scale else 1.0
        return relative_precision(block, key).mul_(math.pow(block.num_examples, self.power) * scale)


class InverseVariance(FisherMerging):
    r"""Weight every element of every site by $n_k / \lambda_{ki}$, which takes large gradients for noise.

    Some published federations use the inverse variance of gradients as precision, where a Laplace approximation uses
    the variance itself. The variance here is the running mean of squared gradients of the site's training. As in the
    paper, it is not brought to one scale per tensor.

    Args:
        curvature: Measures the variance; ``None`` is the running mean of squared gradients.
        weights: As in ``FedAvg``.
        floor: Least variance, as a share of its tensor's mean, so that weights that never moved do not dominate.

    Reference:
        Reyes et al., Precision-Weighted Federated Learning, 2021, arXiv 2107.09627.
    """

    def __init__(
        self, curvature: Curvature | None = None, weights: Weights = "num_examples", floor: float = 1e-3
    ) -> None:
        super().__init__(SquaredGradients() if curvature is None else curvature, weights)
        self.floor = floor

    @override
    def relative(self, curvature: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
        known = {name: value.double() for name, value in curvature.items() if float(value.mean()) > 0}
        return super().relative({n: 1 / v.clamp(min=self.floor * float(v.mean())) for n, v in known.items()})
