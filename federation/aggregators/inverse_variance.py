"""Precision with the opposite sign: a weight whose gradients vary much counts little."""

from __future__ import annotations

from torch import Tensor

from federation.aggregators.fedavg import Weights
from federation.aggregators.fisher_merging import FisherMerging
from federation.bayes.curvature import Curvature, SquaredGradients


class InverseVariance(FisherMerging):
    r"""Weigh every weight of every site by $n_k / \lambda_{ki}$: as if large gradients were noise and not knowledge.

    Some published federations take the inverse variance of gradients for precision, where a Laplace approximation takes
    the variance itself. The variance here is the running mean of squared gradients of the site's training. It is not
    brought to one scale a tensor, as there.

    Args:
        curvature: What measures the variance; ``None`` is the running mean of squared gradients.
        weights: As in ``FedAvg``.
        floor: Least variance, as a share of its tensor's mean, so that weights that never moved do not decide alone.

    Reference:
        Reyes et al., Precision-Weighted Federated Learning, 2021, arXiv 2107.09627.
    """

    def __init__(
        self, curvature: Curvature | None = None, weights: Weights = "num_examples", floor: float = 1e-3
    ) -> None:
        super().__init__(SquaredGradients() if curvature is None else curvature, weights)
        self.floor = floor

    def relative(self, curvature: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return inverse variance by element over its mean, and the mean, by key; a tensor without any is left out."""
        known = {name: value.double() for name, value in curvature.items() if float(value.mean()) > 0}
        return super().relative({n: 1 / v.clamp(min=self.floor * float(v.mean())) for n, v in known.items()})
