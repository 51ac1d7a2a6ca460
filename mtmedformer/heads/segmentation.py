"""Segmentation by an all-MLP decoder: each level is projected and fused on its own grid, enlarged and added."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from mtmedformer.batch import IGNORE, SegmentationTarget, Target
from mtmedformer.errors import ConfigError
from mtmedformer.heads.base import TaskHead
from mtmedformer.heads.layers import enlarge, head_norm, pick_levels
from mtmedformer.losses.segmentation import Dice, MaskCrossEntropy, MaskLoss, probabilities
from mtmedformer.metrics.base import TaskMetrics
from mtmedformer.metrics.segmentation import SegmentationMetrics

UNCROPPED = (1 << 30, 1 << 30)
"""A size to crop to that is larger than any image."""


class SegmentationHead(TaskHead):
    """SegFormer's decoder with GroupNorm: 1 × 1 convolutions only, logits at the finest stride, bilinear to the image.

    Outputs are logits (B, C, h, w) at the finest stride: C is the number of classes for sigmoids, one more (channel 0,
    background) for a softmax over exclusive classes.

    SegFormer projects each level, enlarges it, concatenates all levels and fuses them. These steps are linear. Here
    each level has one 1 × 1 convolution, whose weight is the product of its projection and its share of the fusion; its
    result is enlarged, and the results are summed. The logits are the same, with a fifth of the multiplications and no
    concatenated map in memory.

    Args:
        classes: Class names in channel order, without background.
        multi_label: Whether a pixel may be of several classes (sigmoids); always so with one class.
        terms: Loss terms by name, summed by their weights; ``None`` is cross-entropy plus soft Dice, 1 : 1.
        strides: Strides of the pyramid levels used.
        width: Channels of the decoder; ``None`` is the width of the pyramid.
        hausdorff: Whether the metrics include surface distances, which take most of the time of a validation.

    Raises:
        ConfigError: The number of class weights of a term is not the number of classes.

    Reference:
        Xie et al., SegFormer, NeurIPS 2021, section 3.2.
    """

    kind = "segmentation"

    def __init__(
        self,
        classes: Sequence[str],
        multi_label: bool = False,
        terms: dict[str, MaskLoss] | None = None,
        strides: tuple[int, ...] = (4, 8, 16, 32),
        width: int | None = None,
        hausdorff: bool = True,
    ) -> None:
        super().__init__(classes)
        self.multi_label = multi_label or len(self.classes) == 1
        self.strides = tuple(sorted(strides))
        self.width = width
        self.hausdorff = hausdorff
        self.terms = nn.ModuleDict(terms or {"cross_entropy": MaskCrossEntropy(), "dice": Dice()})
        for name, term in self.terms.items():
            weights = term.pos_weight if isinstance(term, MaskCrossEntropy) else None
            if weights is not None and len(weights) != len(self.classes):
                raise ConfigError(
                    f"terms.{name}: pos_weight has {len(weights)} values for {len(self.classes)} classes; give one each"
                )

    @override
    def build(self, channels: int, strides: Sequence[int]) -> None:
        self.levels = pick_levels(strides, self.strides)
        width = self.width or channels
        self.project = nn.ModuleList(nn.Conv2d(channels, width, 1) for _ in self.levels)
        self.fuse = nn.Sequential(
            nn.Conv2d(width * len(self.levels), width, 1, bias=False), head_norm(width), nn.GELU()
        )
        self.logits = nn.Conv2d(width, len(self.classes) + (not self.multi_label), 1)

    @override
    def forward(self, pyramid: list[Tensor], size: tuple[int, int]) -> Tensor:
        grid = pyramid[self.levels[0]].shape[-2:]
        fused = sum(
            enlarge(F.conv2d(pyramid[level], *composed), stride / self.strides[0], grid)
            for level, stride, composed in zip(self.levels, self.strides, self._composed(), strict=True)
        )
        logits: Tensor = self.logits(self.fuse[1:](fused))
        return logits

    @override
    def loss(self, outputs: Tensor, target: Target) -> dict[str, Tensor]:
        """Return the weighted terms over annotated pixels of labelled images.

        With exclusive classes, a pixel of one class counts as annotated for the other classes too.
        """
        assert isinstance(target, SegmentationTarget)
        logits, masks = outputs[target.present].float(), target.masks[target.present]
        positive, valid = masks == 1, masks != IGNORE
        if not self.multi_label:
            valid = valid | positive.any(1, keepdim=True)
        with torch.autocast(logits.device.type, enabled=False):
            logits = self._to_image(logits, (masks.shape[-2], masks.shape[-1]))
            return {name: term.weight * term(logits, positive, valid) for name, term in self.terms.items()}

    @override
    def predict(self, outputs: Tensor, size: tuple[int, int]) -> Tensor:
        return probabilities(self._to_image(outputs.float(), size), len(self.classes))

    def class_logits(self, outputs: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the logits at the size of the network's input, float32 (B, C, H, W)."""
        return self._to_image(outputs.float(), size)

    def scaled(self, outputs: Tensor, temperature: float) -> Tensor:
        """Return the logits divided by a temperature."""
        return outputs.float() / temperature

    def class_score(self, outputs: Tensor, label: int) -> Tensor:
        """Return the mean logit of the pixels predicted as a class, (B,); of all pixels if there are none."""
        logits = self._to_image(outputs.float(), UNCROPPED)
        channel = logits[:, label + (not self.multi_label)]
        inside = channel > 0 if self.multi_label else logits.argmax(1) == label + 1
        inside = inside | ~inside.flatten(1).any(1)[:, None, None]
        return (channel * inside).sum((1, 2)) / inside.sum((1, 2))

    @override
    def metrics(self) -> TaskMetrics:
        return SegmentationMetrics(self.classes, self.multi_label, hausdorff=self.hausdorff)

    def _composed(self) -> list[tuple[Tensor, Tensor]]:
        """Return for each level the weight (w, c, 1, 1) and bias (w,) of its projection followed by its fusion."""
        shares = self.fuse.get_parameter("0.weight").flatten(1).chunk(len(self.levels), dim=1)
        projections = [(one.get_parameter("weight").flatten(1), one.get_parameter("bias")) for one in self.project]
        return [
            ((share @ weight)[..., None, None], share @ bias)
            for share, (weight, bias) in zip(shares, projections, strict=True)
        ]

    def _to_image(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        return enlarge(logits, self.strides[0], size)
