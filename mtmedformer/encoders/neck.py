"""The neck of the encoder: a feature pyramid of five levels of one width, for a body of any strides."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from mtmedformer.normalization import group_norm

LEVELS = (4, 8, 16, 32)
"""Strides that come from the body; stride 64 is a pooled stride 32."""


class Neck(nn.Module):
    """A feature pyramid network with GroupNorm; strides that the body lacks are resampled from the nearest one.

    Args:
        widths: Channels of the body's map of each stride, strides out of 4, 8, 16, 32.
        channels: Channels of every level of the output.

    Shape:
        In: maps (B, width, Hp / s, Wp / s) with Hp and Wp whole multiples of 32. Out: levels of strides 4 to 64,
        (B, channels, ceil(H / s), ceil(W / s)), for the unpadded size (H, W).

    Reference:
        Lin et al., Feature Pyramid Networks, CVPR 2017; Li et al., Exploring Plain Vision Transformer Backbones for
        Object Detection, ECCV 2022 (the simple pyramid).
    """

    def __init__(self, widths: dict[int, int], channels: int) -> None:
        super().__init__()
        self.resample = nn.ModuleDict()
        self.source: dict[int, int] = {}
        inputs = []
        for s in LEVELS:
            near = min(widths, key=lambda have: (max(have, s) // min(have, s), have))
            self.source[s], width = near, widths[near]
            if near != s:
                self.resample[str(s)], width = resampler(width, near, s)
            inputs.append(width)
        self.fpn = FeaturePyramidNetwork(inputs, channels, LastLevelMaxPool(), norm_layer=group_norm)

    def forward(self, maps: dict[int, Tensor], size: tuple[int, int]) -> list[Tensor]:
        """Return the levels, finest first."""
        levels = OrderedDict()
        for s in LEVELS:
            level = maps[s] if s in maps else self.resample[str(s)](maps[self.source[s]])
            levels[str(s)] = level[..., : (size[0] + s - 1) // s, : (size[1] + s - 1) // s]
        return list(self.fpn(levels).values())


def resampler(channels: int, have: int, want: int) -> tuple[nn.Module, int]:
    """Return layers that resample a map from one stride to another (powers of two), and their output channels."""
    layers: list[nn.Module] = []
    while have < want:
        layers.append(nn.MaxPool2d(2))
        have *= 2
    while have > want:
        if layers:
            layers += [group_norm(channels), nn.GELU()]
        layers.append(nn.ConvTranspose2d(channels, channels // 2, 2, stride=2))
        channels, have = channels // 2, have // 2
    return nn.Sequential(*layers), channels
