"""Federated averaging, a block at a time, over the sites that hold the block's labels."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from federation.aggregators.base import Aggregator
from federation.aggregators.weighted_mean import Centre, WeightedMeans
from federation.exchange.schema import Schema, State
from federation.exchange.update import BlockUpdate, Update
from mtmedformer.errors import ConfigError

Weights = Literal["num_examples", "equal"]


class FedAvg(Aggregator):
    r"""Move each block by the weighted mean of its owners' changes, $w \leftarrow w + \sum n_k \Delta_k / \sum n_k$.

    Owners of a block are the sites that trained it in this round; a block nobody trained stays as it was, bit for bit.
    Running statistics of BatchNorm (floating-point buffers) are averaged like weights. Other aggregators are this one
    with another weight (``weight``) or another server step (``step``), so they share its sums to the last bit.

    Args:
        weights: ``num_examples`` weights each site by the labelled samples that reached the block; ``equal`` gives
            every owner the same weight.

    Raises:
        ConfigError: When ``weights`` is neither.

    Reference:
        McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, AISTATS 2017.
    """

    def __init__(self, weights: Weights = "num_examples") -> None:
        if weights not in ("num_examples", "equal"):
            raise ConfigError(f"aggregator.weights: {weights!r} is neither 'num_examples' nor 'equal'")
        self.power = 1.0 if weights == "num_examples" else 0.0

    def start(self, state: State, schema: Schema) -> None:
        """Begin a round from the state that the sites began at."""
        self._state, self._schema = state, schema
        self._means = self.centre()
        self._counters: dict[str, Tensor] = {}
        self._last: str | None = None

    def add(self, update: Update) -> None:
        """Take one site's update.

        Raises:
            ValueError: When updates do not come in the order of the site names, or one site comes twice.
        """
        self._receive(update)
        for block, key, delta in self._changes(update):
            self._means.add(key, delta, self.weight(block, key))

    def finish(self) -> State:
        """Return the next global state; tensors nobody sent are those of before the round, not copies."""
        merged = dict(self._state)
        for key in self._means:
            old, mean = self._state[key], self._means.pop(key)
            change = self.step(key, mean) if key in self._schema.parameters else mean
            merged[key] = change.add_(old).to(old.dtype)
        return merged | self.untouched_state() | self._counters

    def untouched_state(self) -> State:
        """Return the pre-round values of tensors that ``starting_state`` moved but no site updated."""
        return {}

    def weight(self, block: BlockUpdate, key: str) -> Tensor | float:
        """Return what one site's change of one tensor weighs, above 0; broadcasts to the tensor."""
        return math.pow(block.num_examples, self.power)

    def step(self, key: str, mean: Tensor) -> Tensor:
        """Return the server's change of one parameter for its owners' mean change; float64, may reuse ``mean``."""
        return mean

    def centre(self) -> Centre:
        """Return what collects the changes of a round; it is given each change and its weight."""
        return WeightedMeans()

    def _receive(self, update: Update) -> None:
        """Check the order of sites, and take the integer counters: the largest value stays."""
        if self._last is not None and update.site <= self._last:
            raise ValueError(f"update of site {update.site!r} after {self._last!r}: add each site once, in name order")
        self._last = update.site
        for key, value in update.counters.items():
            if not (self.personal_norms and key in self._schema.norms):
                self._counters[key] = torch.maximum(self._counters.get(key, self._state[key]), value)

    def _changes(self, update: Update) -> list[tuple[BlockUpdate, str, Tensor]]:
        """Return the changes of an update that are merged: blocks with examples, nothing personal."""
        return [
            (block, key, delta)
            for name, block in update.blocks.items()
            if block.num_examples > 0 and not self._schema.block(name).personal
            for key, delta in block.delta.items()
            if not (self.personal_norms and key in self._schema.norms)
        ]
