"""Measure how far the updates of the sites differ in a round, and the weight of each site; for the report only."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from federation.aggregators.base import Aggregator
from federation.aggregators.bayesian import BayesianAggregator
from federation.aggregators.fedavg import FedAvg
from federation.aggregators.weighted_mean import WeightedMeans
from federation.bayes.posterior import LEAST_CURVATURE, relative_precision
from federation.exchange.schema import Schema, State
from federation.exchange.update import BlockUpdate, Update


@dataclass(frozen=True)
class SiteDrift:
    """How one site's update compares with the merged one.

    Attributes:
        cosine: Cosine of its change to the merged change over all weights it sent; ``None`` if nothing was merged.
        share: By block, the site's mean weight in the merge: the sites that sent the block sum to 1. Empty where the
            merge has no weights.
    """

    cosine: float | None = None
    share: dict[str, float] = field(default_factory=dict)


class Drift:
    """Compares the updates of one round with the merged update.

    It keeps at most ``most`` elements of every tensor of a site, the same ones for all sites, so that its memory is a
    fraction of a model for any number of sites. Smaller tensors are kept whole, and their numbers are exact.

    Args:
        aggregator: The aggregator that merges, which defines the weight of each update.
        schema: The model's schema.
        most: Largest number of elements kept of a tensor.
    """

    def __init__(self, aggregator: Aggregator, schema: Schema, most: int = 4096) -> None:
        self.aggregator, self.schema, self.most = aggregator, schema, most
        self.norms = frozenset() if aggregator.exchange.norms else schema.norms
        self._changes: dict[str, dict[str, Tensor]] = defaultdict(dict)
        self._weights: dict[str, dict[str, Tensor]] = defaultdict(dict)

    def add(self, update: Update) -> None:
        """Add one site's update; it is not changed."""
        for name, block in update.blocks.items():
            if block.num_examples <= 0 or self.schema.block(name).personal:
                continue
            for key, delta in block.delta.items():
                if key in self.norms:
                    continue
                places = self._places(delta.numel())
                self._changes[key][update.site] = delta.flatten()[places].double()
                weight = self._weight(update.site, block, key)
                if weight is not None:
                    spread = weight.expand(delta.shape).flatten()[places] if weight.ndim else weight.expand(len(places))
                    self._weights[key][update.site] = spread.double()

    def finish(self, before: State, after: State) -> dict[str, SiteDrift]:
        """Return the measures of every site that sent a change.

        Args:
            before: The global state the round began with.
            after: The merged state.

        """
        products: dict[str, list[float]] = {}
        shares: dict[str, dict[str, list[float]]] = {}
        for block in self.schema.blocks:
            for key in (key for key in block.keys if key in self._changes):
                count = before[key].numel()
                places = self._places(count)
                merged = (after[key].flatten()[places].double() - before[key].flatten()[places].double()).cpu()
                for site, change in self._changes[key].items():
                    found = torch.stack([change @ merged, change @ change, merged @ merged]) * (count / len(places))
                    sums = products.setdefault(site, [0.0, 0.0, 0.0])
                    products[site] = [a + b for a, b in zip(sums, found.tolist(), strict=True)]
                for site, share in self.shares(key).items():
                    total = shares.setdefault(site, {}).setdefault(block.name, [0.0, 0.0])
                    shares[site][block.name] = [total[0] + float(share.mean()) * count, total[1] + count]
        drifts = {}
        for site, (product, own, whole) in products.items():
            cosine = product / (own * whole) ** 0.5 if own > 0 and whole > 0 else None
            drifts[site] = SiteDrift(cosine, {name: a / b for name, (a, b) in shares.get(site, {}).items()})
        return drifts

    def shares(self, key: str) -> dict[str, Tensor]:
        """Return the weight of each site in the merge of a tensor, at the kept elements; their sum is 1."""
        weights = {site: self._final(key, weight) for site, weight in self._weights[key].items()}
        total = sum(weights.values(), torch.zeros(()))
        return {site: weight / total for site, weight in weights.items()}

    def _places(self, count: int) -> Tensor:
        if count <= self.most:
            return torch.arange(count)
        return torch.randint(count, (self.most,), generator=torch.Generator().manual_seed(count))

    def _weight(self, site: str, block: BlockUpdate, key: str) -> Tensor | None:
        """Return the weight of a tensor of an update; with ``between``, its absolute precision."""
        if self._differ:
            known = key in self.schema.parameters and self.aggregator.exchange.precision
            scale = max(block.scale.get(key, 1.0), LEAST_CURVATURE) if known else 1.0
            return (relative_precision(block, key) if known else torch.ones(())).double() * scale * block.num_examples
        if isinstance(self.aggregator, FedAvg) and isinstance(self.aggregator.centre(), WeightedMeans):
            return torch.as_tensor(self.aggregator.weight(site, block, key))
        return None

    def _final(self, key: str, weight: Tensor) -> Tensor:
        """Return the final weight of a tensor; with ``between``, the variance between sites limits it."""
        if not self._differ:
            return weight
        assert isinstance(self.aggregator, BayesianAggregator)
        even = 1 / (1 / weight + self.aggregator.variances.get(key, 0.0))
        return (even + self.aggregator.kappa * even.mean()) / (1 + self.aggregator.kappa)

    @property
    def _differ(self) -> bool:
        return isinstance(self.aggregator, BayesianAggregator) and self.aggregator.between
