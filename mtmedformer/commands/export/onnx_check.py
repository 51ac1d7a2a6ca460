"""Check that the outputs of a graph in onnxruntime equal those of the model in PyTorch, within a tolerance."""

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
class OutputDifference:
    """The difference of one output of the graph from PyTorch.

    Attributes:
        output: Its name.
        shape: Its shape at the largest image tried.
        absolute: Largest absolute difference over all images tried.
        allowed: Largest difference as a share of the allowed one; above 1 is too large.
    """

    output: str
    shape: tuple[int, ...]
    absolute: float
    allowed: float


def compare(
    content: bytes, names: Sequence[str], model: Model, shapes: Sequence[tuple[int, ...]], seed: int = 0
) -> tuple[OutputDifference, ...]:
    """Run images through onnxruntime and PyTorch and return the largest difference of each output.

    Args:
        content: The ONNX file.
        names: Names of its outputs.
        model: Function that gives the same outputs in PyTorch, in that order.
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
    worst: dict[str, OutputDifference] = {}
    for shape in shapes:
        image = torch.rand(shape, generator=generator)
        with torch.inference_mode():
            expected = [value.numpy() for value in model(image)]
        actual = session.run(list(names), {INPUT: image.numpy()})
        for name, ours, theirs in zip(names, expected, actual, strict=True):
            if ours.shape != theirs.shape:
                raise ConfigError(f"{name} has shape {theirs.shape} instead of {ours.shape}")
            gap = np.abs(ours.astype(np.float64) - theirs)
            share = float((gap / (TOLERANCE * np.maximum(1, np.abs(ours)))).max(initial=0))
            before = worst.get(name, OutputDifference(name, (), 0.0, 0.0))
            worst[name] = OutputDifference(
                name, ours.shape, max(before.absolute, float(gap.max(initial=0))), max(before.allowed, share)
            )
    return tuple(worst.values())


def shapes_to_try(channels: int, size: tuple[int, int], free: bool) -> list[tuple[int, ...]]:
    """Return the shapes to check: batches of one and more, the training size, a smaller and an odd size."""
    if not free:
        return [(1, channels, *size), (3, channels, *size), (2, channels, *size)]
    small, odd = (max(32, size[0] // 2), max(32, size[1] // 2)), (size[0] + 5, size[1] + 39)
    return [(1, channels, *size), (3, channels, *small), (2, channels, *odd)]
