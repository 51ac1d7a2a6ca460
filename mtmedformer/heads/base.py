"""What every task head is: a decoder that reads the shared pyramid, its loss, its predictions and its metrics."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mtmedformer.encoders.base import Encoder
from mtmedformer.storage.constructor_arguments import RecordsArguments

if TYPE_CHECKING:
    from mtmedformer.batch import Kind, Target, Task
    from mtmedformer.metrics.base import TaskMetrics


class TaskHead(RecordsArguments, nn.Module, ABC):
    """A decoder of one task, independent of other heads and of the data set.

    A head is constructed from its options alone (so that YAML can describe it) and gets its layers in ``build``, which
    ``MultiTaskModule`` calls once, before any weight is loaded.

    Args:
        classes: Class names in channel order.
    """

    kind: Kind
    """Which kind of target the head reads."""

    def __init__(self, classes: Sequence[str]) -> None:
        super().__init__()
        self.classes = tuple(classes)

    @abstractmethod
    def build(self, channels: int, strides: Sequence[int]) -> None:
        """Create the layers.

        Args:
            channels: Channels of every pyramid level.
            strides: Stride of each level, finest first, for example ``(4, 8, 16, 32, 64)``.
        """

    @abstractmethod
    def forward(self, pyramid: list[Tensor], size: tuple[int, int]) -> Any:
        """Decode a pyramid.

        Args:
            pyramid: One (B, channels, ceil(H / stride), ceil(W / stride)) tensor a level, finest first. In training B
                counts the images labelled for the task, at least one (all images where the head has BatchNorm).
            size: ``(H, W)`` of the network's input.

        Returns:
            Raw outputs, indexable only by this head: a tensor or a dataclass of tensors whose first axis is the batch.
        """

    @abstractmethod
    def loss(self, outputs: Any, target: Target) -> dict[str, Tensor]:
        """Return the named loss terms, already weighted against each other; their sum is the task's loss.

        Each term is a mean over the labelled samples (or pixels, or boxes) of the batch only. With no labelled sample
        every term is zero but still depends on this head's parameters, so that DDP sees a gradient for each.
        """

    @abstractmethod
    def predict(self, outputs: Any, size: tuple[int, int]) -> Any:
        """Turn raw outputs into predictions in pixels of the network's input.

        Returns:
            classification: float (B, K) probabilities. segmentation: float (B, K, H, W) probabilities. detection: a
            list of B dicts with ``boxes`` (N, 4) xyxy, ``scores`` (N,) sorted downwards, ``labels`` (N,) in 0..K-1.
        """

    def class_logits(self, outputs: Any, size: tuple[int, int]) -> Tensor | None:
        """Return the logits behind ``predict``'s probabilities, (B, C) or (B, C, H, W), which a temperature divides.

        C is the number of classes, or one more (channel 0, background) where they exclude each other pixel by pixel.
        ``None``, the default: the predictions are no probabilities (boxes), and calibration leaves them alone.
        """
        return None

    def scaled(self, outputs: Any, temperature: float) -> Any:
        """Return the outputs with the logits of ``class_logits`` divided by a temperature.

        Raises:
            NotImplementedError: The head gives class logits and does not say how they are scaled.
        """
        raise NotImplementedError(f"{type(self).__name__} gives class logits, but not how they are scaled")

    def class_score(self, outputs: Any, label: int) -> Tensor:
        """Return one number an image, (B,), that is the larger the surer the head is of a class; Grad-CAM follows it.

        By default the class logit of the image, or the mean logit of the pixels that are of the class (all of them
        where none is).

        Raises:
            NotImplementedError: The head gives no class logits and does not say what else to follow.
        """
        logits = self.class_logits(outputs, (1 << 30, 1 << 30))  # no size to crop to: the whole grid
        if logits is None:
            raise NotImplementedError(f"{type(self).__name__} does not say how sure it is of a class")
        channel = logits[:, label + (logits.shape[1] - len(self.classes))]
        if channel.ndim == 1:
            return channel
        inside = channel > 0 if logits.shape[1] == len(self.classes) else logits.argmax(1) == label + 1
        inside = inside | ~inside.flatten(1).any(1)[:, None, None]
        return (channel * inside).sum((1, 2)) / inside.sum((1, 2))

    def exported(self, outputs: Any, size: tuple[int, int]) -> dict[str, Tensor]:
        """Return what a graph that leaves Python computes, from which ``decoded`` makes the predictions.

        Tensors by name, their first axis the batch, none of whose shapes depends on what is in the image. By default
        the predictions themselves, under the empty name; a head whose predictions are no tensor
        returns the tensors they are made from.
        """
        return {"": self.predict(outputs, size)}

    def decoded(self, exported: dict[str, Tensor], size: tuple[int, int]) -> Any:
        """Return what ``predict`` gives, from what ``exported`` gave."""
        return exported[""]

    @abstractmethod
    def metrics(self) -> TaskMetrics:
        """Return a fresh metric: ``update(predictions, target, meta)``, then ``compute()``, a flat dict of scalars."""

    def task(self, name: str) -> Task:
        """Return the task this head answers, under the given name."""
        from mtmedformer.batch import Task

        return Task(name, self.kind, self.classes, getattr(self, "multi_label", False))


def build_heads(heads: Mapping[str, TaskHead], encoder: Encoder) -> nn.ModuleDict:
    """Build the layers of every head for an encoder and return the heads by name.

    Each head draws its weights from a random stream of its own, so that it starts from the same weights whichever other
    heads there are.
    """
    base = int(torch.randint(2**31, ()))
    for name, head in heads.items():
        with _seeded_by(base, name):
            head.build(encoder.channels, encoder.strides)
    return nn.ModuleDict(heads)


@contextmanager
def _seeded_by(base: int, name: str) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(base + zlib.crc32(name.encode()))
        yield
