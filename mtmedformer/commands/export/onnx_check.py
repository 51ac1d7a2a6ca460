"""Whether a graph says in onnxruntime what the model says in PyTorch, to the last digits that count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mtmedformer.errors import ConfigError

TOLERANCE = 1e-4
"""Largest difference from PyTorch, absolute up to values of 1 and relative beyond (boxes are in pixels)."""

INPUT = "image"
"""Name of the graph's input."""


Model = Callable[[Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Difference:
    """How far an output of the graph is from PyTorch's.

    Attributes:
        output: Its name.
        shape: Its shape at the largest image tried.
        absolute: Largest absolute difference over all images tried.
        allowed: Largest share of the allowed difference that occurred; above 1 is too far.
    """

    output: str
    shape: tuple[int, ...]
    absolute: float
    allowed: float


def compare(
    content: bytes, names: Sequence[str], model: Model, shapes: Sequence[tuple[int, ...]], seed: int = 0
) -> tuple[Difference, ...]:
    """Run images through onnxruntime and PyTorch and return how far each output differs at most.

    Args:
        content: The ONNX file.
        names: Its outputs.
        model: What gives the same outputs in PyTorch, in that order.
        shapes: Shapes of the images to try.
        seed: Seed of their values.

    Raises:
        ConfigError: An output has another shape than in PyTorch.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(seed)
    worst: dict[str, Difference] = {}
    for shape in shapes:
        image = torch.rand(shape, generator=generator)
        with torch.inference_mode():
            expected = [value.numpy() for value in model(image)]
        found = session.run(list(names), {INPUT: image.numpy()})
        for name, ours, theirs in zip(names, expected, found, strict=True):
            if ours.shape != theirs.shape:
                raise ConfigError(f"{name} has shape {theirs.shape} instead of {ours.shape}")
            gap = np.abs(ours.astype(np.float64) - theirs)
            share = float((gap / (TOLERANCE * np.maximum(1, np.abs(ours)))).max(initial=0))
            before = worst.get(name, Difference(name, (), 0.0, 0.0))
            worst[name] = Difference(
                name, ours.shape, max(before.absolute, float(gap.max(initial=0))), max(before.allowed, share)
            )
    return tuple(worst.values())


def shapes_to_try(channels: int, size: tuple[int, int], free: bool) -> list[tuple[int, ...]]:
    """Return shapes to check with: batches of one and more, the training size, a smaller and an odd one."""
    if not free:
        return [(1, channels, *size), (3, channels, *size), (2, channels, *size)]
    small, odd = (max(32, size[0] // 2), max(32, size[1] // 2)), (size[0] + 5, size[1] + 39)
    return [(1, channels, *size), (3, channels, *small), (2, channels, *odd)]
