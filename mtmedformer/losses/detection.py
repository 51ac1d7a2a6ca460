"""Losses of boxes: differences between two boxes, and the assignment and loss of FCOS."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import (
    complete_box_iou_loss,
    distance_box_iou_loss,
    generalized_box_iou_loss,
    sigmoid_focal_loss,
)
from typing_extensions import override

from mtmedformer.storage.constructor_arguments import RecordsArguments


class BoxLoss(RecordsArguments, nn.Module, ABC):
    """A loss of predicted boxes against the true ones.

    Args:
        weight: Factor of this term in the task's loss.
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    @abstractmethod
    def forward(self, predicted: Tensor, true: Tensor) -> Tensor:
        """Return one loss per pair of boxes, (N,), of two float32 (N, 4) ``xyxy`` tensors; N may be 0."""


class GIoU(BoxLoss):
    """1 minus generalised IoU (Rezatofighi et al., CVPR 2019); in [0, 2]."""

    @override
    def forward(self, predicted: Tensor, true: Tensor) -> Tensor:
        loss: Tensor = generalized_box_iou_loss(predicted, true)
        return loss


class DIoU(BoxLoss):
    """1 minus IoU plus the normalised distance of the centres (Zheng et al., AAAI 2020)."""

    @override
    def forward(self, predicted: Tensor, true: Tensor) -> Tensor:
        loss: Tensor = distance_box_iou_loss(predicted, true)
        return loss


class CIoU(BoxLoss):
    """DIoU plus the difference of aspect ratios (Zheng et al., AAAI 2020)."""

    @override
    def forward(self, predicted: Tensor, true: Tensor) -> Tensor:
        """Return one loss per pair. Predicted sides count as 0.01 pixels or more."""
        corner = predicted[:, :2]
        # An empty predicted box has no aspect ratio: 0 / 0 would make the loss NaN.
        sized = torch.cat([corner, torch.maximum(predicted[:, 2:], corner + 0.01)], dim=1)
        loss: Tensor = complete_box_iou_loss(sized, true)
        return loss


def match_boxes(boxes: Tensor, anchors: Tensor, per_level: list[int], radius: float = 1.5) -> Tensor:
    """Return the box assigned to each location by the rules of FCOS.

    A location is assigned to a box around it whose centre is within ``radius`` strides and whose farthest side is
    between 4 and 8 strides away (from 0 on the finest level, without end on the coarsest); of several, the smallest. A
    box that no location gets this way (long and thin ones) goes to the locations near its centre on the finest level.

    Args:
        boxes: float32 (N, 4) xyxy.
        anchors: float32 (A, 4) xyxy: at each location, finest level first, a square of one stride.
        per_level: Locations of each level.
        radius: Radius of centre sampling, in strides.

    Returns:
        int64 (A,): index of the box, -1 for background.

    Reference:
        Tian et al., FCOS: a simple and strong anchor-free object detector, TPAMI 2020; ``torchvision``'s FCOS gives the
        same where no box would be left out (and areas differ by more than its rounding, 8 square pixels).
    """
    if not len(boxes):
        return torch.full((len(anchors),), -1, device=anchors.device)
    location, stride = (anchors[:, None, :2] + anchors[:, None, 2:]) / 2, anchors[:, 2:3] - anchors[:, 0:1]
    off_centre = (location - (boxes[:, :2] + boxes[:, 2:]) / 2).abs().amax(2)
    sides = torch.cat([location - boxes[:, :2], boxes[:, 2:] - location], dim=2)
    near = (off_centre < radius * stride) & (sides.amin(2) > 0)

    lower, upper = stride * 4, stride * 8
    lower[: per_level[0]] = 0
    upper[-per_level[-1] :] = torch.inf
    farthest = sides.amax(2)
    match = near & (farthest > lower) & (farthest < upper)
    match[: per_level[0]] |= near[: per_level[0]] & ~match.any(0)

    area = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).expand_as(match)
    smallest, index = area.masked_fill(~match, torch.inf).min(1)
    return index.masked_fill(smallest.isinf(), -1)


def decode_boxes(distances: Tensor, anchors: Tensor) -> Tensor:
    """Turn distances (..., A, 4) to left, top, right, bottom in strides into xyxy boxes in pixels."""
    centre, stride = (anchors[:, :2] + anchors[:, 2:]) / 2, anchors[:, 2:] - anchors[:, :2]
    return torch.cat([centre - distances[..., :2] * stride, centre + distances[..., 2:] * stride], dim=-1)


def centerness(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Return the centerness of each anchor in its box, 0 at a side to 1 in the middle; both (N, 4), result (N,)."""
    centre = (anchors[:, :2] + anchors[:, 2:]) / 2
    before, after = centre - boxes[:, :2], boxes[:, 2:] - centre
    return (torch.minimum(before, after) / torch.maximum(before, after)).prod(1).sqrt()


def grow_boxes(boxes: Tensor, least: float) -> Tensor:
    """Return boxes whose sides are at least ``least`` pixels, about the same centres."""
    centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    grown = torch.cat([centre - least / 2, centre + least / 2], dim=1)
    return torch.where((half < least / 2).repeat(1, 2), grown, boxes)


def fcos_loss(
    logits: Tensor,
    distances: Tensor,
    centerness_logits: Tensor,
    anchors: Tensor,
    per_level: list[int],
    boxes: list[Tensor],
    labels: list[Tensor],
    box_loss: BoxLoss,
    radius: float = 1.5,
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> dict[str, Tensor]:
    """Return the three FCOS losses of labelled images, each a sum over the number of foreground locations (at least 1).

    Boxes thinner than 1.25 strides of the finest level are grown to that, or no location would lie inside them and they
    would train as background.

    Args:
        logits: float32 (N, A, K) class logits.
        distances: float32 (N, A, 4) to left, top, right, bottom, in strides, not negative.
        centerness_logits: float32 (N, A) centerness logits.
        anchors: float32 (A, 4), see ``match_boxes``.
        per_level: Locations of each level.
        boxes: (M, 4) xyxy pixels for each image; M = 0 makes all of the image background.
        labels: int64 (M,) class of each box.
        box_loss: Loss of the boxes of foreground locations.
        radius: Radius of centre sampling, in strides.
        alpha: Weight of positives in the focal loss.
        gamma: Exponent of the focal loss.

    Returns:
        ``classification`` (sigmoid focal), ``box`` and ``centerness`` (binary cross-entropy), not weighted.
    """
    foreground = torch.zeros(logits.shape[:2], dtype=torch.bool, device=logits.device)
    truth = torch.zeros_like(logits)
    matched = [anchors.new_zeros(0, 4)]
    least = 1.25 * float(anchors[0, 2] - anchors[0, 0])
    for i in range(len(logits)):
        grown = grow_boxes(boxes[i].float(), least)
        index = match_boxes(grown, anchors, per_level, radius)
        foreground[i] = index >= 0
        index = index[foreground[i]]
        truth[i, foreground[i], labels[i][index]] = 1
        matched.append(grown[index])
    true, where = torch.cat(matched), anchors.expand(len(logits), -1, -1)[foreground]
    count = max(1, len(true))
    predicted = decode_boxes(distances, anchors)[foreground]
    central = F.binary_cross_entropy_with_logits(
        centerness_logits[foreground], centerness(true, where), reduction="sum"
    )
    return {
        "classification": sigmoid_focal_loss(logits, truth, alpha, gamma, reduction="sum") / count,
        "box": box_loss(predicted, true).sum() / count,
        "centerness": central / count,
    }
