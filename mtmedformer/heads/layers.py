"""Functions that heads share: selection of pyramid levels by stride, resampling without a shift, GroupNorm."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from mtmedformer.errors import ConfigError
from mtmedformer.normalization import BATCH_NORMS, group_norm

head_norm = partial(group_norm, max_groups=8, min_channels=2)
"""The GroupNorm of the heads: at most 8 groups of at least 2 channels, so that a map of one pixel has a variance."""


def pick_levels(strides: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """Return the index in ``strides`` of each wanted stride.

    Raises:
        ConfigError: The pyramid has no level of a wanted stride, or no stride is wanted.
    """
    missing = [s for s in wanted if s not in strides]
    if missing or not wanted:
        raise ConfigError(
            f"strides: {list(wanted)} of a head; the pyramid of the encoder has {list(strides)}; choose some of these"
        )
    return [list(strides).index(s) for s in wanted]


def enlarge(x: Tensor, factor: float, size: Sequence[int]) -> Tensor:
    """Resample (B, C, h, w) bilinearly to ``factor`` times its size and crop to ``size`` at the bottom right.

    The crop is needed where the size of the image is no multiple of the stride: the last cell then extends beyond the
    image, and a resize to ``size`` would compress the whole map.
    """
    if factor != 1:
        x = F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
    return x[..., : size[0], : size[1]]


def mixes_images(head: nn.Module) -> bool:
    """Return whether the output for an image depends on the other images of the batch (BatchNorm)."""
    return any(isinstance(layer, BATCH_NORMS) for layer in head.modules())
