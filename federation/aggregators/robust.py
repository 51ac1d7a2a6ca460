"""Robust centres, which one bad site cannot move far: the median and the trimmed mean per coordinate.

Order statistics need all values at once, so these two keep every site's changes until the end of the round: they do not
stream, and their memory grows by one copy of the model per site.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from typing_extensions import override

from federation.aggregators.fedavg import FedAvg
from federation.aggregators.weighted_mean import Centre
from mtmedformer.errors import ConfigError


class KeptValues:
    """Keep every site's tensors by key, for a centre that needs them all at once.

    Args:
        centre: From float64 (sites, …), sorted along the sites, to (…).
    """

    def __init__(self, centre: Callable[[Tensor], Tensor]) -> None:
        self._centre = centre
        self._values: dict[str, list[Tensor]] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._values))

    def add(self, name: str, value: Tensor, weight: Tensor | float) -> None:
        """Keep one site's tensor; the weight is ignored."""
        self._values.setdefault(name, []).append(value)

    def pop(self, name: str) -> Tensor:
        """Return the centre of a tensor in float64, and drop its values."""
        return self._centre(torch.stack(self._values.pop(name)).double().sort(dim=0).values)


class CoordinateMedian(FedAvg):
    """Move every weight by the median of its owners' changes; all sites have the same weight.

    With an even number of owners it is the mean of the middle two. Fewer than half of the sites, whatever they send,
    cannot move a weight beyond the range of what the others sent.

    Example:
        >>> from federation.aggregators import merge
        >>> from federation.exchange.schema import Block, Schema
        >>> from federation.exchange.update import BlockUpdate, Update
        >>> schema = Schema((Block("encoder", ("w",)),), {"w": (1,)}, frozenset({"w"}), frozenset(), ())
        >>> changes = {"a": 1.0, "b": 2.0, "c": 1e6}
        >>> updates = [
        ...     Update(site, 0, "", "", {"encoder": BlockUpdate(10, {"w": torch.tensor([change])})})
        ...     for site, change in changes.items()
        ... ]
        >>> merge(CoordinateMedian(), {"w": torch.zeros(1)}, schema, updates)["w"]
        tensor([2.])

    Reference:
        Yin et al., Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates, ICML 2018, definition 1.
    """

    def __init__(self) -> None:
        super().__init__("equal")

    @override
    def centre(self) -> Centre:
        return KeptValues(_median)


class TrimmedMean(FedAvg):
    """Move every weight by the mean of its owners' changes without the smallest and the largest; sites count the same.

    Args:
        trim: Share of the sites cut at each end, rounded down to whole sites; with four sites, below 0.25 none is cut.

    Raises:
        ConfigError: When ``trim`` is not in [0, 0.5).

    Reference:
        Yin et al., Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates, ICML 2018, definition 2.
    """

    def __init__(self, trim: float = 0.25) -> None:
        super().__init__("equal")
        if not 0 <= trim < 0.5:
            raise ConfigError(f"aggregator.trim: {trim} cuts everything or nothing; choose a share in [0, 0.5)")
        self.trim = trim

    @override
    def centre(self) -> Centre:
        return KeptValues(self._trimmed)

    def _trimmed(self, ordered: Tensor) -> Tensor:
        cut = int(self.trim * len(ordered) + 1e-9)  # .1 of 30 is 3 in spite of binary rounding
        return ordered[cut : len(ordered) - cut].mean(0)


def _median(ordered: Tensor) -> Tensor:
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]).mul_(0.5)
