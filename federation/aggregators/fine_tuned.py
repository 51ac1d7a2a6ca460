"""Fine-tuned FedAvg: a global model, from which every site trains a model of its own in the last rounds."""

from __future__ import annotations

from typing import Any

from federation.aggregators.base import ClientObjective
from federation.aggregators.fedavg import FedAvg, Weights
from federation.exchange.schema import State
from mtmedformer.errors import ConfigError


class FineTuned(FedAvg):
    """FedAvg, then local training: the baseline that every personal method has to beat.

    For ``after`` rounds all sites share one model. From then on each site trains a copy of it on by itself, a round's
    budget a round, and keeps it; the global model goes on beside them as in FedAvg.

    Args:
        after: Rounds before the sites begin models of their own, at least 1; leave some of ``trainer.max_epochs`` over.
        weights: As in ``FedAvg``.

    Raises:
        ConfigError: When ``after`` is less than 1.

    Reference:
        Yu, Bagdasaryan, Shmatikov, Salvaging federated learning by local adaptation, 2020, section 3.1 (fine-tuning).
    """

    personal_models = True

    def __init__(self, after: int = 10, weights: Weights = "num_examples") -> None:
        super().__init__(weights)
        if after < 1:
            raise ConfigError(f"aggregator.after: {after} is less than 1; the sites need a shared model to start from")
        self.after = after
        self.merged = 0
        """Rounds merged so far."""

    def finish(self) -> State:
        """Return the next global state, and count the round."""
        self.merged += 1
        return super().finish()

    def personal_objective(self, site: str) -> ClientObjective | None:
        """Return that a site trains its own model freely, once there were enough rounds."""
        return ClientObjective() if self.merged >= self.after else None

    def state_dict(self) -> dict[str, Any]:
        """Return the number of rounds merged."""
        return {"merged": self.merged}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the count up."""
        self.merged = int(state["merged"])
