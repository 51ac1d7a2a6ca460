"""The two ends of every comparison: sites alone, and all data in one place."""

from __future__ import annotations

from federation.aggregators.base import Aggregator
from federation.aggregators.fedavg import FedAvg
from federation.exchange.schema import Schema, State
from federation.exchange.update import Update


class Local(Aggregator):
    """Merges nothing: every site trains on alone, and the global state stays what it was at the start.

    The orchestration reads ``merges = False``: a site begins each round with its own last weights and is judged by
    them; in the first round with the global ones, so all sites start equal. Updates are taken and forgotten, counters
    too, so the report still has their counts and norms.
    """

    merges = False

    def start(self, state: State, schema: Schema) -> None:
        """Begin a round from the global state."""
        self._state = state

    def add(self, update: Update) -> None:
        """Take one site's update, and leave it."""

    def finish(self) -> State:
        """Return the global state as it was."""
        return dict(self._state)


class Pooled(FedAvg):
    """Trains on the union of all sites' data, which no federation may do; the yardstick of what it could reach.

    The orchestration reads ``pooled = True``: it runs one site, named ``pooled``, whose training set is every site's,
    and adds its one update. The mean over one site is that site's
    weights.
    """

    pooled = True

    def add(self, update: Update) -> None:
        """Take the one update.

        Raises:
            ValueError: When there is a second one: then the sites were not pooled.
        """
        if self._last is not None:
            raise ValueError(f"update of {update.site!r} after {self._last!r}: pooled data are trained on as one site")
        super().add(update)
