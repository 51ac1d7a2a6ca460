"""Weighted means over sites from running sums, so that memory does not grow with the number of sites."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

CHUNK = 1 << 18  # elements worked on at once: 2 MiB of float64, which stays in a core's cache


class Centre(Protocol):
    """Collects tensors of several sites by name and gives one back for each name."""

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names that were added; ``pop`` may be called meanwhile."""
        ...

    def add(self, name: str, value: Tensor, weight: Tensor | float) -> None:
        """Add one site's tensor and its weight, which broadcasts to it."""
        ...

    def pop(self, name: str) -> Tensor:
        """Return a tensor's centre in float64, and forget what was collected for it."""
        ...


class WeightedMeans:
    r"""Weighted means of tensors that arrive one site at a time: $\sum_k a_k x_k / \sum_k a_k$ for every name.

    Every product, sum and quotient is taken in float64. The sums are held in float64 as well, unless weights differ
    within the rows of a matrix or kernel: numerator and denominator would then be four copies of the model, so both are
    held in float32 (two copies), rounded once a site.
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
            weight: Strictly positive, of a shape that broadcasts to the value's: a scalar, one number an output row
                (rows, 1, …), or one an element.
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
        """Return the weighted mean of a tensor in float64, and forget its sums."""
        return self._tops.pop(name).double().div_(self._bottoms.pop(name).double())

    def nbytes(self) -> int:
        """Return the bytes the sums occupy."""
        return sum(t.numel() * t.element_size() for t in [*self._tops.values(), *self._bottoms.values()])


def _fitted(weight: Tensor, shape: torch.Size) -> Tensor:
    """Return a weight as a scalar, as one number a row, or as one number an element."""
    if weight.numel() == 1:
        return weight.reshape(())
    rows = (shape[0], *[1] * (len(shape) - 1))
    return weight if weight.shape == rows else weight.expand(shape)


def _parts(value: Tensor) -> Iterator[slice | tuple[()]]:
    """Yield what indexes a tensor a few rows at a time, about ``CHUNK`` elements each."""
    if value.ndim == 0:
        yield ()
        return
    step = max(1, CHUNK // max(1, value.shape[1:].numel()))
    for start in range(0, len(value), step):
        yield slice(start, start + step)
