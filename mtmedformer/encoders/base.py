"""The contract of an encoder: from an image it computes a feature pyramid whose levels have one width."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from mtmedformer.storage.constructor_arguments import RecordsArguments


class Encoder(RecordsArguments, nn.Module, ABC):
    """A module that turns an image into a feature pyramid for all heads.

    Attributes:
        name: Short name for reports and tags, for example ``pvt_v2_b0``.
        in_chans: Channels of the image.
        fixed_size: The only ``(height, width)`` of images it takes; ``None`` takes any.
        channels: Channels of every level.
        strides: Stride of each level in pixels, finest first.
    """

    name: str
    in_chans: int
    fixed_size: tuple[int, int] | None
    channels: int
    strides: tuple[int, ...]

    @abstractmethod
    def forward(self, image: Tensor) -> list[Tensor]:
        """Return the levels, finest first.

        Args:
            image: float (B, in_chans, H, W) in [0, 1].

        Returns:
            One (B, channels, ceil(H / s), ceil(W / s)) tensor per stride s.
        """

    @abstractmethod
    def layer_depths(self) -> dict[str, int]:
        """Return the depth of each parameter by name, 0 nearest to the image; empty without layers."""

    @abstractmethod
    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters without weight decay, for example position embeddings."""
