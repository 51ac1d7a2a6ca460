"""Base of heads of the whole image: attention-pooled tokens of the pyramid and their channel maxima."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from mtmedformer.errors import ConfigError
from mtmedformer.heads.base import TaskHead
from mtmedformer.heads.layers import enlarge, pick_levels


class AttentionPoolingHead(TaskHead):
    r"""Pools pyramid tokens by gated attention; a linear layer computes ``outputs`` numbers from the pooled features.

    Each attention head scores token $h$ with $w^\top(\tanh(V h) \odot \sigma(U h))$, takes the softmax over the tokens
    of all its levels and pools its share of the channels. The maximum of each channel over the tokens is added
    (``peak``), because in a mean over a thousand tokens the signal and the gradient of a lesion in one token are a
    thousand times smaller. The attention map does not show the contribution of the maxima.

    Args:
        classes: Class names in channel order.
        outputs: Numbers computed from the pooled features.
        strides: Strides of the pyramid levels whose tokens are pooled.
        width: Channels of the tokens; ``None`` is the width of the pyramid.
        num_heads: Number of attention heads; divides ``width``.
        peak: Also use the channel maxima; without them, the attention map covers all input of the last layer.

    Reference:
        Ilse et al., Attention-based deep multiple instance learning, ICML 2018, equation 9.
    """

    def __init__(
        self,
        classes: Sequence[str],
        outputs: int,
        strides: tuple[int, ...],
        width: int | None,
        num_heads: int,
        peak: bool,
    ) -> None:
        super().__init__(classes)
        self.strides = tuple(sorted(strides))
        self.width = width
        self.num_heads = num_heads
        self.peak = peak
        self._outputs = outputs

    @override
    def build(self, channels: int, strides: Sequence[int]) -> None:
        self.levels = pick_levels(strides, self.strides)
        width = self.width or channels
        if width % self.num_heads:
            raise ConfigError(f"num_heads: {self.num_heads} does not divide the head's width of {width}")
        self.token = nn.ModuleList(nn.Conv2d(channels, width, 1) for _ in self.levels)
        self.norm = nn.ModuleList(nn.LayerNorm(width) for _ in self.levels)
        self.gate = nn.Linear(width, 2 * (width // 2))
        self.score = nn.Linear(width // 2, self.num_heads)
        features = 2 * width if self.peak else width
        self.classifier = nn.Sequential(nn.LayerNorm(features), nn.Linear(features, self._outputs))

    def pooled(self, pyramid: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the numbers (B, outputs), and the attention (B, h, w) on the finest level; each map sums to 1."""
        features, attention = self.features(pyramid)
        return self.classifier(features), attention

    def features(self, pyramid: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the pooled features (B, C), and the attention as `pooled` does."""
        maps = [pyramid[level] for level in self.levels]
        tokens = torch.cat(
            [
                F.gelu(norm(token(x).flatten(2).transpose(1, 2)))
                for token, norm, x in zip(self.token, self.norm, maps, strict=True)
            ],
            dim=1,
        )
        content, gate = self.gate(tokens).chunk(2, dim=-1)
        attention = self.score(content.tanh() * gate.sigmoid()).float().softmax(dim=1)
        values = tokens.view(*tokens.shape[:2], self.num_heads, -1)
        pooled = (attention.to(values.dtype).unsqueeze(3) * values).sum(1).flatten(1)
        features = torch.cat([pooled, tokens.amax(dim=1)], dim=1) if self.peak else pooled
        return features, self._on_finest_level(attention.mean(2), maps)

    def attention_map(self, outputs: Any, size: tuple[int, int]) -> Tensor:
        """Return the attention per pixel, float32 (B, H, W), without the contribution of the channel maxima.

        The outputs have it as ``attention`` (B, h, w).
        """
        return enlarge(outputs.attention[:, None].float(), self.strides[0], size)[:, 0]

    def _on_finest_level(self, attention: Tensor, maps: list[Tensor]) -> Tensor:
        """Spread the attention (B, T) of all levels over the cells of the finest level, with a sum of 1."""
        (h, w), finest = maps[0].shape[-2:], self.strides[0]
        total = attention.new_zeros(attention.shape[0], h, w)
        parts = torch.split(attention, [m.shape[-2] * m.shape[-1] for m in maps], dim=1)
        for part, level, stride in zip(parts, maps, self.strides, strict=True):
            repeat = stride // finest
            spread = part.view(-1, *level.shape[-2:]).repeat_interleave(repeat, 1).repeat_interleave(repeat, 2)
            total = total + spread[:, :h, :w] / repeat**2
        return total / total.sum((1, 2), keepdim=True)
