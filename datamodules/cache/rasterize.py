"""Rasterize a record: decode and frame its image, draw its masks and boxes in the same frame.

Coordinates are those of ``mtmedformer.batch``: continuous, from the top-left corner of the top-left pixel; a pixel
``(row i, column j)`` belongs to a shape when its centre ``(j + 0.5, i + 0.5)`` lies inside.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from datamodules.cache.entries import CacheEntry, MaskMeasure, Measures
from datamodules.cache.quarantine import IMAGE, Issue
from datamodules.cache.shapes import Mask, border_of, fill_disc, fill_polygon, mask_boxes
from datamodules.images.luminance import grey_of
from datamodules.images.masks import UncertainMaskError, read_mask, shape_of, with_values
from datamodules.images.pixels import Pixels, read_image
from datamodules.images.presets import Preset
from datamodules.records import BoxTruth, MaskSource, MaskTruth, Record
from mtmedformer.batch import IGNORE
from mtmedformer.errors import DataError
from mtmedformer.geometry import Bytes, Floats, Frame, Ints, boxes_to_frame, compose, warp, warp_mask

ASPECT_TOLERANCE = 0.01
"""Largest relative difference between the aspect ratios of a mask and its image; beyond it the mask is rejected."""

UNCERTAIN = "uncertain mask"
"""Reason of the issue of a mask that ``datamodules.images.masks`` refuses."""

FRACTIONS = "boxes in the first pixel, as fractions of the image are"
"""Reason of the issue of an image of which no box has a coordinate above 1."""

SMALLEST_SIDE = 8
"""Smallest side in pixels; images below it are thumbnails, scout lines or broken files."""

CLIPPED, RESIZED, CORRECTED, OTHER_SIDE = (
    "boxes clipped to their image",
    "masks resized to their image",
    "images whose DICOM header contradicts their pixels (pixels taken)",
    "images whose side differs between table and header (table taken)",
)
"""Remarks: corrections that are counted; the image and its labels are used."""


class UnusableError(Exception):
    """An image or label that cannot be used, with a ``reason`` that can be counted and a ``detail`` with the values."""

    def __init__(self, reason: str, detail: str = "", transient: bool = False) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail, self.transient = reason, detail, transient

    def issue(self, record: Record, subject: str) -> Issue:
        """Return the issue for a record and a subject (``image`` or a task)."""
        return Issue(record.id, record.file.name, subject, self.reason, self.detail, self.transient)


@dataclass
class Canvas:
    """The size of the original image and the frame of the network's input, in which labels are drawn.

    Attributes:
        size: ``(height, width)`` of the original image.
        frame: Position of the network's input in it.
        scale: ``(y, x)`` pixels of the original image per unit of the label's coordinates.
        remarks: Corrections so far.
        covered: Channel, share of all pixels and share of the border of each mask file drawn so far.
    """

    size: tuple[int, int]
    frame: Frame
    scale: tuple[float, float] = (1.0, 1.0)
    remarks: list[str] = field(default_factory=list)
    covered: list[tuple[int, float, float]] = field(default_factory=list)

    def shape(self, points: Sequence[tuple[float, ...]], onto: tuple[int, int]) -> NDArray[np.float64]:
        """Return points (or boxes: two corners each) as (N, 2) ``(x, y)`` in pixels of a mask of size ``onto``."""
        factors = (self.scale[1] * onto[1] / self.size[1], self.scale[0] * onto[0] / self.size[0])
        return np.asarray(points, np.float64).reshape(-1, 2) * factors


def rasterize(
    record: Record, preset: Preset, size: tuple[int, int], white_level: int | None = None, colour: bool = False
) -> CacheEntry | Issue:
    """Decode one image, frame it, and draw its masks and boxes in that frame.

    Args:
        record: The image file and its labels.
        preset: Computes the frame (crop, flip, letterbox).
        size: ``(height, width)`` of the frame in pixels.
        white_level: The value of white in 16-bit images of the set.
        colour: Keep the colours of colour images.

    Returns:
        The entry; a task whose label cannot be used has an issue and neither mask nor boxes. If the image itself cannot
        be used, its issue instead of an entry.
    """
    try:
        pixels = _read(record, white_level, colour)
    except UnusableError as error:
        return error.issue(record, IMAGE)
    grey = grey_of(pixels.pixels)
    height, width = grey.shape
    canvas = Canvas((height, width), preset.frame(grey, size, record.laterality or pixels.laterality))
    image = warp(pixels.pixels, canvas.frame)
    masks, boxes, labels, issues = {}, {}, {}, []
    measured: list[MaskMeasure] = []
    for name, truth in record.truth.items():
        try:
            if isinstance(truth, MaskTruth):
                canvas.scale = _scale(record, canvas.size)
                canvas.covered.clear()
                masks[name] = rasterize_masks(truth, canvas)
                measured += [MaskMeasure(name, *covered) for covered in canvas.covered]
            elif isinstance(truth, BoxTruth):
                canvas.scale = _scale(record, canvas.size)
                boxes[name], labels[name] = rasterize_boxes(truth, canvas)
        except UnusableError as error:
            issues.append(error.issue(record, name))
    canvas.remarks += [f"{CORRECTED} ({step[10:]})" for step in pixels.path if step.startswith("corrected:")]
    if record.laterality and pixels.laterality and record.laterality != pixels.laterality:
        canvas.remarks.append(OTHER_SIDE)
    top, kind = (255, np.uint8) if pixels.bits <= 8 else (65535, np.uint16)
    return CacheEntry(
        image=np.rint(image.clip(0, 1) * top).astype(kind),
        to_original=canvas.frame.to_original,
        original_size=canvas.size,
        masks=masks,
        boxes=boxes,
        labels=labels,
        spacing=pixels.spacing,
        view=pixels.view,
        laterality=pixels.laterality,
        issues=tuple(issues),
        remarks=tuple(canvas.remarks),
        measures=Measures(canvas.size, round(float(np.median(border_of(grey))), 4), tuple(measured)),
    )


def rasterize_masks(truth: MaskTruth, canvas: Canvas) -> Bytes:
    """Draw the channels of a segmentation label in the frame.

    Returns:
        uint8 (K, H, W): 1 inside, 0 outside, ``IGNORE`` throughout a channel that is not annotated.
    """
    masks = np.full((len(truth.channels), *canvas.frame.size), IGNORE, np.uint8)
    for number, (channel, source) in enumerate(zip(masks, truth.channels, strict=True)):
        if source is None:
            continue
        channel[:] = 0
        for part in (source, *source.also):  # each file may have a size of its own
            mask = draw(part, canvas, _declared(part, truth.channels))
            if part.file is not None:
                canvas.covered.append((number, float(mask.mean()), float(border_of(mask).mean())))
            height, width = mask.shape
            to_mask = (width / canvas.size[1], 0.0, 0.0, 0.0, height / canvas.size[0], 0.0)
            framed = warp_mask(
                mask.astype(np.uint8), Frame(compose(to_mask, canvas.frame.to_original), canvas.frame.size)
            )
            if mask.any() and not framed.any():
                raise UnusableError("mask outside the cropped frame", "the label would become negative")
            np.maximum(channel, framed, out=channel)
    return masks


def rasterize_boxes(truth: BoxTruth, canvas: Canvas) -> tuple[Floats, Ints]:
    """Map boxes, and the boxes around masks, into the frame.

    Returns:
        float32 (N, 4) xyxy in pixels of the frame, and int64 (N,) class indices.
    """
    boxes, labels = [_original_boxes(truth, canvas)], list(truth.labels)
    for source, label in zip(truth.masks, truth.mask_labels, strict=True):
        mask_box = mask_boxes(
            draw(source, canvas, _declared(source, truth.masks)), canvas.size, truth.components, truth.min_area
        )
        boxes.append(mask_box)
        labels += [label] * len(mask_box)
    framed = boxes_to_frame(np.concatenate(boxes), canvas.frame)
    height, width = canvas.frame.size
    clipped = framed.clip(0, (width, height, width, height)).astype(np.float32)
    if ((clipped[:, 2:] - clipped[:, :2]) <= 0).any():
        raise UnusableError("box outside the cropped frame", "the label would become negative")
    return clipped, np.asarray(labels, np.int64)


def draw(source: MaskSource, canvas: Canvas, declared: Sequence[int] = ()) -> Mask:
    """Draw one mask channel: the union of file, polygons and discs; empty if the source has none of them.

    Args:
        source: Its file, polygons and discs.
        canvas: Size of the image and frame.
        declared: Values of all classes that the source's file is read for; those of the source alone if left out.

    Returns:
        bool (h, w): the size of the source's file where it has one, else that of the original image.

    Raises:
        UnusableError: The file is missing, unreadable, uncertain or of another aspect ratio, or a shape lies outside
            the image.
    """
    mask = np.zeros(canvas.size, bool) if source.file is None else _mask_file(source, canvas, declared)
    for polygon in source.polygons:
        points = canvas.shape(polygon, mask.shape)
        if not np.isfinite(points).all():
            raise UnusableError("polygon with a coordinate that is not a number")
        if len(points) > 2 and fill_polygon(mask, points):
            continue
        radius = source.point_radius if len(points) <= 2 else 0.0  # 3 and more: smaller than a pixel
        if not sum(fill_disc(mask, x, y, radius) for x, y in points):
            raise UnusableError("shape outside the image", f"polygon at ({polygon[0][0]:g}, {polygon[0][1]:g})")
    for x, y, r in source.discs:
        (cx, cy), (edge, _) = canvas.shape([(x, y), (x + r, y)], mask.shape).tolist()
        if not fill_disc(mask, cx, cy, abs(edge - cx)):
            raise UnusableError("shape outside the image", f"disc at ({x:g}, {y:g}) of radius {r:g}")
    return mask


def _read(record: Record, white_level: int | None, colour: bool) -> Pixels:
    if not os.path.isfile(record.file):  # pathlib raises where a name is too long
        raise UnusableError("image file missing", str(record.file), transient=True)
    try:
        pixels = read_image(record.file, white_level, colour, record.frame)
    except DataError as error:
        raise UnusableError("image unreadable", str(error), transient=True) from error
    values = pixels.pixels
    if min(values.shape[:2]) < SMALLEST_SIDE:
        raise UnusableError("image too small", f"{values.shape[1]}x{values.shape[0]} pixels")
    if not np.isfinite(values).all():
        raise UnusableError("image with values that are not numbers")
    if values.min() == values.max():
        raise UnusableError("image constant", f"every pixel is {values.flat[0]:g}")
    return replace(pixels, pixels=1 - values) if record.inverted else pixels


def _mask_file(source: MaskSource, canvas: Canvas, declared: Sequence[int]) -> Mask:
    assert source.file is not None
    if not os.path.isfile(source.file):
        raise UnusableError("mask file missing", str(source.file), transient=True)
    try:
        levels = read_mask(source.file)
        if source.values is None:
            mask, remark = shape_of(levels)
        else:
            mask, remark = with_values(levels, source.values, tuple(declared) or source.values)
    except UncertainMaskError as error:
        raise UnusableError(UNCERTAIN, error.reason) from error
    except DataError as error:
        raise UnusableError("mask unreadable", str(error), transient=True) from error
    if remark:
        canvas.remarks.append(remark)
    if mask.shape != canvas.size:
        _same_aspect("mask", (mask.shape[0], mask.shape[1]), canvas.size)
        canvas.remarks.append(RESIZED)
    return mask


def _declared(source: MaskSource, all_sources: Sequence[MaskSource | None]) -> tuple[int, ...]:
    """Return the values that the sources of one file declare together."""
    same = (other.values for other in all_sources if other is not None and other.file == source.file)
    return tuple(sorted({value for values in same for value in values or ()}))


def _same_aspect(what: str, size: tuple[int, int], original: tuple[int, int]) -> None:
    expected = size[1] * original[0] / original[1]
    if abs(size[0] - expected) > max(1.0, ASPECT_TOLERANCE * size[0]):  # 1: rounding of small masks
        sizes = f"{what} {size[1]}x{size[0]}, image {original[1]}x{original[0]}"
        raise UnusableError(f"{what} of another aspect ratio than its image", sizes)


def _scale(record: Record, original: tuple[int, int]) -> tuple[float, float]:
    if record.size is None:
        return (1.0, 1.0)
    _same_aspect("truth", record.size, original)
    return (original[0] / record.size[0], original[1] / record.size[1])


def _original_boxes(truth: BoxTruth, canvas: Canvas) -> NDArray[np.float64]:
    boxes = canvas.shape(truth.boxes, canvas.size).reshape(-1, 4)
    height, width = canvas.size
    inside = boxes.clip(0, (width, height, width, height))
    if truth.boxes and np.max(truth.boxes) <= 1:
        raise UnusableError(FRACTIONS, f"{list(truth.boxes[0])}; boxes are in pixels")
    for box, sides in zip(truth.boxes, boxes[:, 2:] - boxes[:, :2], strict=True):
        if not np.isfinite(sides).all():
            raise UnusableError("box with a coordinate that is not a number", f"{list(box)}")
        if (sides <= 0).any():
            raise UnusableError(
                "box without area or with corners swapped",
                f"{list(box)}; boxes are [x0, y0, x1, y1], not [x, y, width, height]",
            )
    outside = ((inside[:, 2:] - inside[:, :2]) <= 0).any(axis=1)
    if outside.any():
        box = truth.boxes[int(outside.argmax())]
        raise UnusableError("box outside the image", f"{list(box)} in an image of {width}x{height} pixels")
    canvas.remarks += [CLIPPED] * int((inside != boxes).any(axis=1).sum())
    return inside
