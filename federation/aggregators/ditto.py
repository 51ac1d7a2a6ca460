"""Ditto: a global model by FedAvg, and beside it a personal model for every site."""

from __future__ import annotations

from federation.aggregators.base import ClientObjective
from federation.aggregators.fedavg import FedAvg, Weights
from federation.aggregators.fedprox import Proximal
from mtmedformer.errors import ConfigError


class Ditto(FedAvg):
    r"""FedAvg beside personal models that minimise $L_k(v_k) + \frac{\lambda}{2} \lVert v_k - w_g \rVert^2$.

    The global model never sees the personal ones: they are trained after it in each round, at their site, and stay
    there.

    Args:
        lam: Pull of the personal models towards the global one; 0 trains them alone, large ties them to it. The paper
            tries 0.05 to 2.
        weights: As in ``FedAvg``.

    Raises:
        ConfigError: When ``lam`` is negative.

    Reference:
        Li et al., Ditto: Fair and Robust Federated Learning Through Personalization, ICML 2021, algorithm 1.
    """

    personal_models = True

    def __init__(self, lam: float = 0.1, weights: Weights = "num_examples") -> None:
        super().__init__(weights)
        if lam < 0:
            raise ConfigError(f"aggregator.lam: {lam} is negative; use 0 (personal models alone) or more")
        self.lam = lam

    def personal_objective(self, site: str) -> ClientObjective:
        """Return the pull of a personal model towards the global weights of the round."""
        return Proximal(self.lam)
