"""Networks of other libraries as single-task baselines: segmentation_models_pytorch and torchvision detectors.

They contain their own encoder, so ``NoEncoder``, which returns the image, replaces the shared one. A model has one such
head. Data, loss of masks, budget, metrics and commands are the same as in other runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from mtmedformer.batch import DetectionTarget, Target
from mtmedformer.encoders.base import Encoder
from mtmedformer.errors import ConfigError
from mtmedformer.heads.base import TaskHead
from mtmedformer.heads.segmentation import SegmentationHead
from mtmedformer.metrics.base import TaskMetrics
from mtmedformer.metrics.detection import DetectionMetrics

LARGEST_STRIDE = 32

SCORE_THRESHOLD, MAX_DETECTIONS = 0.01, 100
"""Boxes with a lower score are dropped, and the largest number of boxes per image, as in ``DetectionHead``."""


class NoEncoder(Encoder):
    """Returns the image as the only level of the pyramid, for a head that contains its own network.

    Args:
        in_chans: Channels of the image.
    """

    def __init__(self, in_chans: int = 1) -> None:
        super().__init__()
        self.name, self.in_chans, self.fixed_size = "none", in_chans, None
        self.channels, self.strides = in_chans, (1,)

    @override
    def forward(self, image: Tensor) -> list[Tensor]:
        return [image]

    @override
    def layer_depths(self) -> dict[str, int]:
        return {}

    @override
    def no_weight_decay(self) -> set[str]:
        return set()


class LibrarySegmentation(SegmentationHead):
    """A network of segmentation_models_pytorch, trained with the losses of this project from random weights.

    Args:
        classes: As in ``SegmentationHead``.
        multi_label: As in ``SegmentationHead``.
        architecture: ``unet``, ``fpn``, ``segformer``, ``deeplabv3plus`` …
        encoder: An encoder of that library. Check its licence: ``mit_b0`` to ``mit_b5`` are not free.
        hausdorff: As in ``SegmentationHead``.

    Raises:
        ConfigError: The library has no such network.
    """

    def __init__(
        self,
        classes: Sequence[str],
        multi_label: bool = False,
        architecture: str = "unet",
        encoder: str = "resnet18",
        hausdorff: bool = True,
    ) -> None:
        super().__init__(classes, multi_label, strides=(1,), hausdorff=hausdorff)
        self.architecture, self.encoder = architecture, encoder

    @override
    def build(self, channels: int, strides: Sequence[int]) -> None:
        import segmentation_models_pytorch as smp

        _require_no_encoder(strides)
        outputs = len(self.classes) + (not self.multi_label)
        try:
            self.network = smp.create_model(
                self.architecture, self.encoder, encoder_weights=None, in_channels=channels, classes=outputs
            )
        except (KeyError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"head {type(self).__name__}: segmentation_models_pytorch has no {self.architecture} with encoder "
                f"{self.encoder} ({error})"
            ) from error

    @override
    def forward(self, pyramid: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Return logits (B, C, H, W): pad the image to a multiple of the stride and crop the logits."""
        height, width = (-(-side // LARGEST_STRIDE) * LARGEST_STRIDE for side in size)
        logits: Tensor = self.network(F.pad(pyramid[0], (0, width - size[1], 0, height - size[0])))
        return logits[..., : size[0], : size[1]]


class LibraryDetection(TaskHead):
    """A detector of torchvision, trained with its own losses from random weights, without a resize of the images.

    Args:
        classes: Class names in label order.
        architecture: A builder of ``torchvision.models.detection``, such as ``fasterrcnn_mobilenet_v3_large_320_fpn``,
            ``retinanet_resnet50_fpn_v2`` or ``fcos_resnet50_fpn``.

    Raises:
        ConfigError: torchvision has no such builder.
    """

    kind = "detection"

    def __init__(self, classes: Sequence[str], architecture: str = "fasterrcnn_mobilenet_v3_large_320_fpn") -> None:
        super().__init__(classes)
        self.architecture = architecture

    @override
    def build(self, channels: int, strides: Sequence[int]) -> None:
        from torchvision.models import detection, list_models

        _require_no_encoder(strides)
        if self.architecture not in list_models(detection):
            raise ConfigError(f"architecture: {self.architecture} is none of {', '.join(list_models(detection))}")
        box = "box_" if self.architecture.startswith("fasterrcnn") else ""
        self.network: Any = getattr(detection, self.architecture)(
            weights=None,
            weights_backbone=None,
            num_classes=len(self.classes) + 1,
            image_mean=[0.5] * 3,
            image_std=[0.25] * 3,
            **{f"{box}score_thresh": SCORE_THRESHOLD, f"{box}detections_per_img": MAX_DETECTIONS},
        )

    @override
    def forward(self, pyramid: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Return the image (B, 3, H, W); the network runs in ``loss`` and ``predict``, as it needs the target too."""
        return pyramid[0].expand(-1, 3, -1, -1)

    @override
    def loss(self, outputs: Tensor, target: Target) -> dict[str, Tensor]:
        assert isinstance(target, DetectionTarget)
        rows, labelled = target.present, target[target.present]
        if not bool(rows.any()):
            return {"detector": sum((p.sum() for p in self.network.parameters()), torch.zeros(())) * 0.0}
        boxes = [{"boxes": b, "labels": k + 1} for b, k in map(_with_area, labelled.boxes, labelled.labels)]
        nothing = not any(len(one["boxes"]) for one in boxes)
        with (
            torch.autocast(outputs.device.type, enabled=False),
            self._returning(losses=True, image=outputs, every_proposal=nothing),
        ):
            losses: dict[str, Tensor] = self.network(list(outputs[rows].float()), boxes)
        return losses

    @override
    def predict(self, outputs: Tensor, size: tuple[int, int]) -> list[dict[str, Tensor]]:
        with torch.autocast(outputs.device.type, enabled=False), self._returning(losses=False, image=outputs):
            images = self.network(list(outputs.float()))
        return [{"boxes": one["boxes"], "scores": one["scores"], "labels": one["labels"] - 1} for one in images]

    @override
    def metrics(self) -> TaskMetrics:
        return DetectionMetrics(self.classes)

    @contextmanager
    def _returning(self, losses: bool, image: Tensor, every_proposal: bool = False) -> Iterator[None]:
        """Make the detector return losses or boxes, in any mode of its layers, without a resize of the images.

        In a batch without boxes the first of two stages may propose no box above its threshold. The loss of the second
        stage, a mean over proposals, would then be NaN; ``every_proposal`` sets the threshold to 0.
        """
        parts = [p for p in (self.network, *(getattr(self.network, n, None) for n in ("rpn", "roi_heads"))) if p]
        before = [part.training for part in parts]
        sides = image.shape[-2:]
        self.network.transform.min_size, self.network.transform.max_size = (min(sides),), max(sides)
        for part in parts:
            part.training = losses
        rpn = getattr(self.network, "rpn", None)
        threshold = rpn.score_thresh if rpn else 0.0
        if rpn and every_proposal:
            rpn.score_thresh = 0.0
        try:
            yield
        finally:
            if rpn:
                rpn.score_thresh = threshold
            for part, mode in zip(parts, before, strict=True):
                part.training = mode


def _with_area(boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Remove boxes without area, for which torchvision raises an error."""
    kept = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    return boxes[kept], labels[kept]


def _require_no_encoder(strides: Sequence[int]) -> None:
    if tuple(strides) != (1,):
        raise ConfigError("a head with its own network needs the image as input; set model.encoder to NoEncoder")
