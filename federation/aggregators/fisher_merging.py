"""Plain Fisher merging: every site's weights as precise as its Fisher information says, at its absolute size."""

from __future__ import annotations

import math

from torch import Tensor

from federation.aggregators.fedavg import FedAvg, Weights
from federation.bayes.curvature import Curvature, normalise
from federation.bayes.fisher import Fisher
from federation.bayes.posterior import SILENT, relative_precision
from federation.exchange.update import BlockUpdate

UNCLIPPED = (1e-30, 1e30)


class FisherMerging(FedAvg):
    r"""Weigh every weight of every site by its curvature, $\sum n_k \lambda_k \Delta_k / \sum n_k \lambda_k$.

    What ``BayesianAggregator`` is without its precautions: curvature is not brought to one scale a tensor, not tempered
    and not clipped, so the site with the loudest loss decides. It is here to be compared with.

    Args:
        curvature: What measures curvature; ``None`` is the Fisher information after each site's training.
        weights: As in ``FedAvg``.

    Reference:
        Matena and Raffel, Merging Models with Fisher-Weighted Averaging, NeurIPS 2022, equation 5.
    """

    needs_precision = True

    def __init__(self, curvature: Curvature | None = None, weights: Weights = "num_examples") -> None:
        super().__init__(weights)
        self.curvature = Fisher() if curvature is None else curvature

    def relative(self, curvature: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return curvature by element over its mean, and the mean, by key."""
        return normalise(curvature, "element", 1.0, *UNCLIPPED)

    def weight(self, block: BlockUpdate, key: str) -> Tensor | float:
        """Return num_examples × curvature; num_examples where no curvature was measured."""
        scale = max(block.scale[key], SILENT) if key in block.scale else 1.0
        return relative_precision(block, key).mul_(math.pow(block.num_examples, self.power) * scale)
