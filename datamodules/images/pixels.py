"""Read image files: DICOM, PNG, JPEG, TIFF, PGM and others, recognised by content.

An image is returned as displayed (float32 in [0, 1], 0 = black). A file that is damaged, hostile or no image raises
``DataError`` with its name and the fix, and no other error. Masks are read in ``datamodules.images.masks``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from datamodules.images.dicom import Pixels, is_dicom, read_display
from datamodules.images.dicom_decoding import MAX_BYTES, MAX_PIXELS, reading
from datamodules.records import Record
from mtmedformer.errors import DataError
from mtmedformer.geometry import Floats

__all__ = ["Originals", "Pixels", "head_of", "read_image", "read_values", "spread"]

Image.init()  # registers every format below; Image.open does not if it is given formats
_FORMATS = ("PNG", "JPEG", "TIFF", "PPM", "BMP", "GIF", "WEBP", "JPEG2000")
"""Formats that Pillow may try; none of them runs a program (EPS would)."""

_PGM = re.compile(rb"P([25])" + rb"(?:\s|#[^\r\n]*[\r\n])+(\d{1,9})" * 3 + rb"\s")

_LUMINANCE = tuple(np.float32(w) for w in (0.299, 0.587, 0.114))  # ITU-R BT.601, as JPEG


def read_image(file: Path) -> Pixels:
    """Read an image as displayed.

    DICOM goes through modality LUT, VOI LUT or window, inversion and padding. In other formats white is the largest
    value the format has, except that a 16-bit file without a value above 4095 (255) has 12-bit (8-bit) data and is
    scaled so (``range:4095``, ``range:255``); equal colour channels are one grey channel, others become luminance
    (ITU-R BT.601); transparency is dropped and an EXIF orientation applied.

    Args:
        file: A DICOM, PNG, JPEG, TIFF, PGM, BMP, GIF, WebP or JPEG 2000 file of one image.

    Raises:
        DataError: The file is missing, empty, damaged, not a single image, or has values without a known white.
    """
    head = head_of(file)
    if is_dicom(head):
        return read_display(file)
    with reading(file, "an image"):
        return _display(file, *read_values(file, head))


def _display(file: Path, values: NDArray[Any], white: int, path: list[str]) -> Pixels:
    if values.ndim == 3 and spread(values) == 0:
        values = values[..., 0]
        path.append("equal-channels")
    elif values.ndim == 3:
        red, green, blue = (values[..., i] * weight for i, weight in enumerate(_LUMINANCE))
        values = red + green + blue
        path.append("luminance")
    if white == 65535 and 0 < (most := values.max()) < 4096:
        white = 255 if most < 256 else 4095
        path.append(f"range:{white}")
    if white == 0:  # no integer format: only [0, 1] has a known range
        if not (values.min() >= 0 and values.max() <= 1):
            raise DataError(
                f"{file.name}: floating-point or signed values outside [0, 1] have no known white; save the image as "
                "16-bit PNG or TIFF, or as floats in [0, 1]."
            )
        return Pixels(values.astype(np.float32), 8 * values.itemsize, tuple(path))
    pixels = np.empty(values.shape, np.float32)
    np.divide(values, np.float32(white), out=pixels, dtype=np.float32, casting="unsafe")
    return Pixels(pixels, white.bit_length(), tuple(path))


def head_of(file: Path) -> bytes:
    """Return a file's first 132 bytes.

    Raises:
        DataError: The file is missing, not a regular file, empty or too large.
    """
    try:
        regular, size, head = file.is_file(), 0, b""
        if regular:
            size = file.stat().st_size
            with file.open("rb") as opened:
                head = opened.read(132)
    except (OSError, ValueError) as error:
        raise DataError(f"{file.name}: cannot be opened ({type(error).__name__}); check path and rights.") from error
    if not regular:
        raise DataError(f"{file.name}: no such file (or not a regular file); check the path in the table.")
    if not head:
        raise DataError(f"{file.name}: the file is empty (0 bytes); copy or download it again.")
    if size > MAX_BYTES:
        raise DataError(f"{file.name}: {size} bytes, more than one image needs; save its frames as single files.")
    return head


def read_values(file: Path, head: bytes, mask: bool = False) -> tuple[NDArray[Any], int, list[str]]:
    """Return the values (H, W) or (H, W, 3), the value of white (0: unknown) and the steps taken.

    Args:
        file: The file.
        head: Its first bytes.
        mask: Read a mask: indices of a coloured palette, and (H, W, 4) where the file has transparency.
    """
    return _pgm(file) if head[:2] in (b"P2", b"P5") else _pillow(file, mask)


def _pgm(file: Path) -> tuple[NDArray[Any], int, list[str]]:
    """Read a grey Netpbm file; Pillow would rescale depths other than 8 and 16 bits, and is slow."""
    content = file.read_bytes()
    header = _PGM.match(content)
    if header is None:
        raise DataError(f"{file.name}: the PGM header lacks width, height or maximum; save the image again.")
    columns, rows, white = (int(n) for n in header.groups()[1:])
    if not 0 < rows * columns <= MAX_PIXELS or not 0 < white < 65536:
        raise DataError(f"{file.name}: a PGM of {rows} x {columns} with maximum {white} is not read; save it again.")
    if header[1] == b"5":
        values: NDArray[Any] = np.frombuffer(content, "u1" if white < 256 else ">u2", rows * columns, header.end())
        values = values.astype(values.dtype.newbyteorder("="), copy=False)
    else:
        values = np.array(re.sub(rb"#[^\r\n]*", b"", content[header.end() :]).split()[: rows * columns]).astype(
            np.int64
        )
    if values.size < rows * columns or values.min() < 0 or values.max() > white:
        raise DataError(f"{file.name}: PGM values missing or above the maximum {white} of its header; save it again.")
    return values.reshape(rows, columns).astype(np.min_scalar_type(white), copy=False), white, ["decode:PGM"]


def _pillow(file: Path, mask: bool) -> tuple[NDArray[Any], int, list[str]]:
    with Image.open(file, formats=_FORMATS) as image:
        path = [f"decode:{image.format}"]
        if image.width * image.height > MAX_PIXELS:
            raise DataError(f"{file.name}: {image.width} x {image.height} pixels, over {MAX_PIXELS}; downscale it.")
        if image.format != "MPO" and getattr(image, "n_frames", 1) != 1:  # the further frames of an MPO are previews
            raise DataError(f"{file.name}: has several pages or frames; save each as a file of its own.")
        arguments = image.tile[0].args if image.tile else ""
        raw = str(arguments[0] if isinstance(arguments, tuple) else arguments)
        inverted = image.format == "TIFF" and image.mode.startswith("I;16") and image.tag_v2.get(262) == 0  # type: ignore[attr-defined]
        if ";16" in raw and image.mode in ("RGB", "RGBA"):  # Pillow would drop the low bytes
            decoded: Any = cv2.imdecode(np.frombuffer(file.read_bytes(), np.uint8), cv2.IMREAD_UNCHANGED)
            channels = [2, 1, 0, 3] if mask and decoded.shape[2] == 4 else [2, 1, 0]
            return np.ascontiguousarray(decoded[..., channels]), np.iinfo(decoded.dtype).max, path
        if (turn := image.getexif().get(0x0112, 1)) != 1:
            path.append(f"exif-orientation:{turn}")
        upright = ImageOps.exif_transpose(image)
        if upright.mode == "P":
            index, colours = np.asarray(upright), np.asarray(upright.convert("RGB"))
            if mask and spread(colours):
                _check_background(file, index, colours)
                return index, 255, path
            return (np.asarray(upright.convert("RGBA")) if mask else colours), 255, path
        if upright.mode == "1":
            return np.asarray(upright).astype(np.uint8), 1, path
        if mask and upright.mode in ("LA", "PA", "RGBA"):
            return np.asarray(upright.convert("RGBA")), 255, path
        if upright.mode in ("LA", "La"):
            return np.asarray(upright.getchannel(0)), 255, path
        if upright.mode not in ("L", "I", "F") and not upright.mode.startswith("I;16"):
            return np.asarray(upright.convert("RGB")), 255, path
        values = np.asarray(upright)
        if upright.mode == "L":
            scale = {"L;2": 85, "L;4": 17}.get(raw[:3], 1)  # Pillow rescales 2 and 4 bits to 8
            return values // np.uint8(scale), 255 // scale, path
        values = values.astype(values.dtype.newbyteorder("="), copy=False)
        if inverted:
            path.append("invert:WhiteIsZero")
            values = np.uint16(65535) - values
        white = 4095 if raw == "I;12" else 65535 if upright.mode.startswith("I;16") else 0
        if upright.mode == "I" and values.min() >= 0 and values.max() <= 65535:
            white = 65535
        return values, white, path


def _check_background(file: Path, index: NDArray[Any], colours: NDArray[Any]) -> None:
    """Raise if black, the background of a palette mask, has another index than 0."""
    black: NDArray[np.bool_] = colours.max(axis=2) == 0
    if (black & (index != 0)).any() and not black[index == 0].any():
        raise DataError(
            f"{file.name}: a palette mask in which black has index {int(index[black].min())}, not 0, so its background "
            "is uncertain; save the class numbers as one grey channel."
        )


def spread(channels: NDArray[Any]) -> int:
    """Return the largest difference between the channels of a pixel."""
    if channels.size == 0:
        return 0
    lowest, highest = channels[..., 0].copy(), channels[..., 0].copy()
    for i in (1, 2):
        np.minimum(lowest, channels[..., i], out=lowest)
        np.maximum(highest, channels[..., i], out=highest)
    return int((highest - lowest).max())


class Originals:
    """The files and original pixels of a data module's records, for overlays and DICOM outputs."""

    records: list[Record]

    @property
    def files(self) -> dict[str, Path]:
        """The image file of each record, by its id."""
        return {record.id: record.file for record in self.records}

    def original(self, file: Path) -> Floats:
        """Read the whole image as displayed: float32 (H, W) in [0, 1].

        Raises:
            DataError: The file cannot be read.
        """
        return read_image(file).pixels

    def is_dicom(self, file: Path) -> bool:
        """Return whether an image file is DICOM, from its first bytes."""
        with file.open("rb") as stream:
            return is_dicom(stream.read(132))
