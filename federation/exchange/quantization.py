"""Tensors in fewer bits on their way to the server."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Rounding = Literal["none", "fp16", "int8"]


def step_of(value: Tensor, rounding: Rounding) -> float:
    """Return what a tensor is divided by before it is rounded, above 0.

    ``int8``: a 127th of the largest magnitude. ``fp16``: the power of two above it, so that nothing overflows and
    small tensors do not drown in the subnormals.
    """
    largest = float(value.abs().max()) if value.numel() else 0.0
    if largest == 0:
        return 1.0
    return largest / 127 if rounding == "int8" else math.ldexp(1.0, math.frexp(largest)[1])


def encoded(value: Tensor, step: float, rounding: Rounding) -> Tensor:
    """Return a tensor as it crosses the network, the nearest multiple or half-precision number, ties to even.

    The error is at most ``step / 2`` with int8, and |x| / 2¹¹ + ``step`` / 2²⁵ with fp16.
    """
    scaled = value.double() / step
    return scaled.round_().clamp_(-127, 127).to(torch.int8) if rounding == "int8" else scaled.half()


def decoded(value: Tensor, step: float) -> Tensor:
    """Return float32 of what crossed the network; ``encoded`` of it gives back the same bits."""
    return (value.double() * step).float()
