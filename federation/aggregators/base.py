"""What every aggregator is: a stream of site updates in, one global state out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from federation.exchange.schema import Schema, State
from federation.exchange.update import Update

if TYPE_CHECKING:
    from federation.bayes.curvature import Curvature


class ClientObjective:
    """Change a site's local training: a term of the gradient, and further tensors to send; the default changes nothing.

    One object serves one site for one round. It can be pickled and moves its own tensors to the parameter's device. It
    applies to exchanged parameters only, never to local ones.
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
        """Return further tensors for ``Update.extra`` once local training is over.

        Args:
            state: The site's weights after its local training, on any device.
            start: The global weights the round began with.
            steps: Optimiser steps taken.
            lr: Mean learning rate of those steps.
        """
        return {}


class Aggregator(ABC):
    """Merges the sites' updates of a round into the next global state.

    Updates arrive one at a time and in the order of the site names, so memory does not grow with the number of sites
    and the result does not depend on who finished first. Blocks that no site sent stay as they were, bit for bit;
    integer counters take the largest value.

    Attributes:
        needs_precision: Whether sites must measure and send the precision of their weights.
        curvature: What measures it; each site trains with a copy of its own. ``None`` where nothing is measured.
        personal_norms: Whether normalisation layers stay at each site.
        personal_models: Whether each site keeps a model of its own beside the global one, trained there under
            ``personal_objective``.
        personal_follows: Whether that model moves along with the global one: the site keeps its deviation from it and
            not its weights.
        merges: ``False`` means nothing is merged: every site goes on from its own last weights, the global state stays.
        pooled: ``True`` means one site, named ``pooled``, trains on the union of every site's data.
    """

    needs_precision: bool = False
    curvature: Curvature | None = None
    personal_norms: bool = False
    personal_models: bool = False
    personal_follows: bool = False
    merges: bool = True
    pooled: bool = False

    def starting_state(self, state: State) -> State:
        """Return the state from which the sites start the coming round; by default the global state.

        Args:
            state: The global state (CPU tensors, not changed).
        """
        return state

    @abstractmethod
    def start(self, state: State, schema: Schema) -> None:
        """Start a round; ``state`` is the result of ``starting_state`` (CPU tensors, not changed)."""

    @abstractmethod
    def add(self, update: Update) -> None:
        """Take one site's update."""

    @abstractmethod
    def finish(self) -> State:
        """Return the next global state, with every key of the one given to ``start``.

        What no site sent is as it was before the round, bit for bit, wherever the sites began.
        """

    def client_objective(self, site: str) -> ClientObjective:
        """Return the changes to this site's local training in the coming round."""
        return ClientObjective()

    def personal_objective(self, site: str) -> ClientObjective | None:
        """Return how a site trains its personal model after the global one; ``None`` where it trains none.

        Its ``gradient`` receives as ``start`` the global value at the start of the round, as for the global model.
        """
        return None

    def relative(self, curvature: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return ``BlockUpdate.precision`` and ``BlockUpdate.scale`` by key for a site's raw curvature by key."""
        return {}, {}

    def state_dict(self) -> dict[str, Any]:
        """Return what must survive a restart between rounds: tensors and plain containers only."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 (nothing to take up is a fine default)
        """Take up where ``state_dict`` was taken."""


def merge(aggregator: Aggregator, state: State, schema: Schema, updates: Iterable[Update]) -> State:
    """Return the next global state from updates that arrived in any order; the sites began at ``state``."""
    aggregator.start(state, schema)
    for update in sorted(updates, key=lambda one: one.site):
        aggregator.add(update)
    return aggregator.finish()
