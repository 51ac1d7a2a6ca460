"""Networks of other libraries as single-task baselines: U-Net and its kin for masks, torchvision's for boxes.

They bring their own encoder, so the shared one is replaced by ``NoEncoder``, which hands the image on. One head a
model; everything else (data, loss of masks, budget, metrics, commands) is that of every other run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from mtmedformer.batch import DetectionTarget, Target
from mtmedformer.encoders.base import Encoder
from mtmedformer.errors import ConfigError
from mtmedformer.heads.base import TaskHead
from mtmedformer.heads.segmentation import SegmentationHead

if TYPE_CHECKING:
    from mtmedformer.metrics.base import TaskMetrics

LARGEST_STRIDE = 32


class NoEncoder(Encoder):
    """Hands the image on as the only level of the pyramid, for a head that brings a network of its own.

    Args:
        in_chans: Channels of the image.
    """

    def __init__(self, in_chans: int = 1) -> None:
        super().__init__()
        self.name, self.in_chans, self.fixed_size = "none", in_chans, None
        self.channels, self.strides = in_chans, (1,)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return the image."""
        return [image]

    def layer_depths(self) -> dict[str, int]:
        """Return none: there are no layers."""
        return {}

    def no_weight_decay(self) -> set[str]:
        """Return none."""
        return set()


class LibrarySegmentation(SegmentationHead):
    """A network of segmentation_models_pytorch, trained by this project's losses from random weights.

    Args:
        classes: As in ``SegmentationHead``.
        multi_label: As in ``SegmentationHead``.
        architecture: ``unet``, ``fpn``, ``segformer``, ``deeplabv3plus`` …
        encoder: One of that library's encoders. Mind their licences: ``mit_b0`` to ``mit_b5`` are not free.
        hausdorff: As in ``SegmentationHead``.

    Raises:
        ConfigError: When the library has no such network.
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

        _check_alone(strides)
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

    def forward(self, pyramid: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Return logits (B, C, H, W); the image is padded to whole strides and the logits are cut back."""
        height, width = (-(-side // LARGEST_STRIDE) * LARGEST_STRIDE for side in size)
        logits: Tensor = self.network(F.pad(pyramid[0], (0, width - size[1], 0, height - size[0])))
        return logits[..., : size[0], : size[1]]


class LibraryDetection(TaskHead):
    """A detector of torchvision, trained by its own losses from random weights at the images' own size.

    Args:
        classes: Class names in label order.
        architecture: A builder of ``torchvision.models.detection``, such as ``fasterrcnn_mobilenet_v3_large_320_fpn``,
            ``retinanet_resnet50_fpn_v2`` or ``fcos_resnet50_fpn``.
        score_threshold: Boxes with a lower score are dropped.
        max_detections: Boxes kept an image.

    Raises:
        ConfigError: When torchvision has no such builder.
    """

    kind = "detection"

    def __init__(
        self,
        classes: Sequence[str],
        architecture: str = "fasterrcnn_mobilenet_v3_large_320_fpn",
        score_threshold: float = 0.01,
        max_detections: int = 100,
    ) -> None:
        super().__init__(classes)
        self.architecture = architecture
        self.score_threshold, self.max_detections = score_threshold, max_detections

    @override
    def build(self, channels: int, strides: Sequence[int]) -> None:
        from torchvision.models import detection, list_models

        _check_alone(strides)
        if self.architecture not in list_models(detection):
            raise ConfigError(f"architecture: {self.architecture} is none of {', '.join(list_models(detection))}")
        self.network: Any = getattr(detection, self.architecture)(
            weights=None,
            weights_backbone=None,
            num_classes=len(self.classes) + 1,
            image_mean=[0.5] * 3,
            image_std=[0.25] * 3,
            **self._limits(),
        )

    def forward(self, pyramid: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Return the image; the loss runs the network, because a torchvision detector takes image and target."""
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
            self._asked_for(losses=True, image=outputs, every_proposal=nothing),
        ):
            found: dict[str, Tensor] = self.network(list(outputs[rows].float()), boxes)
        return found

    @override
    def predict(self, outputs: Tensor, size: tuple[int, int]) -> list[dict[str, Tensor]]:
        with torch.autocast(outputs.device.type, enabled=False), self._asked_for(losses=False, image=outputs):
            found = self.network(list(outputs.float()))
        return [{"boxes": f["boxes"], "scores": f["scores"], "labels": f["labels"] - 1} for f in found]

    @override
    def metrics(self) -> TaskMetrics:
        from mtmedformer.metrics import DetectionMetrics

        return DetectionMetrics(self.classes)

    def _limits(self) -> dict[str, Any]:
        """Return threshold and number of boxes under the names that the architecture gives them."""
        box = "box_" if self.architecture.startswith("fasterrcnn") else ""
        return {f"{box}score_thresh": self.score_threshold, f"{box}detections_per_img": self.max_detections}

    @contextmanager
    def _asked_for(self, losses: bool, image: Tensor, every_proposal: bool = False) -> Iterator[None]:
        """Let the detector give losses or boxes, whatever the mode of its layers, and keep the size of the images.

        In a batch without boxes a detector of two stages may propose none above its threshold, and the second stage's
        loss, a mean over proposals, would not be a number: ``every_proposal`` lifts the threshold.
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
    """Leave out boxes without area, which torchvision refuses."""
    kept = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    return boxes[kept], labels[kept]


def _check_alone(strides: Sequence[int]) -> None:
    if tuple(strides) != (1,):
        raise ConfigError("a head that brings its own network reads the image itself; set model.encoder to NoEncoder")
