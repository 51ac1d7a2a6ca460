"""Federated averaging per block, over the sites that hold the block's labels."""

from __future__ import annotations

import math
from typing import Any, Literal

from torch import Tensor
from typing_extensions import override

from federation.aggregators.base import Aggregator, Exchange
from federation.aggregators.server_step import ServerStep
from federation.aggregators.weighted_mean import Centre, RoundSums, WeightedMeans
from federation.exchange.schema import Schema, State
from federation.exchange.update import BlockUpdate, Update
from mtmedformer.errors import ConfigError

Weights = Literal["num_examples", "equal"]


class FedAvg(Aggregator):
    r"""Move each block by the weighted mean of its owners' changes, $w \leftarrow w + \sum n_k \Delta_k / \sum n_k$.

    Owners of a block are the sites that trained it in this round; a block without owners stays unchanged, bit for bit.
    Running statistics of BatchNorm become those of the union of the sites' images (``RoundSums``).

    Other aggregators are this one with another weight (override ``weight``), another server optimizer (set ``server``)
    or another centre than the mean (override ``centre``), so they share its sums to the last bit.

    Args:
        weights: ``num_examples`` weights each site by the labelled samples that reached the block; ``equal`` gives
            every owner the same weight.

    Attributes:
        power: 1 for ``num_examples``, 0 for ``equal``.
        server: The server optimizer.
        sums: The sums of the current round, from ``start`` on.

    Raises:
        ConfigError: When ``weights`` is neither.

    Example:
        >>> import torch
        >>> from federation.exchange.schema import Block, Schema
        >>> from federation.exchange.update import BlockUpdate, Update
        >>> schema = Schema((Block("encoder", ("w",)),), {"w": (1,)}, frozenset({"w"}), frozenset(), ())
        >>> fedavg = FedAvg()
        >>> fedavg.start({"w": torch.zeros(1)}, schema)
        >>> for site, n, change in (("a", 30, 1.0), ("b", 10, 5.0)):
        ...     fedavg.add(Update(site, 0, "", "", {"encoder": BlockUpdate(n, {"w": torch.tensor([change])})}))
        >>> fedavg.finish()["w"]
        tensor([2.])

    Reference:
        McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, AISTATS 2017.
    """

    sums: RoundSums

    def __init__(self, weights: Weights = "num_examples") -> None:
        if weights not in ("num_examples", "equal"):
            raise ConfigError(f"aggregator.weights: {weights!r} is neither 'num_examples' nor 'equal'")
        self.weights = weights
        self.power = 1.0 if weights == "num_examples" else 0.0
        self.server = ServerStep()

    @override
    def starting_state(self, state: State) -> State:
        return self.server.starting_state(state)

    @override
    def start(self, state: State, schema: Schema) -> None:
        self.sums = RoundSums(state, schema, self.exchange.local_keys(schema), self.centre())

    @override
    def add(self, update: Update) -> None:
        for block, key, delta in self.sums.receive(update):
            self.sums.add(key, delta, self.weight(update.site, block, key))

    @override
    def finish(self) -> State:
        return self.sums.finish(self.server.step) | self.server.untouched_state()

    def weight(self, site: str, block: BlockUpdate, key: str) -> Tensor | float:
        """Return the weight of a site's change of one tensor of a block: above 0, broadcasts to the tensor."""
        return math.pow(block.num_examples, self.power)

    def centre(self) -> Centre:
        """Return the object that collects the changes of a round and reduces them to one per tensor."""
        return WeightedMeans()

    @override
    def state_dict(self) -> dict[str, Any]:
        return self.server.state_dict()

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.server.load_state_dict(state)


class FedBN(FedAvg):
    """FedAvg whose normalisation layers stay at each site: their weights, biases, statistics and counters.

    Written for BatchNorm; here it applies to every kind (``Schema.norms``), since transformers normalise by layer. The
    global state keeps its initial norms, so evaluate each site's model with the site's own norms.

    Reference:
        Li et al., FedBN: Federated Learning on Non-IID Features via Local Batch Normalization, ICLR 2021.
    """

    exchange = Exchange(norms=False)
