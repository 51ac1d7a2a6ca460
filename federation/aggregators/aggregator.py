"""What every aggregator is: a stream of site updates in, one global state out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from federation.blocks import Schema, State
from federation.update import Update


class LocalRule:
    """What a site does differently during local training because an aggregator asks for it; the default is nothing.

    One rule object serves one site for one round.
    """

    def gradient(self, name: str, parameter: Tensor, start: Tensor) -> Tensor | None:
        """Return what is added to a parameter's gradient before the optimiser's step, or ``None``.

        Args:
            name: ``state_dict`` name of the parameter.
            parameter: Its present value.
            start: Its global value at the start of the round, same shape and device.
        """
        return None

    def extra(self, state: State, start: State, steps: int, lr: float) -> dict[str, Tensor]:
        """Return further tensors for ``Update.extra`` once local training is over."""
        return {}


class Aggregator(ABC):
    """Merges the sites' updates of a round into the next global state.

    Updates arrive one at a time and in the order of the site names, so memory does not grow with the number of sites
    and the result does not depend on who finished first. Blocks that no site sent stay as they were, bit for bit;
    integer counters take the largest value.

    Attributes:
        needs_precision: Whether sites must measure and send the precision of their weights.
        personal_norms: Whether normalisation layers stay at each site.
        personal_models: Whether each site keeps a model of its own beside the global one.
    """

    needs_precision: bool = False
    personal_norms: bool = False
    personal_models: bool = False

    @abstractmethod
    def start(self, state: State, schema: Schema) -> None:
        """Begin a round from the global state (CPU tensors, not changed)."""

    @abstractmethod
    def add(self, update: Update) -> None:
        """Take one site's update."""

    @abstractmethod
    def finish(self) -> State:
        """Return the next global state, with every key of the one given to ``start``."""

    def local_rule(self, site: str) -> LocalRule:
        """Return what this site does differently in the coming round."""
        return LocalRule()

    def state_dict(self) -> dict[str, Any]:
        """Return what must survive a restart between rounds: tensors and plain containers only."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 (nothing to take up is a fine default)
        """Take up where ``state_dict`` was taken."""
