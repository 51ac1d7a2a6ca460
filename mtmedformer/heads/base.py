"""Base of the task heads: a head decodes the shared pyramid and provides its loss, predictions and metrics."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mtmedformer.batch import Kind, Target, Task
from mtmedformer.encoders.base import Encoder
from mtmedformer.errors import ConfigError
from mtmedformer.metrics.base import TaskMetrics
from mtmedformer.storage.constructor_arguments import RecordsArguments
from mtmedformer.storage.safe_text import is_printable, printable


class TaskHead(RecordsArguments, nn.Module, ABC):
    """A decoder of one task, independent of other heads and of the data set.

    A head is constructed from its options alone (so that YAML can describe it) and gets its layers in ``build``, which
    ``MultiTaskModule`` calls once, before any weight is loaded. Calibration, Grad-CAM and export use further methods
    that only some heads have: ``mtmedformer.heads.capabilities``.

    Args:
        classes: Class names in channel order.
    """

    kind: Kind
    """Kind of the targets."""

    multi_label: bool = False
    """Whether several classes may hold at once; see ``Task``."""

    def __init__(self, classes: Sequence[str]) -> None:
        super().__init__()
        self.classes = tuple(classes)
        _check_names("classes", self.classes)

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
            pyramid: One (B, channels, ceil(H / stride), ceil(W / stride)) tensor per level, finest first. In training B
                is the number of images labelled for the task, at least one (all images if the head has BatchNorm).
            size: ``(H, W)`` of the network's input.

        Returns:
            Raw outputs in a format of this head: a tensor, or a dataclass of tensors whose first axis is the batch.
        """

    @abstractmethod
    def loss(self, outputs: Any, target: Target) -> dict[str, Tensor]:
        """Return the named loss terms, already weighted against each other; their sum is the task's loss.

        Each term is a mean over the labelled samples (or pixels, or boxes) of the batch. Without a labelled sample
        every term is zero but still depends on this head's parameters, because DDP needs a gradient for each.
        """

    @abstractmethod
    def predict(self, outputs: Any, size: tuple[int, int]) -> Any:
        """Compute predictions from raw outputs, in pixels of the network's input.

        Returns:
            classification: float (B, K) probabilities. segmentation: float (B, K, H, W) probabilities. detection: a
            list of B dicts with ``boxes`` (N, 4) xyxy, ``scores`` (N,) in descending order, ``labels`` (N,) in 0..K-1.
            regression: float (B, 1), the number in the unit of the task; of grades float (B, K) probabilities.
        """

    @abstractmethod
    def metrics(self) -> TaskMetrics:
        """Create a metric: ``update(predictions, target, meta)``, then ``compute()``, a flat dictionary of scalars."""

    def task(self, name: str) -> Task:
        """Return the description of the head's task under the given name."""
        return Task(name, self.kind, self.classes, self.multi_label)


def build_heads(heads: Mapping[str, TaskHead], encoder: Encoder) -> nn.ModuleDict:
    """Build the layers of every head for an encoder and return the heads by name.

    Each head draws its weights from its own random stream, so that its first weights do not depend on the other heads.
    """
    _check_names("names of heads", heads)
    base = int(torch.randint(2**31, ()))
    for name, head in heads.items():
        with _seeded_by(base, name):
            head.build(encoder.channels, encoder.strides)
    return nn.ModuleDict(heads)


def _check_names(what: str, names: Iterable[str]) -> None:
    """Refuse names with control characters: they are printed, and written into reports and file names."""
    if wrong := [name for name in names if not is_printable(str(name))]:
        raise ConfigError(f"{what}: '{printable(str(wrong[0]))}' has characters that cannot be printed; rename it")


@contextmanager
def _seeded_by(base: int, name: str) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(base + zlib.crc32(name.encode()))
        yield
