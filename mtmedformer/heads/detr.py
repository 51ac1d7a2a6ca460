"""Detection by DETR: each learned query predicts one box or none (experimental)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchvision.ops import (
    box_convert,
    clip_boxes_to_image,
    generalized_box_iou,
    generalized_box_iou_loss,
    remove_small_boxes,
)
from typing_extensions import override

from mtmedformer.batch import DetectionTarget, Target
from mtmedformer.errors import ConfigError
from mtmedformer.heads.base import TaskHead
from mtmedformer.heads.layers import pick_levels
from mtmedformer.metrics.base import TaskMetrics
from mtmedformer.metrics.detection import DetectionMetrics

NO_OBJECT_WEIGHT, L1_WEIGHT, GIOU_WEIGHT = 0.1, 5.0, 2.0
"""Weights as in the paper: of "no object" in the cross-entropy, of the L1 distance and of the generalised IoU."""

STRIDES = (16, 32)
"""Strides of the pyramid levels whose tokens the queries attend to."""


@dataclass
class DETROutputs:
    """Outputs of Q queries after each of D decoder layers; predictions use the last layer.

    Attributes:
        logits: (B, D, Q, K + 1) class logits; the last class is "no object".
        boxes: float32 (B, D, Q, 4) centre x, centre y, width, height as shares of the image, in (0, 1).
        size: ``(H, W)`` of the image.
    """

    logits: Tensor
    boxes: Tensor
    size: tuple[int, int]


class DETRHead(TaskHead):
    """DETR: queries attend to the tokens of the pyramid, and each predicts one box or "no object".

    Experimental: it converges slowly, needs much data and is weak on small lesions; ``DetectionHead`` is the default
    choice. All decoder layers are trained: each term is a mean over the layers. If an image has more boxes than
    queries, the boxes with the worst match are ignored. There is no non-maximum suppression.

    Args:
        classes: Class names in channel order.
        num_queries: Largest number of boxes per image.
        num_layers: Number of decoder layers.
        num_heads: Number of attention heads; divides the width of the pyramid.
        score_threshold: Boxes with a lower score are dropped, in [0, 1].

    Reference:
        Carion et al., End-to-end object detection with transformers, ECCV 2020, sections 3.1 and A.2.
    """

    kind = "detection"

    def __init__(
        self,
        classes: Sequence[str],
        num_queries: int = 20,
        num_layers: int = 2,
        num_heads: int = 4,
        score_threshold: float = 0.01,
    ) -> None:
        super().__init__(classes)
        self.num_queries = num_queries
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.score_threshold = score_threshold

    @override
    def build(self, channels: int, strides: Sequence[int]) -> None:
        self.levels, width = pick_levels(strides, STRIDES), channels
        if width % self.num_heads or width % 4:
            raise ConfigError(
                f"channels: {width} of the encoder must be a multiple of 4 and of num_heads: {self.num_heads}"
            )
        self.project = nn.ModuleList(nn.Conv2d(channels, width, 1) for _ in self.levels)
        self.norm = nn.ModuleList(nn.LayerNorm(width) for _ in self.levels)
        self.query = nn.Embedding(self.num_queries, width)
        layer = (width, self.num_heads, 4 * width, 0.0)
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(*layer, batch_first=True, norm_first=True) for _ in range(self.num_layers)
        )
        self.final = nn.LayerNorm(width)
        self.to_class = nn.Linear(width, len(self.classes) + 1)
        self.to_box = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)
        )

    @override
    def forward(self, pyramid: list[Tensor], size: tuple[int, int]) -> DETROutputs:
        memory = torch.cat(
            [
                norm(project(pyramid[level]).flatten(2).transpose(1, 2))
                + position_encoding(self.query.embedding_dim, pyramid[level], stride, size)
                for project, norm, level, stride in zip(self.project, self.norm, self.levels, STRIDES, strict=True)
            ],
            dim=1,
        )
        x = self.query.weight.expand(memory.shape[0], -1, -1)
        states = []
        for layer in self.layers:
            x = layer(x, memory)
            states.append(self.final(x))
        state = torch.stack(states, dim=1)
        return DETROutputs(self.to_class(state), self.to_box(state).float().sigmoid(), size)

    @override
    def loss(self, outputs: DETROutputs, target: Target) -> dict[str, Tensor]:
        """Return the weighted DETR terms over labelled images.

        ``classification`` is a weighted mean over queries, ``l1`` and ``giou`` are means over the boxes of the batch.
        """
        assert isinstance(target, DetectionTarget)
        rows, target = target.present, target[target.present]
        logits, boxes = outputs.logits[rows].float(), outputs.boxes[rows].float()
        with torch.autocast(logits.device.type, enabled=False):
            true = [box_convert(b.float(), "xyxy", "cxcywh") / _whwh(outputs.size, b) for b in target.boxes]
            layers = [self._layer_loss(logits[:, d], boxes[:, d], true, target.labels) for d in range(logits.shape[1])]
            return {name: torch.stack([layer[name] for layer in layers]).mean() for name in layers[0]}

    @override
    def predict(self, outputs: DETROutputs, size: tuple[int, int]) -> list[dict[str, Tensor]]:
        return self.decoded(self.exported(outputs, size), size)

    def exported(self, outputs: DETROutputs, size: tuple[int, int]) -> dict[str, Tensor]:
        """Return ``scores`` (B, Q, K) and ``boxes`` (B, Q, 4) of all queries."""
        corners = box_convert(outputs.boxes[:, -1].float(), "cxcywh", "xyxy")
        pixels = torch.stack([corners[..., ::2] * size[1], corners[..., 1::2] * size[0]], dim=-1).flatten(-2)
        scores = outputs.logits[:, -1].float().softmax(-1)[..., :-1]
        return {"scores": scores, "boxes": clip_boxes_to_image(pixels, size)}

    def decoded(self, exported: dict[str, Tensor], size: tuple[int, int]) -> list[dict[str, Tensor]]:
        """Return the most likely class and the box of each query above the threshold, in order of the scores."""
        scores, labels = exported["scores"].max(-1)
        predictions = []
        for score, label, box in zip(scores, labels, exported["boxes"], strict=True):
            order = score.argsort(descending=True)
            order = order[score[order] > self.score_threshold]
            order = order[remove_small_boxes(box[order], 1e-2)]
            predictions.append({"boxes": box[order], "scores": score[order], "labels": label[order]})
        return predictions

    def class_score(self, outputs: DETROutputs, label: int) -> Tensor:
        """Return the largest log-probability of a class over all queries, float32 (B,)."""
        return outputs.logits[:, -1].float().log_softmax(-1)[..., label].amax(1)

    @override
    def metrics(self) -> TaskMetrics:
        return DetectionMetrics(self.classes)

    def _layer_loss(self, logits: Tensor, boxes: Tensor, true: list[Tensor], labels: list[Tensor]) -> dict[str, Tensor]:
        """Match the queries of one layer, (N, Q, K + 1) and (N, Q, 4), and return its weighted terms."""
        wanted = torch.full(logits.shape[:2], len(self.classes), device=logits.device)
        predicted, matched = [boxes[:0].flatten(0, 1)], [boxes[:0].flatten(0, 1)]
        for i in range(len(logits)):
            query, box = self.match(logits[i], boxes[i], true[i], labels[i])
            wanted[i, query] = labels[i][box]
            predicted.append(boxes[i, query])
            matched.append(true[i][box])
        p, t = torch.cat(predicted), torch.cat(matched)
        weights = logits.new_ones(logits.shape[2])
        weights[-1] = NO_OBJECT_WEIGHT
        entropy = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), weights, reduction="sum")
        iou = generalized_box_iou_loss(box_convert(p, "cxcywh", "xyxy"), box_convert(t, "cxcywh", "xyxy"))
        count = max(1, sum(len(b) for b in true))
        return {
            "classification": entropy / weights[wanted].sum().clamp_min(1e-12),
            "l1": L1_WEIGHT * (p - t).abs().sum() / count,
            "giou": GIOU_WEIGHT * iou.sum() / count,
        }

    @torch.no_grad()
    def match(self, logits: Tensor, boxes: Tensor, true: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Match queries to the boxes of one image at the least total cost (Hungarian algorithm, scipy).

        Args:
            logits: float32 (Q, K + 1).
            boxes: float32 (Q, 4), centre and size as shares of the image.
            true: float32 (M, 4), in the same format.
            labels: int64 (M,).

        Returns:
            int64 indices of the matched queries and of their boxes, both (min(Q, M),).
        """
        cost = -logits.softmax(-1)[:, labels]
        cost = cost + L1_WEIGHT * torch.cdist(boxes, true, p=1)
        corners, true_corners = box_convert(boxes, "cxcywh", "xyxy"), box_convert(true, "cxcywh", "xyxy")
        cost = cost - GIOU_WEIGHT * generalized_box_iou(corners, true_corners)
        query, box = linear_sum_assignment(cost.cpu().numpy())
        return torch.as_tensor(query, device=logits.device), torch.as_tensor(box, device=logits.device)


def position_encoding(channels: int, level: Tensor, stride: int, size: tuple[int, int]) -> Tensor:
    """Return sines and cosines of the position, as a share of the image, of each cell of a level: (h * w, channels).

    Half of the channels encode y, half encode x; frequencies are from half a period per image side to 32 periods.
    """
    frequency = math.pi * torch.logspace(0, 6, channels // 4, base=2.0, device=level.device)
    codes = []
    for cells, side in zip(level.shape[-2:], size, strict=True):
        place = (torch.arange(cells, device=level.device) + 0.5) * stride / side
        angle = place[:, None] * frequency
        codes.append(torch.cat([angle.sin(), angle.cos()], dim=1))
    y, x = codes
    return torch.cat([y[:, None].expand(-1, x.shape[0], -1), x[None].expand(y.shape[0], -1, -1)], dim=2).flatten(0, 1)


def _whwh(size: tuple[int, int], like: Tensor) -> Tensor:
    return like.new_tensor([size[1], size[0], size[1], size[0]])
