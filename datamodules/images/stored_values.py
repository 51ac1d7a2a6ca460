"""The bits of stored values that belong to the image, where they contradict BitsStored.

Values outside BitsStored have one of two causes. Overlays (retired) or unused high bits must be cleared; a BitsStored
that is too small must be ignored, since clearing would wrap the image. The image decides: neighbouring pixels differ
little in the right reading and by about a power of two in the other one. Where it does not decide, the image is
refused.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from datamodules.images.codestreams import StreamError
from datamodules.images.grayscale import Values, is_padding, padding_of

DECISIVE = 2.0
"""How many times rougher one of two readings is than the other, at least, for the other to be taken."""

FEW = 4
"""Number of different values up to which bright or negative ones may be annotations or padding, not an image."""


def image_bits(header: Dataset, stored: Values, path: list[str]) -> Values:
    """Return the values of the image alone.

    Args:
        header: BitsStored and PixelRepresentation are corrected where the values show that they are wrong.
        stored: The stored values; returned as they are where they fit BitsStored.
        path: Steps so far; a correction is appended.

    Raises:
        StreamError: Values lie outside BitsStored, and both readings are possible.
    """
    bits, signed = int(header.BitsStored), bool(header.PixelRepresentation)
    if stored.dtype.kind not in "iu":
        return stored
    if bits == 8 * stored.itemsize:
        return _really_unsigned(header, stored, path) if signed else stored
    if _fit(stored, bits, signed):
        return stored
    padding = padding_of(header)
    outside = is_padding(stored, padding) if padding else None
    inside = stored if outside is None else stored[~outside]
    if inside.size == 0 or _fit(inside, bits, signed):
        return stored  # only padding lies outside
    cleared = _cleared(header, stored, inside)
    kept = _kept(header, stored, inside, cleared, outside)
    if kept is not None:
        name, header.BitsStored, header.PixelRepresentation, values = kept
        path.append(f"corrected:{name}")
        return values
    return cleared if outside is None else np.where(outside, stored, cleared)


def _kept(
    header: Dataset, stored: Values, inside: Values, cleared: Values, outside: NDArray[np.bool_] | None
) -> tuple[str, int, int, Values] | None:
    """Return the wrong attribute, BitsStored, PixelRepresentation and the values; ``None`` where bits are cleared."""
    bits, signed = int(header.BitsStored), bool(header.PixelRepresentation)
    if _overlaid(header, inside):
        return None
    if not signed:
        negative = stored.view(f"i{stored.itemsize}")
        below = inside.view(negative.dtype)
        if _fit(below, bits, signed=True) and np.unique(below[below < 0]).size > FEW:
            return "PixelRepresentation", bits, 1, negative  # the sign fills the upper bits of every value
    most = int(inside.max())
    if signed and int(inside.min()) >= 0 and most < 1 << bits:
        if _rougher(cleared, stored, outside):  # unsigned values that are called signed
            return "PixelRepresentation", bits, 0, stored.view(f"u{stored.itemsize}")
        return None  # negative values whose upper bits are not set
    low = 1 << bits
    if not signed and most >= 2 * low and not ((inside >= low) & (inside < 2 * low)).any():
        return None  # a gap above BitsStored: single bits, not values
    if (not signed and _continue(inside >> bits)) or _rougher(cleared, stored, outside):
        needed = max(most.bit_length(), (-1 - int(inside.min())).bit_length() if signed else 0) + int(signed)
        return "BitsStored", needed, int(signed), stored
    if _rougher(stored, cleared, outside) or (signed and most < low):
        return None
    raise StreamError(
        f"BitsStored is {bits}, but the values need {most.bit_length()} bits, and neither reading fits the image"
    )


def _continue(upper: Values) -> bool:
    """Return whether the bits above BitsStored count without a gap to three or more, as overlays do not."""
    levels = np.unique(upper)
    return len(levels) > 3 and bool(levels[-1] == len(levels) - 1)


def _fit(values: Values, bits: int, signed: bool) -> bool:
    least, most = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    return bool(values.min() >= least and values.max() <= most)


def _cleared(header: Dataset, stored: Values, inside: Values) -> Values:
    """Clear the bits outside BitsStored; HighBit may put the values into the upper bits."""
    low = _lowest_bit(header, inside)
    shift = 8 * stored.itemsize - int(header.BitsStored)
    values: Values = (stored << (shift - low)) >> shift
    return values


def _lowest_bit(header: Dataset, inside: Values) -> int:
    """Return the position of the lowest bit of the values: 0, unless HighBit puts them higher and they are there."""
    bits, allocated = int(header.BitsStored), 8 * inside.itemsize
    high = int(header.get("HighBit") or bits - 1)
    low = high + 1 - bits
    if not 0 < low <= allocated - bits:
        return 0
    used = _used_bits(inside)
    return low if used >> high or not used & ((1 << low) - 1) else 0


def _used_bits(values: Values) -> int:
    """Return the bits that are set in any value."""
    return int(np.bitwise_or.reduce(values.view(f"u{values.itemsize}"), axis=None))


def _overlaid(header: Dataset, inside: Values) -> bool:
    """Return whether the header accounts for all bits above BitsStored: overlays there, or values in the upper bits."""
    if _lowest_bit(header, inside):
        return True
    bits = int(header.BitsStored)
    positions = [header[group, 0x0102].value for group in range(0x6000, 0x6020, 2) if (group, 0x0102) in header]
    declared = sum({1 << p for p in positions if isinstance(p, int) and bits <= p < 8 * inside.itemsize})
    used = _used_bits(inside) >> bits << bits
    return declared != 0 and used & ~declared == 0


def _really_unsigned(header: Dataset, stored: Values, path: list[str]) -> Values:
    """Return values of full depth as unsigned where reading them as signed breaks the image in two."""
    if int(stored.min()) >= 0 or int(stored.max()) < 0:
        return stored
    unsigned = stored.view(f"u{stored.itemsize}")
    padding = padding_of(header)
    if not _rougher(stored, unsigned, is_padding(stored, padding) if padding else None, by=2 * DECISIVE):
        return stored
    header.PixelRepresentation = 0
    path.append("corrected:PixelRepresentation")
    return unsigned


def _rougher(one: Values, other: Values, outside: NDArray[np.bool_] | None, by: float = DECISIVE) -> bool:
    """Return whether one reading has larger steps than the other, where the two have different steps."""
    totals = np.zeros(2)
    for axis in (0, 1):
        steps = [np.diff(np.asarray(v, np.int64), axis=axis) for v in (one, other)]
        counted: NDArray[Any] = steps[0] != steps[1]
        if outside is not None:
            both = np.moveaxis(outside, axis, 0)
            counted &= ~np.moveaxis(both[1:] | both[:-1], 0, axis)
        totals += [np.abs(step[counted]).sum(dtype=np.float64) for step in steps]
    return bool(totals[0] > by * totals[1])
