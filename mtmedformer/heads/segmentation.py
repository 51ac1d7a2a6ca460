"""Masks by an all-MLP decoder: every level projected and fused on its own grid, enlarged and added."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from mtmedformer.batch import IGNORE, SegmentationTarget, Target
from mtmedformer.errors import ConfigError
from mtmedformer.heads.base import TaskHead
from mtmedformer.heads.layers import enlarge, group_norm, pick_levels
from mtmedformer.losses.segmentation import Dice, MaskCrossEntropy, MaskLoss, probabilities

if TYPE_CHECKING:
    from mtmedformer.metrics.base import TaskMetrics


class SegmentationHead(TaskHead):
    """SegFormer's decoder with GroupNorm: 1 × 1 convolutions only, logits at the finest stride, bilinear to the image.

    Outputs are logits (B, C, h, w) at the finest stride: C is the number of classes for sigmoids, one more (channel 0,
    background) for a softmax over exclusive classes.

    SegFormer projects each level, enlarges it, joins all levels and fuses them. All of that is linear, so it is the sum
    over levels of one 1 × 1 convolution each, whose weight is the product of the level's projection and its share of
    the fusion, enlarged after it: the same logits from a fifth of the multiplications, and no joined map to store.

    Args:
        classes: Class names in channel order, without background.
        multi_label: Whether a pixel may be of several classes (sigmoids); always so with one class.
        terms: Loss terms by name, summed by their weights; ``None`` is cross-entropy plus soft Dice, 1 : 1.
        strides: Strides of the pyramid levels used.
        width: Channels of the decoder; ``None`` is the pyramid's.
        dropout: Dropout of whole channels before the logits, in [0, 1).
        hausdorff: Whether ``metrics`` measures surface distances, the slow part of a validation.

    Raises:
        ConfigError: A term whose number of class weights is not that of the classes.

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
        dropout: float = 0.0,
        hausdorff: bool = True,
    ) -> None:
        super().__init__(classes)
        self.multi_label = multi_label or len(self.classes) == 1
        self.strides = tuple(sorted(strides))
        self.width = width
        self.dropout = dropout
        self.hausdorff = hausdorff
        self.terms = nn.ModuleDict(terms or {"cross_entropy": MaskCrossEntropy(), "dice": Dice()})
        for name, term in self.terms.items():
            weights = getattr(term, "pos_weight", None)
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
            nn.Conv2d(width * len(self.levels), width, 1, bias=False), group_norm(width), nn.GELU()
        )
        self.logits = nn.Sequential(
            nn.Dropout2d(self.dropout), nn.Conv2d(width, len(self.classes) + (not self.multi_label), 1)
        )

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

        In a softmax, a pixel of one class is known not to be of the others, annotated or not.
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

    @override
    def class_logits(self, outputs: Tensor, size: tuple[int, int]) -> Tensor:
        return self._to_image(outputs.float(), size)

    @override
    def scaled(self, outputs: Tensor, temperature: float) -> Tensor:
        return outputs.float() / temperature

    @override
    def metrics(self) -> TaskMetrics:
        from mtmedformer.metrics import SegmentationMetrics

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
