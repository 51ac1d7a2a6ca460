"""The network: one shared encoder and any number of task heads, with their predictions and losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, Literal, cast

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from mtmedformer.batch import Batch, Meta, Target, Task
from mtmedformer.calibration import TaskCalibration
from mtmedformer.encoders.base import Encoder
from mtmedformer.encoders.familiarity import TrainingDistribution
from mtmedformer.errors import ConfigError
from mtmedformer.heads.base import TaskHead, build_heads
from mtmedformer.heads.capabilities import GroupsImages, calibrated
from mtmedformer.heads.finite import marked
from mtmedformer.heads.layers import mixes_images
from mtmedformer.metrics.cases import case_keys
from mtmedformer.protocols import PredictionStrategy
from mtmedformer.storage.hashing import ensemble_digest, weights_digest


class MultiTaskNetwork(L.LightningModule):
    """Computes outputs, predictions and losses of all tasks from one pass of the encoder.

    Args:
        encoder: The shared encoder; its pyramid feeds every head.
        heads: Task heads by task name; with ``auto`` there is none until ``add_heads``.
        tasks: Keep only the heads of these names; ``None`` keeps all.
        predictor: How whole images are predicted.
        channels_last: Use the channels-last memory format.

    Attributes:
        predictor: How ``test`` and ``predict`` predict an image; a callback may set another one.
        calibration: Temperatures and thresholds by task, stored in the checkpoint.
        members: Further members of the ensemble of which this network is the first (`mtmedformer.inference.ensemble`);
            not among its submodules.
        familiarity: What the training images were like, stored in the checkpoint; ``None`` before it is fitted.

    Raises:
        ConfigError: When there is no head, or ``tasks`` names a task that has none.
    """

    def __init__(
        self,
        encoder: Encoder,
        heads: dict[str, TaskHead] | Literal["auto"],
        tasks: list[str] | None,
        predictor: PredictionStrategy,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleDict() if heads == "auto" else self._built(heads, tasks)
        self.predictor = predictor
        self.channels_last = channels_last
        self.calibration: dict[str, TaskCalibration] = {}
        self.members: tuple[MultiTaskNetwork, ...] = ()
        self.familiarity: TrainingDistribution | None = None

    @property
    def in_chans(self) -> int:
        """Channels of the image."""
        return self.encoder.in_chans

    @property
    def tasks(self) -> dict[str, Task]:
        """The tasks of this model by name."""
        return {name: head.task(name) for name, head in self._heads().items()}

    def forward(self, image: Tensor) -> dict[str, Any]:
        """Return each head's raw outputs for ``image`` float (B, C, H, W) in [0, 1]."""
        pyramid = self._pyramid(image)
        return {name: head(pyramid, image_size(image)) for name, head in self._heads().items()}

    @torch.no_grad()
    def features(self, image: Tensor) -> Tensor:
        """Return the mean of every channel of every level of the pyramid, float (B, levels * channels).

        Args:
            image: float (B, C, H, W) in [0, 1].
        """
        return torch.cat([level.mean(dim=(2, 3)) for level in self._pyramid(image)], dim=1)

    def predict(self, image: Tensor, raw: bool = False) -> dict[str, Any]:
        """Return each head's predictions (see ``TaskHead.predict``) for ``image`` float (B, C, H, W) in [0, 1].

        Probabilities are calibrated where ``calibration`` has a temperature for the task; ``raw`` adds the
        uncalibrated ones as ``raw/<task>``. Where the outputs of an image are not finite, so are its predictions.
        """
        outputs = self(image)
        predictions = {}
        for name, head in self._heads().items():
            temperature = self.calibration[name].temperature if name in self.calibration else None
            scaled = calibrated(head, outputs[name], temperature)
            predictions[name] = marked(head.predict(scaled, image_size(image)), scaled)
            if raw and temperature is not None:
                predictions[f"raw/{name}"] = head.predict(outputs[name], image_size(image))
        return predictions

    def digest(self) -> str:
        """Return 16 digits that stand for the weights of this network, or of all members of its ensemble."""
        return ensemble_digest([weights_digest(self.state_dict()), *(one.digest() for one in self.members)])

    def predict_whole(self, image: Tensor, raw: bool = False) -> dict[str, Any]:
        """Return predictions as ``predict`` does, computed by ``predictor`` (in windows, from samples …)."""
        return self.predictor.predict(self, image, raw)

    def labelled(self, batch: Batch) -> tuple[dict[str, Any], dict[str, Target]]:
        """Return each head's raw outputs and target for the images labelled for it; its loss reads no others.

        A head without a labelled image reads the first image, so that its parameters get a zero gradient; a head with
        BatchNorm, or over cases, reads all images.
        """
        with self.grouped(batch.meta):
            return self._labelled(batch)

    def _labelled(self, batch: Batch) -> tuple[dict[str, Any], dict[str, Target]]:
        pyramid, size = self._pyramid(batch.image), image_size(batch.image)
        outputs, targets = {}, {}
        for name, head in self._heads().items():
            target, levels = batch.targets[name], pyramid
            rows = target.present.nonzero().flatten()
            if len(rows) < len(batch) and not (mixes_images(head) or isinstance(head, GroupsImages)):
                rows = rows if len(rows) else rows.new_zeros(1)
                target, levels = target[rows], [level[rows] for level in pyramid]
            outputs[name], targets[name] = head(levels, size), target
        return outputs, targets

    @contextmanager
    def grouped(self, meta: Sequence[Meta]) -> Iterator[None]:
        """Let the heads over cases, also those of other members of the ensemble, read a batch by case.

        Args:
            meta: One entry per image of the batch.
        """
        networks: tuple[MultiTaskNetwork, ...] = (self, *self.members)
        heads = [one for net in networks for one in net.heads.values() if isinstance(one, GroupsImages)]
        cases = torch.from_numpy(np.unique(case_keys(meta), return_inverse=True)[1]) if heads else None
        try:
            for head in heads:
                head.group(cases)
            yield
        finally:
            for head in heads:
                head.group(None)

    def task_losses(
        self, outputs: dict[str, Any], targets: dict[str, Target]
    ) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]], dict[str, int]]:
        """Return, by task, the loss, its named terms and the number of labelled samples."""
        terms = {name: head.loss(outputs[name], targets[name]) for name, head in self._heads().items()}
        losses = {name: torch.stack(list(t.values())).sum() for name, t in terms.items()}
        return losses, terms, {name: int(targets[name].present.sum()) for name in losses}

    def _built(self, heads: dict[str, TaskHead], tasks: list[str] | None) -> nn.ModuleDict:
        return build_heads(_chosen(heads, tasks), self.encoder)

    def _pyramid(self, image: Tensor) -> list[Tensor]:
        image = image.to(self.dtype)
        if self.channels_last:
            image = image.contiguous(memory_format=torch.channels_last)
        pyramid: list[Tensor] = self.encoder(image)
        return pyramid

    def _heads(self) -> dict[str, TaskHead]:
        return cast("dict[str, TaskHead]", dict(self.heads.items()))


@contextmanager
def new_tensors_in_float32() -> Iterator[None]:
    """Create tensors in float32 whatever the precision of the weights, which Lightning makes the default in a step."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def evaluation_step(step: Callable[[Any, Batch, int], Any]) -> Callable[[Any, Batch, int], Any]:
    """Run a step of ``validate``, ``test`` or ``predict`` with new tensors in float32 and the images by case."""

    @wraps(step)
    def run(module: MultiTaskNetwork, batch: Batch, batch_idx: int) -> Any:
        with new_tensors_in_float32(), module.grouped(batch.meta):
            return step(module, batch, batch_idx)

    return run


def image_size(image: Tensor) -> tuple[int, int]:
    """Return ``(H, W)`` of an image (…, H, W)."""
    return int(image.shape[-2]), int(image.shape[-1])


def _chosen(heads: dict[str, TaskHead], tasks: list[str] | None) -> dict[str, TaskHead]:
    if not heads:
        raise ConfigError(
            "model.heads is empty; name at least one, for example {lungs: {class_path: SegmentationHead}}, or leave "
            "model.heads out: it is then built from the tasks of the data"
        )
    unknown = sorted(set(tasks or []) - set(heads))
    if unknown:
        raise ConfigError(f"model.tasks={tasks}: no head is called {', '.join(unknown)}; heads are {', '.join(heads)}")
    return {name: head for name, head in heads.items() if tasks is None or name in tasks}
