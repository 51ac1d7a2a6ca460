"""Stored DICOM values to grey levels: rescale, window, inversion and padding in the order of the standard.

Each step is a function of the stored integer only. The chain is therefore evaluated once per possible stored value, in
float64, and the image is a look-up in that table.

Reference:
    DICOM PS3.3 C.7.6.3.1.2 (photometric interpretation), C.11.1 (modality LUT), C.11.2 (VOI LUT),
    C.7.5.1.1.2 (padding).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue

_SLICES = ("CT", "MR", "PT", "NM")
"""Modalities of physical values with outliers (metal, flow): without a window, percentiles limit the grey range."""

MAX_WINDOWS = 8
"""Number of windows of a header that are tried."""

Values = NDArray[Any]
Step = Callable[[Values], Values]


def display_chain(header: Dataset, stored: Values, path: list[str]) -> Step:
    """Build the function from stored values to grey levels in [0, 1].

    Args:
        header: Attributes of the image.
        stored: Its stored values (H, W); they decide the range where the header has no usable window.
        path: Steps so far; the steps of the chain are appended.
    """
    colour = header.PhotometricInterpretation not in ("MONOCHROME1", "MONOCHROME2")
    if colour:
        white = np.iinfo(stored.dtype).max if header.PhotometricInterpretation == "PALETTE COLOR" else white_of(header)
        path.append("range:stored")
        return lambda x: np.clip(x / white, 0.0, 1.0)
    modality = _modality(header, path)
    padding = _used_padding(header, stored, path)
    inside = stored[~is_padding(stored, padding)] if padding else stored
    voi = _voi(header, modality, inside, path) or _range(header, modality, inside, path)
    invert = header.PhotometricInterpretation == "MONOCHROME1"
    if invert:
        path.append("invert:MONOCHROME1")
    elif header.get("PresentationLUTShape") == "INVERSE":
        invert = True
        path.append("invert:PresentationLUTShape")
    if padding:
        path.append("padding")

    def shown(values: Values) -> Values:
        level = voi(modality(values.astype(np.float64)))
        if invert:
            np.subtract(1.0, level, out=level)
        if padding:
            level[is_padding(values, padding)] = 0.0
        return level

    return shown


def apply_chain(shown: Step, stored: Values) -> NDArray[np.float32]:
    """Map every stored value to float32, by a table of all possible values where that is faster."""
    if stored.dtype.kind not in "iu" or stored.itemsize > 2 or stored.size < 1 << 8 * stored.itemsize:
        return _by_blocks(shown, stored)
    unsigned = np.dtype(f"u{stored.itemsize}")
    every = np.arange(1 << 8 * stored.itemsize).astype(unsigned).view(stored.dtype)
    used = int(stored.max()) + 1 if stored.dtype == unsigned else every.size
    table = np.zeros(every.size, np.float32)
    table[:used] = shown(every[:used])
    index = np.ascontiguousarray(stored).view(unsigned)
    try:
        return np.asarray(cv2.LUT(index, table.reshape(1, -1)), np.float32)
    except cv2.error:  # OpenCV before 5 looks up 8-bit values only
        return _by_blocks(lambda x: np.take(table, x, mode="clip"), index)


def _by_blocks(function: Step, values: Values) -> NDArray[np.float32]:
    """Apply a function in blocks whose intermediate arrays fit the processor's cache."""
    flat, block = values.reshape(-1), 1 << 16
    out = np.empty(flat.shape, np.float32)
    for i in range(0, flat.size, block):
        out[i : i + block] = function(flat[i : i + block])
    return out.reshape(values.shape)


def _modality(header: Dataset, path: list[str]) -> Step:
    if header.get("ModalityLUTSequence"):
        try:
            first, levels, _ = _lut(header, header.ModalityLUTSequence[0], signed=bool(header.PixelRepresentation))
        except (AttributeError, IndexError, TypeError, ValueError):
            path.append("modality-lut:broken")
        else:
            path.append("modality-lut")
            return lambda x: levels[np.clip(x - first, 0, len(levels) - 1).astype(np.int64)]
    slope, intercept = number_of(header, "RescaleSlope"), number_of(header, "RescaleIntercept")
    if slope == 0.0 or (slope is None and "RescaleSlope" in header):
        path.append("rescale:broken")
        return lambda x: x
    scale, offset = 1.0 if slope is None else slope, intercept or 0.0
    if (scale, offset) == (1.0, 0.0):
        return lambda x: x
    path.append("rescale")
    return lambda x: x * scale + offset


def _voi(header: Dataset, modality: Step, stored: Values, path: list[str]) -> Step | None:
    """Return the VOI LUT, else the first window, else ``None``; one that gives a constant image is not used."""
    values = modality(stored.ravel()[:: max(1, stored.size >> 16)].astype(np.float64))  # a sample, all in rare cases
    windows = {f"window:{i}": partial(_window, index=i) for i in range(_windows(header))}
    makers: dict[str, Callable[[Dataset, Values], tuple[Step, str] | None]] = {"voi-lut:0": _voi_lut, **windows}
    for name, make in makers.items():
        try:
            made = make(header, values)
        except (ArithmeticError, AttributeError, IndexError, TypeError, ValueError):
            path.append(f"{name}:broken")
            continue
        if made is None:
            continue
        step, kind = made
        if _constant(step(values)):
            values = modality(stored.ravel().astype(np.float64))
            if _constant(step(values)) and not _constant(values):
                path.append(f"{name}:outside")
                continue
        path.append(name + kind)
        return step
    return None


def _constant(values: Values) -> bool:
    return bool(values.min() == values.max())


def _voi_lut(header: Dataset, values: Values) -> tuple[Step, str] | None:
    if not header.get("VOILUTSequence"):
        return None
    first, levels, white = _lut(header, header.VOILUTSequence[0], signed=bool(values.size and values.min() < 0))
    levels = levels / white
    return lambda x: levels[np.clip(np.rint(x) - first, 0, len(levels) - 1).astype(np.int64)], ""


def _windows(header: Dataset) -> int:
    """Return the number of windows, at most ``MAX_WINDOWS``; the first usable one is taken."""
    if not (header.get("WindowCenter") or header.get("WindowWidth")) and header.get("WindowCenter") != 0:
        return 0
    centre = header.get("WindowCenter")
    return min(max(1, len(centre)), MAX_WINDOWS) if isinstance(centre, MultiValue) else 1


def _window(header: Dataset, values: Values, index: int) -> tuple[Step, str]:
    """Return a window as a function to [0, 1] (PS3.3 C.11.2.1.2 and C.11.2.1.3)."""
    centre, width = number_of(header, "WindowCenter", index), number_of(header, "WindowWidth", index)
    kind = str(header.get("VOILUTFunction") or "LINEAR").strip().upper()
    if centre is None or width is None or width <= 0:
        raise ValueError("no usable window")
    c, w = centre, width
    if kind == "SIGMOID":
        return lambda x: 0.5 * (1.0 + np.tanh(2.0 * (x - c) / w)), ":SIGMOID"  # = 1 / (1 + exp(-4 (x - c) / w))
    if kind == "LINEAR_EXACT":
        return lambda x: np.clip((x - c) / w + 0.5, 0.0, 1.0), ":LINEAR_EXACT"
    kind = ":LINEAR" if kind == "LINEAR" else ":LINEAR:function-unknown"
    if w < 1:
        raise ValueError("a LINEAR window is at least 1 wide")
    if w == 1:
        return lambda x: (x > c - 0.5).astype(np.float64), kind
    return lambda x: np.clip((x - (c - 0.5)) / (w - 1.0) + 0.5, 0.0, 1.0), kind


def _range(header: Dataset, modality: Step, inside: Values, path: list[str]) -> Step:
    """Return the grey range of an image without usable VOI, from its values without padding.

    Shallow images, and deep ones that use their depth, are shown as they are (``range:stored``: P-values, PS3.3
    C.11.2.1.2). CT, MR, PT and NM go from their 0.5th to their 99.5th percentile (``range:percentiles``); other deep
    images that use less than half of their depth from their lowest to their highest value (``range:values``), so that
    the brightest pixels, the calcifications of a mammogram, are not clipped.
    """
    white = white_of(header)
    unsigned = not header.PixelRepresentation and not header.get("ModalityLUTSequence")
    slices = header.get("Modality") in _SLICES
    if unsigned and (white <= 255 or (not slices and int(inside.max()) > white // 2)):
        low, high = sorted(modality(np.array([0.0, float(white)])))
        path.append("range:stored")
    else:
        cut = np.percentile(inside, (0.5, 99.5)) if slices else (inside.min(), inside.max())
        if slices and cut[0] == cut[1]:
            cut = (inside.min(), inside.max())
        low, high = sorted(modality(np.array(cut, dtype=np.float64)))
        path.append("range:percentiles" if slices else "range:values")
    width = high - low
    if not width > 0:
        return np.zeros_like
    return lambda x: np.clip((x - low) / width, 0.0, 1.0)


def _lut(header: Dataset, item: Dataset, signed: bool) -> tuple[int, NDArray[np.float64], int]:
    """Return (first value mapped, levels, white level) of a LUT item; ``ValueError`` where its parts contradict."""
    descriptor, data = item.LUTDescriptor, item.LUTData
    little = header.original_encoding[1] is not False
    if isinstance(descriptor, bytes):
        descriptor = np.frombuffer(descriptor, "<u2" if little else ">u2")
    count, first, bits = (int(v) for v in descriptor)
    count, first = count % 65536 or 65536, first % 65536
    if signed and first > 32767:
        first -= 65536
    if isinstance(data, bytes):
        wide = len(data) >= 2 * count
        levels = np.frombuffer(data, ("<u2" if little else ">u2") if wide else "u1")
    else:
        levels = np.atleast_1d(np.asarray(data, np.int64)) % 65536
        if len(levels) == (count + 1) // 2 < count and bits <= 8:  # two 8-bit entries a word
            levels = levels.astype("<u2").view("u1")
    if len(levels) > count + 1:
        raise ValueError("LUT data and descriptor contradict each other")
    levels = levels[:count].astype(np.float64)
    if len(levels) < count or not 1 <= bits <= 16:
        raise ValueError("LUT data and descriptor contradict each other")
    return first, levels, (1 << max(bits, int(levels.max()).bit_length())) - 1


def padding_of(header: Dataset) -> tuple[int, int] | None:
    """Return the lowest and the highest stored value that is padding, whichever sign its attribute was written with."""
    value, limit = number_of(header, "PixelPaddingValue"), number_of(header, "PixelPaddingRangeLimit")
    if value is None:
        return None
    ends = [int(v) for v in (value, value if limit is None else limit)]
    span = 1 << int(header.BitsAllocated)
    if header.PixelRepresentation:
        ends = [e - span if e >= span // 2 else e for e in ends]
    else:
        ends = [e + span if e < 0 else e for e in ends]
    return min(ends), max(ends)


def is_padding(values: Values, padding: tuple[int, int]) -> NDArray[np.bool_]:
    """Return which stored values are padding."""
    found: NDArray[np.bool_] = (values >= padding[0]) & (values <= padding[1])
    return found


def _used_padding(header: Dataset, stored: Values, path: list[str]) -> tuple[int, int] | None:
    """Return the values that are padding; ``None`` where they would be the whole image."""
    padding = padding_of(header)
    if padding and is_padding(stored, padding).all():
        path.append("padding:broken")
        return None
    return padding


def white_of(header: Dataset) -> int:
    """Return the largest value that BitsStored can hold (unsigned)."""
    return (1 << int(header.BitsStored)) - 1


def number_of(header: Dataset, key: str, index: int = 0) -> float | None:
    """Return one finite number of an attribute, or ``None`` where it is missing, empty or invalid."""
    try:
        value = header.get(key)
        if isinstance(value, bytes):
            value = int.from_bytes(value[:2], "little", signed=bool(header.PixelRepresentation)) if value else None
        number = float(value[index] if isinstance(value, MultiValue) else value)
    except (ArithmeticError, AttributeError, IndexError, TypeError, ValueError):
        return None
    return number if np.isfinite(number) else None
