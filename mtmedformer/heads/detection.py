"""Detection by FCOS: each location of the pyramid predicts a class, a box and a centerness."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSRegressionHead
from torchvision.ops import batched_nms, clip_boxes_to_image, remove_small_boxes
from typing_extensions import override

from mtmedformer.batch import DetectionTarget, Target
from mtmedformer.errors import ConfigError
from mtmedformer.heads.base import TaskHead
from mtmedformer.heads.layers import head_norm, pick_levels
from mtmedformer.losses.detection import BoxLoss, GIoU, decode_boxes, fcos_loss
from mtmedformer.metrics.base import TaskMetrics
from mtmedformer.metrics.detection import DetectionMetrics


@dataclass
class DetectionOutputs:
    """Outputs of the A locations.

    Attributes:
        logits: (B, A, K) class logits.
        distances: (B, A, 4) to the left, top, right and bottom side, in strides of the level, 0 or larger.
        centerness: (B, A) logits of the centerness of the location in its box.
        anchors: float32 (A, 4) xyxy: the square of one stride around each location, finest level first.
        per_level: Number of locations per level.
    """

    logits: Tensor
    distances: Tensor
    centerness: Tensor
    anchors: Tensor
    per_level: list[int]


class DetectionHead(TaskHead):
    """FCOS with the towers of torchvision on every pyramid level, with GroupNorm.

    Location ``j`` of a level lies at pixel ``(j + 1/2) stride``, the centre of its pixels. A level predicts boxes
    whose farthest side is 4 to 8 strides away (from 0 on the finest level, without limit on the coarsest).

    Args:
        classes: Class names in channel order.
        num_convs: 3 × 3 convolutions of the classification and of the regression tower.
        width: Channels of the towers; ``None`` is the width of the pyramid.
        score_threshold: Boxes with a lower score are dropped, in [0, 1]. Low, because mAP and FROC need low scores too.
        nms_threshold: Of two boxes of one class with a higher IoU, that with the lower score is dropped, in (0, 1].
        max_detections: Largest number of boxes per image.
        candidates: Largest number of boxes per level before non-maximum suppression.
        box_loss: Loss of the boxes; ``None`` is ``GIoU()``.
        strides: Strides of the pyramid levels used; ``None`` uses all. Without stride 4 the head is about four times
            cheaper, and boxes under about 16 pixels are found less well.

    Reference:
        Tian et al., FCOS: a simple and strong anchor-free object detector, TPAMI 2020.
    """

    kind = "detection"

    def __init__(
        self,
        classes: Sequence[str],
        num_convs: int = 2,
        width: int | None = None,
        score_threshold: float = 0.01,
        nms_threshold: float = 0.5,
        max_detections: int = 100,
        candidates: int = 1000,
        box_loss: BoxLoss | None = None,
        strides: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(classes)
        if not 0 < nms_threshold <= 1 or not 0 <= score_threshold <= 1:
            raise ConfigError(
                f"nms_threshold: {nms_threshold} must be in (0, 1] and score_threshold: {score_threshold} in [0, 1]"
            )
        self.num_convs = num_convs
        self.width = width
        self.score_threshold = score_threshold
        self.nms_threshold = nms_threshold
        self.max_detections = max_detections
        self.candidates = candidates
        self.box_loss = box_loss or GIoU()
        self.wanted = tuple(sorted(strides)) if strides is not None else None

    @override
    def build(self, channels: int, strides: Sequence[int]) -> None:
        self.strides = tuple(strides) if self.wanted is None else self.wanted
        self.levels = pick_levels(strides, self.strides)
        width = self.width or channels
        self.entry = nn.Sequential(nn.Conv2d(channels, width, 1), head_norm(width))
        self.cls_head = FCOSClassificationHead(width, 1, len(self.classes), self.num_convs, norm_layer=head_norm)
        self.bbox_reg = FCOSRegressionHead(width, 1, self.num_convs, norm_layer=head_norm)
        # Distances pass a ReLU: with a bias of 0 half of them would be dead; 4 strides is in the range of a level.
        nn.init.constant_(self.bbox_reg.bbox_reg.bias, 4.0)

    @override
    def forward(self, pyramid: list[Tensor], size: tuple[int, int]) -> DetectionOutputs:
        maps = [pyramid[level] for level in self.levels]
        features = [self.entry(level) for level in maps]
        distances, centerness = self.bbox_reg(features)
        return DetectionOutputs(
            self.cls_head(features),
            distances,
            centerness.squeeze(2),
            torch.cat([_anchors(level, stride) for level, stride in zip(maps, self.strides, strict=True)]),
            [level.shape[-2] * level.shape[-1] for level in maps],
        )

    @override
    def loss(self, outputs: DetectionOutputs, target: Target) -> dict[str, Tensor]:
        """Return the weighted FCOS terms over labelled images.

        A labelled image without boxes is background everywhere. Each term is a sum over the foreground locations of the
        batch divided by their number (at least 1), as in torchvision.
        """
        assert isinstance(target, DetectionTarget)
        rows, target = target.present, target[target.present]
        with torch.autocast(outputs.logits.device.type, enabled=False):
            losses = fcos_loss(
                outputs.logits[rows].float(),
                outputs.distances[rows].float(),
                outputs.centerness[rows].float(),
                outputs.anchors,
                outputs.per_level,
                target.boxes,
                target.labels,
                self.box_loss,
            )
        return {
            "classification": losses["classification"],
            "box": self.box_loss.weight * losses["box"],
            "centerness": losses["centerness"],
        }

    @override
    def predict(self, outputs: DetectionOutputs, size: tuple[int, int]) -> list[dict[str, Tensor]]:
        """Return the boxes of each image after non-maximum suppression, clipped to the image.

        A score is the geometric mean of class probability and centerness.
        """
        return self.decoded(self.exported(outputs, size), size)

    def exported(self, outputs: DetectionOutputs, size: tuple[int, int]) -> dict[str, Tensor]:
        """Return ``scores`` (B, A, K) and ``boxes`` (B, A, 4) of all locations, before non-maximum suppression."""
        scores = (outputs.logits.float().sigmoid() * outputs.centerness.float().sigmoid().unsqueeze(2)).sqrt()
        return {
            "scores": scores,
            "boxes": clip_boxes_to_image(decode_boxes(outputs.distances.float(), outputs.anchors), size),
        }

    def decoded(self, exported: dict[str, Tensor], size: tuple[int, int]) -> list[dict[str, Tensor]]:
        """Return the boxes of each image after non-maximum suppression."""
        per_level = [math.ceil(size[0] / s) * math.ceil(size[1] / s) for s in self.strides]
        return [self._select(s, b, per_level) for s, b in zip(exported["scores"], exported["boxes"], strict=True)]

    def class_score(self, outputs: DetectionOutputs, label: int) -> Tensor:
        """Return the largest logit of a class over all locations, float32 (B,)."""
        return outputs.logits[..., label].float().amax(1)

    @override
    def metrics(self) -> TaskMetrics:
        return DetectionMetrics(self.classes)

    def _select(self, scores: Tensor, boxes: Tensor, per_level: list[int]) -> dict[str, Tensor]:
        """Keep the largest of the (A, K) scores of each level, then apply non-maximum suppression per class."""
        start, kept = 0, []
        for count in per_level:
            level = scores[start : start + count].flatten()
            best = level.topk(min(self.candidates, len(level))).indices
            kept.append(best[level[best] > self.score_threshold] + start * scores.shape[1])
            start += count
        index = torch.cat(kept)
        place, label, score = index // scores.shape[1], index % scores.shape[1], scores.flatten()[index]
        sized = remove_small_boxes(boxes[place], 1e-2)
        place, label, score = place[sized], label[sized], score[sized]
        keep = batched_nms(boxes[place], score, label, self.nms_threshold)[: self.max_detections]
        return {"boxes": boxes[place[keep]], "scores": score[keep], "labels": label[keep]}


def _anchors(level: Tensor, stride: int) -> Tensor:
    """Return the square of one stride around each location of a level, float32 (h * w, 4), row by row."""
    h, w = level.shape[-2:]
    y, x = torch.meshgrid(torch.arange(h, device=level.device), torch.arange(w, device=level.device), indexing="ij")
    corner = torch.stack([x, y], dim=-1).flatten(0, 1).float() * stride
    return torch.cat([corner, corner + stride], dim=1)
