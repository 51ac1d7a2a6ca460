"""Federated averaging with a pull towards the global weights during local training."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from federation.aggregators.base import SiteObjective
from federation.aggregators.fedavg import FedAvg, Weights
from mtmedformer.errors import ConfigError


class Proximal(SiteObjective):
    r"""Add the gradient of $\frac{\mu}{2} \sum_i s_i (w_i - w_{g,i})^2$ to a site's loss: $\mu\, s_i (w_i - w_{g,i})$.

    Example:
        >>> import torch
        >>> Proximal(mu=0.1).gradient("w", torch.tensor([3.0]), start=torch.tensor([1.0]))
        tensor([0.2000])

    Args:
        mu: Strength of the pull, at least 0.
        precision: By parameter, $s$, of a shape that broadcasts to the parameter's; 1 where a name is absent.
    """

    def __init__(self, mu: float, precision: dict[str, Tensor] | None = None) -> None:
        self.mu = mu
        self.precision = dict(precision or {})

    @override
    def gradient(self, name: str, parameter: Tensor, start: Tensor) -> Tensor | None:
        if self.mu == 0:
            return None
        pull = (parameter.detach() - start) * self.mu
        if name in self.precision:
            self.precision[name] = self.precision[name].to(pull)
            pull *= self.precision[name]
        return pull


class FedProx(FedAvg):
    r"""FedAvg whose sites minimise $L_k(w) + \frac{\mu}{2} \lVert w - w_g \rVert^2$.

    The norm is squared, as in the paper; some published baselines omit the square, which is a different method.

    Args:
        mu: Strength of the pull; the paper tries 0.001 to 1. 0 is FedAvg.
        weights: As in ``FedAvg``.

    Raises:
        ConfigError: When ``mu`` is negative.

    Reference:
        Li et al., Federated Optimization in Heterogeneous Networks, MLSys 2020, equation 2.
    """

    def __init__(self, mu: float = 0.01, weights: Weights = "num_examples") -> None:
        super().__init__(weights)
        if mu < 0:
            raise ConfigError(f"aggregator.mu: {mu} is negative; use 0 (FedAvg) or more")
        self.mu = mu

    @override
    def site_objective(self, site: str) -> SiteObjective:
        return Proximal(self.mu)
