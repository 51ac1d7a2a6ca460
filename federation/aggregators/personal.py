"""FedAvg with personal models: each site trains a model of its own besides the global one."""

from __future__ import annotations

from federation.aggregators.base import PersonalModel
from federation.aggregators.fedavg import FedAvg, Weights
from federation.aggregators.fedprox import Proximal
from mtmedformer.errors import ConfigError


class Ditto(FedAvg):
    r"""FedAvg with personal models that minimise $L_k(v_k) + \frac{\lambda}{2} \lVert v_k - w_g \rVert^2$.

    The global model does not depend on the personal ones: in each round they are trained after it, at their site, and
    stay there.

    Args:
        lam: Pull $\lambda$ of the personal models towards the global one; 0 trains them alone, a large value ties them
            to it. The paper uses 0.05 to 2.
        weights: As in ``FedAvg``.

    Raises:
        ConfigError: When ``lam`` is negative.

    Reference:
        Li et al., Ditto: Fair and Robust Federated Learning Through Personalization, ICML 2021, algorithm 1.
    """

    def __init__(self, lam: float = 0.1, weights: Weights = "num_examples") -> None:
        super().__init__(weights)
        if lam < 0:
            raise ConfigError(f"aggregator.lam: {lam} is negative; use 0 (personal models alone) or more")
        self.lam = lam
        self.personal = PersonalModel(Proximal(lam))


class FineTuned(FedAvg):
    """FedAvg, then local training: the baseline for every personal method.

    For ``after`` rounds all sites share one model. From then on each site trains a copy of it, one round's budget per
    round, and keeps it; the global model continues as in FedAvg.

    Args:
        after: Rounds before the sites start models of their own, at least 1 and below ``trainer.max_epochs``.
        weights: As in ``FedAvg``.

    Raises:
        ConfigError: When ``after`` is less than 1.

    Reference:
        Yu, Bagdasaryan, Shmatikov, Salvaging federated learning by local adaptation, 2020, section 3.1 (fine-tuning).
    """

    def __init__(self, after: int = 10, weights: Weights = "num_examples") -> None:
        super().__init__(weights)
        if after < 1:
            raise ConfigError(f"aggregator.after: {after} is less than 1; the sites need a shared model to start from")
        self.after = after
        self.personal = PersonalModel(first_round=after)
