"""Find the breast in a mammogram and which way it points."""

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

    The threshold lies a quarter of the way from the background to Otsu's, so that the skin line stays in; opening cuts
    off labels and tape; the outermost 1 % of the film is left out of the search because scanners leave bright rims.

    Args:
        pixels: float32 (H, W) in [0, 1], dark background.
        side: Longer side in pixels of the reduced image the search runs on.

    Returns:
        bool (h, w) region in the reduced image (all true where nothing stands out), and how many original pixels one
        of its pixels spans.
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
    found = np.zeros(small.shape, bool)
    found[rim:-rim, rim:-rim] = inner > dark + 0.25 * (_otsu(inner) - dark)
    open_by = max(3, round(0.03 * max(small.shape)))
    found = ndimage.binary_opening(found, np.ones((open_by, open_by)))
    parts, count = ndimage.label(found)
    if count == 0:
        return everything, scale
    found = parts == 1 + int(np.argmax(np.bincount(parts.ravel())[1:]))
    if found.mean() < 0.02:
        return everything, scale
    return ndimage.binary_fill_holes(found), scale


def breast_side(region: NDArray[np.bool_]) -> Literal["L", "R"] | None:
    """Tell from a breast region which way the breast points: ``L`` has the chest wall, its tall edge, at the left.

    Pixels are asked before the label, because images are met that were stored mirrored. ``None`` where the two edges
    are about equally tall; the label decides then.
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
