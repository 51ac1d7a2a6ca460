"""Normalization layers: GroupNorm, and the layers that mix the images of a batch."""

from __future__ import annotations

from torch import nn

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
"""Layers whose output for an image depends on the other images of the batch."""


def group_norm(channels: int, max_groups: int = 32, min_channels: int = 8) -> nn.GroupNorm:
    """Return a GroupNorm with as many groups as the limits allow; the number of groups divides the channels.

    Args:
        channels: Channels of the input.
        max_groups: Largest number of groups.
        min_channels: Fewest channels of a group; one group may have fewer.
    """
    numbers = (g for g in range(1, max_groups + 1) if channels % g == 0 and (g == 1 or channels // g >= min_channels))
    return nn.GroupNorm(max(numbers), channels)
