"""The contract of aggregators: updates of the sites in, the next global state out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from federation.bayes.curvature import Curvature
from federation.exchange.schema import Schema, State
from federation.exchange.update import Update, examples_of


class SiteObjective:
    """Change a site's local training: a term of the gradient, and further tensors to send; the default changes nothing.

    One object serves one site for one round. It can be pickled and moves its own tensors to the parameter's device. It
    applies to exchanged parameters only, never to local ones.
    """

    def gradient(self, name: str, parameter: Tensor, start: Tensor) -> Tensor | None:
        """Return the term to add to a parameter's gradient before the optimizer step, or ``None``.

        Args:
            name: ``state_dict`` key of the parameter.
            parameter: Its current value.
            start: Its global value at the start of the round, same shape and device.
        """
        return None

    def extra(self, state: State, start: State, steps: int, lr: float) -> dict[str, Tensor]:
        """Return further tensors for ``Update.extra`` after local training.

        Args:
            state: The site's weights after its local training, on any device.
            start: The global weights at the start of the round.
            steps: Optimizer steps taken.
            lr: Mean learning rate of those steps.
        """
        return {}

    @property
    def changes_gradients(self) -> bool:
        """Whether ``gradient`` is overridden."""
        return type(self).gradient is not SiteObjective.gradient

    @property
    def sends_extra(self) -> bool:
        """Whether ``extra`` is overridden."""
        return type(self).extra is not SiteObjective.extra


@dataclass(frozen=True)
class Exchange:
    """Which weights the sites send, and whether the server merges them.

    Attributes:
        merged: Whether updates are merged. If not, every site continues from its own last weights, the global state
            stays as it is, and updates serve reports only.
        norms: Whether normalisation layers are exchanged; if not, each site keeps its own.
        curvature: Measures the precision of the weights during local training, each site with a copy of its own; it is
            sent with the update. ``None``: no precision is measured.
    """

    merged: bool = True
    norms: bool = True
    curvature: Curvature | None = None

    @property
    def precision(self) -> bool:
        """Whether sites measure and send the precision of their weights."""
        return self.curvature is not None

    @property
    def global_model(self) -> bool:
        """Whether the global state is a complete model; if not, each site's own weights are to be evaluated."""
        return self.merged and self.norms

    def local_keys(self, schema: Schema) -> frozenset[str]:
        """Return the ``state_dict`` keys that stay at each site and are never merged."""
        if not self.merged:
            return frozenset(schema.shapes)
        return schema.personal_keys() if self.norms else schema.personal_keys() | schema.norms


@dataclass(frozen=True)
class PersonalModel:
    """A second model per site, trained on the site's data after the global one and never sent.

    Attributes:
        objective: Its training objective; ``start`` in ``SiteObjective.gradient`` is the global value at the start of
            the round. Each site and round uses a copy.
        keeps: What the site keeps between rounds. ``weights``: training continues from the site's last personal
            weights. ``deviation``: it continues from the new global weights plus the site's last difference from them.
        first_round: Round, from 0, in which it starts, from the global weights.
    """

    objective: SiteObjective = SiteObjective()  # noqa: RUF009 (has no state)
    keeps: Literal["weights", "deviation"] = "weights"
    first_round: int = 0


class Aggregator(ABC):
    """Merge the sites' updates of a round into the next global state.

    Updates arrive one at a time in the order of the site names, so memory does not grow with the number of sites and
    the result does not depend on the order of arrival. Blocks that no site sent stay unchanged, bit for bit; integer
    counters take the largest value.

    Three attributes state what differs from plain averaging; the training loop reads them and nothing else.

    Attributes:
        exchange: Which weights are sent and merged, and whether with their precision.
        personal: The model that each site trains besides the global one; ``None``: there is none.
        data: ``sites``: each site trains on its own data. ``pooled``: one site, named ``pooled``, trains on the union.
        power: Power of ``num_examples`` in the weight of a site; 0 weights all sites equally.
    """

    exchange: Exchange = Exchange()
    personal: PersonalModel | None = None
    data: Literal["sites", "pooled"] = "sites"
    power: float = 0.0

    def starting_state(self, state: State) -> State:
        """Return the state from which the sites start the coming round; by default the global state.

        Args:
            state: The global state (CPU tensors, not changed).
        """
        return state

    def expect(self, examples: Mapping[str, Mapping[str, int]], schema: Schema) -> None:  # noqa: B027 (may be ignored)
        """Prepare for the coming round, before ``start``.

        Args:
            examples: By site and block name, ``BlockUpdate.num_examples`` of the updates that will be added.
            schema: The model's schema.
        """

    @abstractmethod
    def start(self, state: State, schema: Schema) -> None:
        """Start a round; ``state`` is the result of ``starting_state`` (CPU tensors, not changed)."""

    @abstractmethod
    def add(self, update: Update) -> None:
        """Add the update of one site."""

    @abstractmethod
    def finish(self) -> State:
        """Return the next global state, with every key of the one given to ``start``.

        A tensor that no site sent has its value before the round, bit for bit, also if ``starting_state`` moved it.
        """

    def site_objective(self, site: str) -> SiteObjective:
        """Return the changes to this site's local training in the coming round."""
        return SiteObjective()

    def relative(self, curvature: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return ``BlockUpdate.precision`` and ``BlockUpdate.scale`` by key for a site's raw curvature by key."""
        return {}, {}

    def state_dict(self) -> dict[str, Any]:
        """Return what must survive a restart between rounds: tensors and plain containers only."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 (no state is a valid default)
        """Restore what ``state_dict`` returned."""


def merge(aggregator: Aggregator, state: State, schema: Schema, updates: Iterable[Update]) -> State:
    """Return the next global state from updates in any order; the sites started at ``state``."""
    ordered = sorted(updates, key=lambda one: one.site)
    aggregator.expect({one.site: examples_of(one) for one in ordered}, schema)
    aggregator.start(state, schema)
    for update in ordered:
        aggregator.add(update)
    return aggregator.finish()
