"""Fill polygons and discs in a mask, box the parts of a mask, and measure what a mask covers.

Coordinates are those of ``mtmedformer.batch``: continuous, from the top-left corner of the top-left pixel; a pixel
``(row i, column j)`` belongs to a shape when its centre ``(j + 0.5, i + 0.5)`` lies inside.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Mask = NDArray[np.bool_]


def fill_polygon(mask: Mask, points: NDArray[np.float64]) -> int:
    """Set the pixels whose centres lie inside a polygon (even-odd rule).

    Args:
        mask: bool (H, W), changed in place.
        points: (N, 2) corners ``(x, y)``; the last is joined to the first.

    Returns:
        Number of pixels inside.
    """
    x0, y0 = points.T
    x1, y1 = np.roll(points, -1, axis=0).T
    filled = 0
    for row in range(max(0, math.ceil(y0.min() - 0.5)), min(mask.shape[0], math.ceil(y0.max() - 0.5))):
        y = row + 0.5
        crossed = (y0 <= y) != (y1 <= y)
        slope = (x1[crossed] - x0[crossed]) / (y1[crossed] - y0[crossed])
        edges = np.ceil(np.sort(x0[crossed] + (y - y0[crossed]) * slope) - 0.5).clip(0, mask.shape[1]).astype(int)
        for start, stop in zip(edges[::2], edges[1::2], strict=True):
            mask[row, start:stop] = True
            filled += stop - start
    return filled


def fill_disc(mask: Mask, x: float, y: float, radius: float) -> int:
    """Set the pixels whose centres lie within a disc, and always the pixel that holds its centre.

    Returns:
        Number of pixels of the mask inside; 0 if the disc is outside the mask.
    """
    height, width = mask.shape
    if not all(math.isfinite(v) for v in (x, y, radius)):
        return 0
    left, top = max(0, math.floor(x - radius)), max(0, math.floor(y - radius))
    right, bottom = min(width, math.floor(x + radius) + 1), min(height, math.floor(y + radius) + 1)
    if left >= right or top >= bottom:
        return 0
    rows, columns = np.ogrid[top:bottom, left:right]
    inside = (columns + 0.5 - x) ** 2 + (rows + 0.5 - y) ** 2 <= radius**2
    inside |= (columns == math.floor(x)) & (rows == math.floor(y))
    mask[top:bottom, left:right] |= inside
    return int(inside.sum())


def mask_boxes(mask: Mask, size: tuple[int, int], components: bool, min_area: int) -> NDArray[np.float64]:
    """Find the box around a mask, or around each of its 8-connected components.

    Args:
        mask: bool (h, w).
        size: ``(height, width)`` the boxes and ``min_area`` refer to, of the mask's aspect ratio.
        components: One box per component instead of one around the whole mask.
        min_area: Smallest number of pixels of a component (or mask); smaller ones give no box.

    Returns:
        float64 (N, 4) xyxy; N = 0 for an empty mask.
    """
    parts, _ = ndimage.label(mask, np.ones((3, 3))) if components else (mask.astype(np.int32), 1)
    sy, sx = size[0] / mask.shape[0], size[1] / mask.shape[1]
    boxes = [
        (columns.start * sx, rows.start * sy, columns.stop * sx, rows.stop * sy)
        for number, (rows, columns) in enumerate(ndimage.find_objects(parts), start=1)
        if (parts[rows, columns] == number).sum() * sy * sx >= min_area
    ]
    return np.asarray(boxes, np.float64).reshape(-1, 4)


def border_of(values: NDArray[Any]) -> NDArray[Any]:
    """Return the outermost pixels of an image or a mask (H, W) as one row."""
    return np.concatenate([values[0], values[-1], values[1:-1, 0], values[1:-1, -1]])
