"""Find the breast in a mammogram and the side of its chest wall."""

from __future__ import annotations

import math
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from mtmedformer.geometry import Floats, Frame, warp


def breast_region(pixels: Floats, side: int = 256) -> tuple[NDArray[np.bool_], float]:
    """Find the breast in a mammogram: threshold, cut thin bridges, keep the largest part, fill its holes.

    The threshold is the background plus a quarter of its distance to Otsu's threshold, so that the skin line is
    included. Opening separates labels and tape. The outermost 1 % of the film, where scanners leave bright rims, is not
    searched.

    Args:
        pixels: float32 (H, W) in [0, 1], dark background.
        side: Longer side in pixels of the reduced image the search runs on.

    Returns:
        The region, bool (h, w) in the reduced image (all true if no breast is found), and the number of original pixels
        per reduced pixel along a side.
    """
    height, width = pixels.shape
    scale = max(1.0, max(height, width) / side)
    reduced = Frame((scale, 0.0, 0.0, 0.0, scale, 0.0), (math.ceil(height / scale), math.ceil(width / scale)))
    small: Floats = cv2.GaussianBlur(warp(pixels, reduced), (0, 0), 1.5).astype(np.float32)
    rim = max(1, round(0.01 * max(small.shape)))
    inner = small[rim:-rim, rim:-rim]
    everything = np.ones(small.shape, bool)
    if inner.size == 0 or inner.max() - inner.min() < 1e-3:
        return everything, scale
    dark = float(np.percentile(inner, 2))
    region = np.zeros(small.shape, bool)
    region[rim:-rim, rim:-rim] = inner > dark + 0.25 * (_otsu(inner) - dark)
    open_by = max(3, round(0.03 * max(small.shape)))
    region = ndimage.binary_opening(region, np.ones((open_by, open_by)))
    parts, count = ndimage.label(region)
    if count == 0:
        return everything, scale
    region = parts == 1 + int(np.argmax(np.bincount(parts.ravel())[1:]))
    if region.mean() < 0.02:
        return everything, scale
    return ndimage.binary_fill_holes(region), scale


def breast_side(region: NDArray[np.bool_]) -> Literal["L", "R"] | None:
    """Return the side of the chest wall, the taller edge of a breast region: ``L`` at the left, ``R`` at the right.

    ``None`` if the two edges are about equally tall; the label decides then. Otherwise the pixels take precedence over
    the label, since some images are stored mirrored.
    """
    tall = region.sum(axis=0)
    columns = np.flatnonzero(tall)
    quarter = max(1, (columns[-1] + 1 - columns[0]) // 4)
    left = float(tall[columns[0] : columns[0] + quarter].mean())
    right = float(tall[columns[-1] + 1 - quarter : columns[-1] + 1].mean())
    if max(left, right) < 1.3 * min(left, right):
        return None
    return "L" if left > right else "R"


def _otsu(values: Floats) -> float:
    counts, edges = np.histogram(values, 256)
    middle = (edges[:-1] + edges[1:]) / 2
    below, mass = np.cumsum(counts)[:-1], np.cumsum(counts * middle)
    above, total = counts.sum() - below, mass[-1]
    between = np.zeros(len(below))
    valid = (below > 0) & (above > 0)
    gap = mass[:-1][valid] / below[valid] - (total - mass[:-1][valid]) / above[valid]
    between[valid] = below[valid] * above[valid] * gap**2
    return float(middle[int(between.argmax())])
