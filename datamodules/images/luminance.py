"""Colour images as grey ones: the luminance of red, green and blue."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

WEIGHTS = tuple(np.float32(w) for w in (0.299, 0.587, 0.114))
"""Weights of red, green and blue (ITU-R BT.601, as in JPEG)."""


def luminance(channels: NDArray[Any]) -> NDArray[Any]:
    """Return the luminance of (H, W, 3), in the units of the channels."""
    red, green, blue = (channels[..., i] * weight for i, weight in enumerate(WEIGHTS))
    level: NDArray[Any] = red + green + blue
    return level


def grey_of(pixels: NDArray[Any]) -> NDArray[Any]:
    """Return an image (H, W) or (H, W, 3) as one grey channel (H, W)."""
    return luminance(pixels) if pixels.ndim == 3 else pixels
