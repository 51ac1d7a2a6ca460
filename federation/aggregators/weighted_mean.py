"""Weighted means over sites from running sums, so that memory does not grow with the number of sites."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from federation.exchange.schema import Schema, State
from federation.exchange.update import BlockUpdate, Update

CHUNK = 1 << 18  # elements worked on at once: 2 MiB of float64, which stays in a core's cache


class Centre(Protocol):
    """Collects the tensors of several sites by key and reduces them to one tensor per key."""

    def __iter__(self) -> Iterator[str]:
        """Iterate over the keys that were added; ``pop`` may be called meanwhile."""
        ...

    def add(self, name: str, value: Tensor, weight: Tensor | float) -> None:
        """Add one site's tensor and its weight, which broadcasts to it."""
        ...

    def pop(self, name: str) -> Tensor:
        """Return the centre of one key in float64, and drop what was collected for it."""
        ...


class WeightedMeans:
    r"""Weighted means of tensors that arrive one site at a time: $\sum_k a_k x_k / \sum_k a_k$ for every name.

    Every product, sum and quotient is taken in float64. The sums are held in float64 as well, unless weights differ
    within the rows of a matrix or kernel: numerator and denominator would then be four copies of the model, so both are
    held in float32 (two copies), rounded once per site.
    """

    def __init__(self) -> None:
        self._tops: dict[str, Tensor] = {}
        self._bottoms: dict[str, Tensor] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._tops))

    def add(self, name: str, value: Tensor, weight: Tensor | float) -> None:
        """Add one site's tensor.

        Args:
            name: Name of the tensor.
            value: Its value at the site, any floating-point type.
            weight: Strictly positive, of a shape that broadcasts to the value's: a scalar, one number per output row
                (rows, 1, …), or one per element.
        """
        if not isinstance(weight, Tensor):
            weight = torch.tensor(weight, dtype=torch.float64)
        weight = _fitted(weight, value.shape)
        top, bottom = self._tops.get(name), self._bottoms.get(name, torch.zeros((), dtype=torch.float64))
        shape = torch.broadcast_shapes(bottom.shape, weight.shape)  # type: ignore[no-untyped-call]
        within_rows = len(shape) > 1 and shape == value.shape and shape[1:].numel() > 1
        held = torch.float32 if within_rows else torch.float64
        top = torch.zeros(value.shape, dtype=held) if top is None else top.to(held)
        bottom = bottom.expand(shape).to(held, copy=shape != bottom.shape)
        for part in _parts(value):
            top[part] += value[part].double().mul_(weight[part] if weight.ndim else weight)
            if bottom.ndim:
                bottom[part] += (weight[part] if weight.ndim else weight).double()
        if not bottom.ndim:
            bottom += weight
        self._tops[name], self._bottoms[name] = top, bottom

    def pop(self, name: str) -> Tensor:
        """Return the weighted mean of a tensor in float64, and drop its sums."""
        return self._tops.pop(name).double().div_(self._bottoms.pop(name).double())

    def nbytes(self) -> int:
        """Return the bytes the sums occupy."""
        return sum(t.numel() * t.element_size() for t in [*self._tops.values(), *self._bottoms.values()])


class RoundSums:
    r"""The sums of one round: checks each update, collects its changes, and returns the merged state.

    Running statistics of BatchNorm are merged to those of the union of the sites' images: the variance is the mean of
    the sites' variances plus the variance of their means, $\bar v + \overline{m^2} - \bar m^2$.

    Args:
        state: The state that the sites started from (CPU tensors, not changed).
        schema: The model's schema.
        local: Keys that are not merged.
        centre: Collects the changes; ``None`` is the weighted mean.

    Attributes:
        last: Name of the site added last; ``None`` before the first.
    """

    def __init__(self, state: State, schema: Schema, local: frozenset[str], centre: Centre | None = None) -> None:
        self.state, self.schema, self.local = state, schema, local
        self.centre = WeightedMeans() if centre is None else centre
        self.last: str | None = None
        self._counters: dict[str, Tensor] = {}
        self._variances = schema.statistics() if isinstance(self.centre, WeightedMeans) else {}
        self._squares = WeightedMeans()

    def receive(self, update: Update) -> list[tuple[BlockUpdate, str, Tensor]]:
        """Take the integer counters of an update and return the changes to merge: its blocks with examples.

        Raises:
            ValueError: When updates do not come in the order of the site names, or one site comes twice.
        """
        if self.last is not None and update.site <= self.last:
            raise ValueError(f"update of site {update.site!r} after {self.last!r}: add each site once, in name order")
        self.last = update.site
        for key, value in update.counters.items():
            if key not in self.local:
                self._counters[key] = torch.maximum(self._counters.get(key, self.state[key]), value)
        return [
            (block, key, delta)
            for name, block in update.blocks.items()
            if block.num_examples > 0 and not self.schema.block(name).personal
            for key, delta in block.delta.items()
            if key not in self.local
        ]

    def add(self, key: str, change: Tensor, weight: Tensor | float) -> None:
        """Add one site's change of one tensor; the weight is above 0 and broadcasts to it."""
        self.centre.add(key, change, weight)
        if key in self._variances:
            self._squares.add(key, change.double().square(), weight)

    def finish(self, step: Callable[[str, Tensor], Tensor]) -> State:
        """Return the merged state; tensors that no site sent are those of ``state``, not copies.

        Args:
            step: From a parameter's key and mean change (float64, may be overwritten) to the server's step; buffers
                move by their mean change.
        """
        merged = dict(self.state)
        between: dict[str, Tensor] = {}
        for key in self.centre:
            old, mean = self.state[key], self.centre.pop(key)
            if key in self._variances:
                between[self._variances[key]] = self._squares.pop(key).sub_(mean.square()).clamp_min_(0)
            change = step(key, mean) if key in self.schema.parameters else mean
            merged[key] = change.add_(old).to(old.dtype)
        for key, variance in between.items():
            merged[key] = merged[key].double().add_(variance).to(merged[key].dtype)
        return merged | self._counters


def _fitted(weight: Tensor, shape: torch.Size) -> Tensor:
    """Return a weight as a scalar, as one number per row, or as one number per element."""
    if weight.numel() == 1:
        return weight.reshape(())
    rows = (shape[0], *[1] * (len(shape) - 1))
    return weight if weight.shape == rows else weight.expand(shape)


def _parts(value: Tensor) -> Iterator[slice | tuple[()]]:
    """Yield slices of a tensor's rows of about ``CHUNK`` elements each."""
    if value.ndim == 0:
        yield ()
        return
    step = max(1, CHUNK // max(1, value.shape[1:].numel()))
    for start in range(0, len(value), step):
        yield slice(start, start + step)
