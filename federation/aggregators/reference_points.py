"""The two reference points of every comparison: each site alone, and all data in one place."""

from __future__ import annotations

from typing_extensions import override

from federation.aggregators.base import Aggregator, Exchange
from federation.aggregators.fedavg import FedAvg
from federation.exchange.schema import Schema, State
from federation.exchange.update import Update


class Local(Aggregator):
    """Merge nothing: every site trains alone, and the global state stays as it was.

    In the first round all sites start from the global weights, later from their own last ones, with which they are
    also evaluated. Updates serve the report only.
    """

    exchange = Exchange(merged=False)

    @override
    def start(self, state: State, schema: Schema) -> None:
        self._state = state

    @override
    def add(self, update: Update) -> None:
        pass

    @override
    def finish(self) -> State:
        return dict(self._state)


class Pooled(FedAvg):
    """Train on the union of all sites' data: what a federation could reach at best, and must not do.

    One site, named ``pooled``, trains on the training sets of all sites; the mean over one site is that site's weights.
    """

    data = "pooled"

    @override
    def add(self, update: Update) -> None:
        if self.sums.last is not None:
            raise ValueError(
                f"update of {update.site!r} after {self.sums.last!r}: pooled data are trained on as one site"
            )
        super().add(update)
