"""Read mask files, and decide which of their pixels belong to a class.

A mask whose meaning is uncertain raises ``UncertainMaskError``; its label is then unknown, never empty. The rules:

- 0 and one further level (0/1, 0/255, 0/65535, 1-bit): every pixel above zero.
- Several levels that form areas (a label map): every pixel above zero.
- Grey levels only along edges (resampled or antialiased): at least half of the largest level.
- JPEG, lossy DICOM, WebP and JPEG 2000 of 0 and 255: above 127. A brightest pixel from 1 to 206, grey areas, or a grey
  shape away from the bright ones: uncertain.
- No pixel near 0 but several levels, negative levels, fractions, colours, a shape in the transparency, a grey picture:
  uncertain.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from datamodules.images.dicom import read_stored
from datamodules.images.dicom_parsing import is_dicom, reading
from datamodules.images.pixels import head_of, read_values, spread
from mtmedformer.errors import DataError

Levels = NDArray[Any]
Mask = NDArray[np.bool_]

FAINT, BRIGHT = 48, 207
"""Values of a lossy 8-bit mask between which a pixel is neither background (0) nor shape (255)."""

TOO_FAINT = f"without a value above {FAINT}"
"""Part of the reason of a lossy mask in which no pixel is bright."""

BLOCK = 8
"""Side of a JPEG block in pixels; compression changes values no farther from an edge than this."""

FEW_LEVELS = 8
"""A label map has at most this many levels above zero; a file with more has grey edges or is a picture."""

SOFT_EDGES, LABELS = (
    "masks with grey edges (pixels of at least half the largest level taken)",
    "masks of several levels (all pixels above 0 taken; name the levels with column and values to separate them)",
)
"""Remarks on masks that were read by a rule."""

OTHER_LEVELS = "label maps with grey edges (levels of no class are background, so shapes are too small)"
VOID = "label maps with level 255 beside class numbers (taken as background; it often means: not annotated)"
"""Remarks on label maps that were resampled, or have a level that is a class of none."""


class UncertainMaskError(DataError):
    """A mask that can be read in two ways.

    Args:
        file: Name of the file, or an empty string.
        reason: What is uncertain, and the fix.
    """

    def __init__(self, file: str, reason: str) -> None:
        super().__init__(f"{file}: {reason}" if file else reason)
        self.reason = reason


def read_mask(file: Path) -> Levels:
    """Read the levels of a mask.

    A palette mask gives the grey levels of its palette if the colours in use are grey, else its indices (class numbers,
    as in PASCAL VOC). A lossy 8-bit mask of 0 and 255 gives exactly 0 and 255. Transparent pixels are 0.

    Args:
        file: Any format ``datamodules.images.pixels.read_image`` reads.

    Returns:
        Integer (H, W): uint8 or uint16, int32 or int64 where the file has such values; 0/1 for 1-bit files.

    Raises:
        DataError: The file is missing, empty, damaged or not a single image.
        UncertainMaskError: It is in colours, has fractions, its shape in the transparency, or is a lossy file of more
            or other levels than 0 and 255.
    """
    head = head_of(file)
    if is_dicom(head):
        values, lossy = read_stored(file)
    else:
        with reading(file, "a mask"):
            values, _, path = read_values(file, head, mask=True)
            lossy = _lossy(file, path[0])
            values = _one_channel(file, values, lossy)
    if lossy and values.dtype == np.uint8:
        values = _two_levels(file, values)
    return np.ascontiguousarray(values)


def shape_of(levels: Levels) -> tuple[Mask, str]:
    """Return the pixels of a mask that belong to its one class, by the rules of this module.

    Args:
        levels: Integer (H, W), as ``read_mask`` returns them.

    Returns:
        bool (H, W), and the remark of the rule, empty where the mask has 0 and one further level.

    Raises:
        UncertainMaskError: The levels can be read in two ways.
    """
    if levels.min() < 0:
        raise UncertainMaskError("", f"a mask with negative levels ({int(levels.min())}); save 0 and 255")
    present = _levels_in(levels)
    above = present[present > 0]
    if len(above) <= 1 and (len(above) == 0 or len(present) > 1):
        return levels > 0, ""
    top = int(above[-1])
    if len(present) == 1:  # one level everywhere; whether all masks are so is a question of the whole set
        return levels > 0, ""
    if present[0] * 10 > top:
        listed = " and ".join(map(str, present[:2])) if len(present) == 2 else f"{present[0]} to {top}"
        raise UncertainMaskError(
            "", f"a mask without background: its levels are {listed}, so it covers the whole image; save 0 and 255"
        )
    between = (levels > 0) & (levels < 0.9 * top)
    if not between.any():
        return levels > 0.5 * top, ""
    lower, higher, count = _around(levels), -_around(-levels.astype(np.int64)), int(between.sum())
    on_slope = int((between & (lower < levels) & (higher > levels)).sum()) / count
    in_area = int((between & (lower == levels) & (higher == levels)).sum()) / count
    few = len(above) <= FEW_LEVELS
    soft = on_slope >= 0.8 if few else in_area <= 0.1
    grey = (levels > 0.1 * top) & between
    if soft and grey.sum() <= max(0.6 * (levels > 0.1 * top).sum(), 0.02 * levels.size):
        shape = levels >= 0.5 * top
        if strays := _strays(levels > (0 if few else 0.1 * top), shape):
            raise UncertainMaskError(
                "", f"a mask of grey levels with {strays} region(s) below half the largest level; save 0 and 255"
            )
        return shape, SOFT_EDGES
    if soft or not few or (top == 255 and above[-2] < 26):  # 255: see ``VOID``
        listed = ", ".join(map(str, above[:FEW_LEVELS])) + (", …" if not few else "")
        raise UncertainMaskError(
            "", f"a mask of grey levels ({listed}) that are neither edges nor areas of labels; save 0 and 255, or "
            "name the levels of the class with column and values"
        )  # fmt: skip
    return levels > 0, LABELS


def with_values(levels: Levels, values: tuple[int, ...], declared: tuple[int, ...]) -> tuple[Mask, str]:
    """Return the pixels with the values of one class.

    Args:
        levels: Integer (H, W), as ``read_mask`` returns them.
        values: Values of the class.
        declared: Values of all classes that the file is read for.

    Returns:
        bool (H, W), and a remark where the file has level 255 or many levels of no class, as resampling leaves them
        along edges.

    Raises:
        UncertainMaskError: The mask is not all 0, but no class has one of its values; or it has many levels of no
            class, and a region without any value of a class.
    """
    present = _levels_in(levels)
    other = present[(present != 0) & ~np.isin(present, declared)]
    known = np.isin(levels, declared)
    if len(other) and not known.any():
        listed = ", ".join(map(str, present[:FEW_LEVELS])) + (", …" if len(present) > FEW_LEVELS else "")
        raise UncertainMaskError(
            "", f"a mask of levels {listed}, and no class has one of them (values {', '.join(map(str, declared))}); "
            "correct values, or save the background as 0"
        )  # fmt: skip
    if len(other) <= FEW_LEVELS:
        void = 255 in other and max(declared) < 26
        return np.isin(levels, values), VOID if void else ""
    if strays := _strays(levels > 0, known):
        raise UncertainMaskError(
            "", f"a label map with {len(other)} levels of no class, and {strays} region(s) of such levels only; save "
            "the class numbers without resampling"
        )  # fmt: skip
    return np.isin(levels, values), OTHER_LEVELS


def _around(levels: Levels) -> Levels:
    smallest: Levels = ndimage.minimum_filter(levels, 3, mode="nearest")
    return smallest


def _strays(support: Mask, shape: Mask) -> int:
    """Count the regions of ``support`` that do not touch the shape; specks of compression beside an edge do not count.

    Such a region would become background.
    """
    regions, count = ndimage.label(support, np.ones((3, 3)))
    sizes = np.bincount(regions.ravel(), minlength=count + 1)
    kept = np.bincount(regions[shape], minlength=count + 1) > 0
    far = np.bincount(regions[~ndimage.maximum_filter(shape, 2 * BLOCK + 1)], minlength=count + 1) > 0
    return int((~kept & (far | (sizes >= BLOCK)))[1:].sum())


def _levels_in(levels: Levels) -> NDArray[np.int64]:
    """Return the levels that occur, sorted."""
    if levels.dtype in (np.uint8, np.uint16):
        return np.flatnonzero(np.bincount(levels.ravel()))
    return np.unique(levels).astype(np.int64)


def _one_channel(file: Path, values: Levels, lossy: bool) -> Levels:
    if values.ndim == 3:
        if spread(values) > (8 if lossy else 0):
            raise UncertainMaskError(
                file.name, f"a mask in colours (channels differ by up to {spread(values)}); save the class numbers "
                "as one grey channel or as a palette PNG."
            )  # fmt: skip
        grey = values[..., 1]
        values = _opaque(file, grey, values[..., 3]) if values.shape[2] == 4 else grey
    if values.dtype.kind == "f":
        with np.errstate(invalid="ignore"):
            whole = values.astype(np.int64)
        if not np.array_equal(whole, values):
            raise UncertainMaskError(
                file.name, "a mask with fractions; save integers (0 = background) as 8- or 16-bit PNG."
            )
        values = whole
    return values


def _opaque(file: Path, grey: Levels, alpha: Levels) -> Levels:
    """Return the grey channel of a mask with transparency."""
    if alpha.min() == alpha.max():
        return grey
    if grey.min() == grey.max():
        raise UncertainMaskError(
            file.name, "a mask of one colour with its shape in the transparency (alpha); save 0 and 255 as one grey "
            "channel."
        )  # fmt: skip
    half = np.iinfo(alpha.dtype).max // 2
    if ((grey > 0) & (alpha == 0) | (grey > half) & (alpha <= half)).any():
        raise UncertainMaskError(
            file.name, "a mask whose grey levels and transparency (alpha) show different shapes; save 0 and 255 as "
            "one grey channel."
        )  # fmt: skip
    return grey


def _two_levels(file: Path, values: Levels) -> Levels:
    """Return a lossy mask of 0 and 255 without the changes that compression makes around edges."""
    most, bright = int(values.max()), values > 127
    if most == 0 or set(_levels_in(values).tolist()) == {0, 255}:
        return values
    fix = "save it as PNG with 0 and 255."
    if most <= FAINT:
        raise UncertainMaskError(
            file.name, f"a JPEG mask {TOO_FAINT}, but not all 0 (compression blurs levels such as 0 and 1); {fix}"
        )  # fmt: skip
    if most < BRIGHT:
        raise UncertainMaskError(file.name, f"a JPEG mask whose brightest pixel is {most}, not 255; {fix}")
    if np.mean((values > FAINT) & (values < BRIGHT)) > 0.02:
        raise UncertainMaskError(file.name, f"a JPEG mask of more than two levels; {fix}")
    if _strays(values > FAINT, bright):
        raise UncertainMaskError(file.name, f"a JPEG mask with grey shapes away from the bright ones; {fix}")
    return np.where(bright, np.uint8(255), np.uint8(0))


def _lossy(file: Path, decoder: str) -> bool:
    """Return whether a file's compression changes values."""
    if decoder == "decode:WEBP":
        with file.open("rb") as stream:
            return b"VP8 " in stream.read(4096)
    if decoder == "decode:JPEG2000":
        with file.open("rb") as stream:
            head = stream.read(65536)
        start = head.find(b"\xff\x52")  # coding style: its 14th byte is 0 for the irreversible transform
        return start >= 0 and head[start + 13 : start + 14] == b"\x00"
    return decoder in ("decode:JPEG", "decode:MPO")
