"""Affine geometry between the network's input and the original image, for pixels, masks, boxes and points.

Letterbox, breast crop, flip and augmentation are one affine, so predictions can be mapped back to the original pixels.
Coordinates follow the corner convention of `mtmedformer.batch`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from mtmedformer.batch import IGNORE, Meta

Affine = tuple[float, float, float, float, float, float]
"""``(a, b, c, d, e, f)``: the point ``(x, y)`` goes to ``(a x + b y + c, d x + e y + f)``."""

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]

IDENTITY: Affine = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)

BLOCK = 512
"""Rows of the original image that are computed at once when a mask is mapped back."""


@dataclass(frozen=True)
class Frame:
    """The place of the network's input in the original image.

    Attributes:
        to_original: Affine from coordinates of the input to pixels of the original image.
        size: ``(height, width)`` of the input.
    """

    to_original: Affine
    size: tuple[int, int]


def compose(outer: Affine, inner: Affine) -> Affine:
    """Return the affine that applies ``inner`` first, then ``outer``."""
    return _affine(_matrix(outer) @ _matrix(inner))


def invert(affine: Affine) -> Affine:
    """Return the inverse of an affine."""
    return _affine(np.linalg.inv(_matrix(affine)))


def map_points(affine: Affine, points: NDArray[Any]) -> NDArray[np.float64]:
    """Map points (N, 2) given as ``(x, y)``."""
    m = _matrix(affine)
    return np.asarray(points, np.float64).reshape(-1, 2) @ m[:2, :2].T + m[:2, 2]


def map_boxes(affine: Affine, boxes: NDArray[Any]) -> NDArray[Any]:
    """Map boxes (N, 4) xyxy and return the boxes around the result, still with x0 <= x1 and y0 <= y1.

    Exact under flips, scaling and shifts. Under rotation the box of the *ellipse* inscribed in the old box is returned:
    a lesion is round rather than square, and the box of the rotated corners would grow with every degree.
    """
    boxes = np.asarray(boxes)
    dtype = boxes.dtype if np.issubdtype(boxes.dtype, np.floating) else np.float32
    flat = boxes.astype(np.float64).reshape(-1, 4)
    a, b, _, d, e, _ = affine
    centre = map_points(affine, (flat[:, :2] + flat[:, 2:]) / 2)
    half = (flat[:, 2:] - flat[:, :2]) / 2
    reach = np.stack([np.hypot(a * half[:, 0], b * half[:, 1]), np.hypot(d * half[:, 0], e * half[:, 1])], axis=1)
    return np.concatenate([centre - reach, centre + reach], axis=1).astype(dtype)


def boxes_to_frame(boxes: NDArray[Any], frame: Frame) -> NDArray[Any]:
    """Map boxes (N, 4) xyxy of the original image into the input; not clipped (see `clip_boxes`)."""
    return map_boxes(invert(frame.to_original), boxes)


def boxes_to_original(boxes: NDArray[Any], frame: Frame) -> NDArray[Any]:
    """Map boxes (N, 4) xyxy of the input back into the original image; not clipped."""
    return map_boxes(frame.to_original, boxes)


def boxes_in_original(boxes: NDArray[Any], meta: Meta) -> NDArray[np.float64]:
    """Map predicted boxes (N, 4) xyxy of the input back into the original image, clipped to it."""
    height, width = meta.original_size
    mapped = map_boxes(meta.to_original, np.asarray(boxes, np.float64).reshape(-1, 4))
    return mapped.clip(0, (width, height, width, height))


def mask_in_original(probabilities: Floats, meta: Meta, threshold: float = 0.5) -> Bytes:
    """Map a predicted mask back into the original image.

    Works through a few rows at a time, so that a mask of a large film needs one byte per pixel and little more.

    Args:
        probabilities: float (h, w) of the network's input, in [0, 1].
        meta: Metadata of the image, with the affine of that input.
        threshold: Probability from which a pixel belongs to the mask.

    Returns:
        uint8 (H, W) of 0 and 1; 0 where the input does not reach.
    """
    height, width = meta.original_size
    to_input = invert(meta.to_original)
    mask = np.zeros((height, width), np.uint8)
    for top in range(0, height, BLOCK):
        rows = min(BLOCK, height - top)
        block = Frame(compose(to_input, (1.0, 0.0, 0.0, 0.0, 1.0, float(top))), (rows, width))
        mask[top : top + rows] = warp(probabilities, block) >= threshold
    return mask


def letterbox(
    source: tuple[float, float, float, float], size: tuple[int, int], flip: bool = False, align: float = 0.5
) -> Frame:
    """Fit a rectangle of the original image into the input: the aspect ratio is kept, the rest of the input is empty.

    Args:
        source: ``(x0, y0, x1, y1)`` in original pixels.
        size: ``(height, width)`` of the input.
        flip: Mirror left and right.
        align: Where the rectangle sits in the free width: 0 left, 0.5 centred, 1 right. Height is centred.
    """
    x0, y0, x1, y1 = source
    height, width = size
    scale = max((y1 - y0) / height, (x1 - x0) / width)
    left, top = (width - (x1 - x0) / scale) * align, (height - (y1 - y0) / scale) / 2
    if flip:
        return Frame((-scale, 0.0, x1 + left * scale, 0.0, scale, y0 - top * scale), size)
    return Frame((scale, 0.0, x0 - left * scale, 0.0, scale, y0 - top * scale), size)


def warp(array: NDArray[Any], frame: Frame, nearest: bool = False) -> NDArray[Any]:
    """Resample an image into a frame; pixels outside the image become 0.

    Shrinking averages the exact area each new pixel covers (no aliasing), enlarging interpolates bilinearly; a rotated
    frame is smoothed first and then interpolated.

    Args:
        array: (H, W) or (H, W, 3) of any number type.
        frame: The input and its place in the original image.
        nearest: Take the value under each pixel's centre instead, for label images.

    Returns:
        (height, width) of the frame, with the channels of ``array``: float32, or its type with ``nearest``.
    """
    if array.ndim == 3:
        return np.stack([warp(array[..., i], frame, nearest) for i in range(array.shape[2])], axis=-1)
    if nearest:
        only: NDArray[Any] = nearest_pixels(array[None], frame, np.zeros(1, array.dtype))[0]
        return only
    a, b, c, d, e, f = frame.to_original
    height, width = frame.size
    pixels: NDArray[Any] = np.ascontiguousarray(array, np.float32)
    if b == d == 0.0:
        rows, columns = _weights(height, e, f, pixels.shape[0]), _weights(width, a, c, pixels.shape[1])
        averaged = np.ascontiguousarray((columns @ (rows @ pixels).T).T, np.float32)
        return np.clip(averaged, min(0, pixels.min()), max(0, pixels.max()))  # rounding may pass them by 1e-7
    shrink = math.sqrt(abs(a * e - b * d))
    if shrink > 1:
        pixels = cv2.GaussianBlur(pixels, (0, 0), (shrink - 1) / 2 + 1e-3, borderType=cv2.BORDER_REPLICATE)
    centres = np.array([[a, b, c + (a + b - 1) / 2], [d, e, f + (d + e - 1) / 2]])  # between pixel indices
    return cv2.warpAffine(  # type: ignore[no-any-return, unused-ignore]
        pixels, centres, (width, height), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_CONSTANT
    )


def warp_mask(mask: Bytes, frame: Frame) -> Bytes:
    """Resample a mask of 0/1/``IGNORE`` into a frame.

    A pixel takes the value that covers at least half of it. A class that is there but wins no pixel (a lesion smaller
    than half an input pixel) keeps the pixel it covers best, because present must not turn into absent. Outside the
    image lies background 0, except that a mask that is ``IGNORE`` everywhere (not annotated) stays so everywhere.

    Args:
        mask: uint8 (H, W).
        frame: The input and its place in the original image.
    """
    if mask.size and (mask == IGNORE).all():
        return np.full(frame.size, IGNORE, np.uint8)
    cover = warp((mask == 1).astype(np.float32), frame)
    out = (cover >= 0.5).astype(np.uint8)
    if not out.any() and cover.any():
        out.flat[int(cover.argmax())] = 1
    if (mask == IGNORE).any():
        out[(warp((mask == IGNORE).astype(np.float32), frame) >= 0.5) & (out == 0)] = IGNORE
    return out


def clip_boxes(
    boxes: Floats, labels: Ints, size: tuple[int, int], min_side: float = 2.0, min_visible: float = 0.25
) -> tuple[Floats, Ints, int]:
    """Clip boxes to the image and drop those of which too little remains.

    Args:
        boxes: (N, 4) xyxy; may reach outside the image, be inverted or hold NaN.
        labels: (N,).
        size: ``(height, width)`` of the image.
        min_side: Smallest side in pixels that a box may have after clipping.
        min_visible: Smallest share of its area that must be inside.

    Returns:
        The boxes kept, their labels, and how many were dropped.
    """
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
    limits = np.array([size[1], size[0], size[1], size[0]], np.float32)
    clipped = np.clip(boxes, 0, limits)
    sides, before = clipped[:, 2:] - clipped[:, :2], boxes[:, 2:] - boxes[:, :2]
    keep = (sides >= max(min_side, 1e-3)).all(axis=1) & (before > 0).all(axis=1)  # NaN compares False
    keep &= sides.prod(axis=1) >= min_visible * before.prod(axis=1)
    return clipped[keep], np.asarray(labels, np.int64).reshape(-1)[keep], int((~keep).sum())


def _matrix(affine: Affine) -> NDArray[np.float64]:
    return np.array([affine[:3], affine[3:], (0.0, 0.0, 1.0)], np.float64)


def _affine(matrix: NDArray[Any]) -> Affine:
    a, b, c, d, e, f = (float(v) for v in matrix[:2].ravel())
    return (a, b, c, d, e, f)


def _weights(count: int, step: float, start: float, length: int) -> sparse.csr_array:
    """Return (count, length) weights: a new pixel averages old ones under a window of max(1, |step|) at its centre.

    A window of one old pixel is linear interpolation, a wider one the exact area average. Rows sum to 1, or to 0 where
    the centre lies outside.
    """
    centre = (np.arange(count) + 0.5) * step + start
    half = max(1.0, abs(step)) / 2
    first = np.floor(centre - half).astype(np.int64)
    old = first[:, None] + np.arange(math.ceil(2 * half) + 1)
    overlap = np.minimum(old + 1, (centre + half)[:, None]) - np.maximum(old, (centre - half)[:, None])
    overlap = np.where((old >= 0) & (old < length), np.maximum(overlap, 0), 0)
    total = overlap.sum(axis=1, keepdims=True)
    inside = ((centre >= 0) & (centre <= length))[:, None] & (total > 0)
    overlap = np.where(inside, overlap / np.where(total > 0, total, 1), 0).astype(np.float32)
    rows = np.broadcast_to(np.arange(count)[:, None], old.shape)
    used = overlap > 0
    return sparse.csr_array((overlap[used], (rows[used], old[used])), shape=(count, length))


def nearest_pixels(stack: NDArray[Any], frame: Frame, outside: NDArray[Any]) -> NDArray[Any]:
    """Take from each image of (K, H, W) the pixel under each new pixel's centre; ``outside`` (K,) fills the rest."""
    a, b, c, d, e, f = frame.to_original
    x, y = np.arange(frame.size[1]) + 0.5, (np.arange(frame.size[0]) + 0.5)[:, None]
    column, row = np.floor(a * x + b * y + c).astype(np.int64), np.floor(d * x + e * y + f).astype(np.int64)
    height, width = stack.shape[1:]
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    taken = stack[:, np.clip(row, 0, height - 1), np.clip(column, 0, width - 1)]
    return np.where(inside, taken, outside[:, None, None])
