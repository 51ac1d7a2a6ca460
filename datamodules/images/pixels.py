"""Read image files: DICOM, PNG, JPEG, TIFF, PGM and others, recognised by content.

An image is returned as displayed (float32 in [0, 1], 0 = black), grey or in colour. A file that is damaged, hostile or
no image raises ``DataError`` with its name and the fix, and no other error. Masks are read in
``datamodules.images.masks``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.images import decoding_process
from datamodules.images.dicom import Pixels, read_display
from datamodules.images.dicom_parsing import MAX_BYTES, MAX_BYTES_OF_FRAMES, MAX_PIXELS, is_dicom, reading
from datamodules.images.frames import FIX
from datamodules.images.luminance import luminance
from datamodules.images.raster import decode, read_header, spread
from datamodules.images.tiff_directories import read_directory, tiff_start
from mtmedformer.errors import DataError

__all__ = ["SUFFIXES", "Pixels", "brightest", "head_of", "is_litter", "read_image", "read_values", "spread"]

LEVELS = (255, 1023, 4095, 16383, 65535)
"""White levels of 16-bit files: of 8, 10, 12, 14 and 16 bits."""

SUFFIXES = (".dcm", ".dicom", ".png", ".jpg", ".jpeg", ".tif", ".tiff", ".pgm", ".bmp", ".gif", ".webp", ".jp2")
"""A file with such a suffix counts as an image: if it cannot be read, it is a failure and not some other file."""

_PGM = re.compile(rb"P([25])" + rb"(?:\s|#[^\r\n]*[\r\n])+(\d{1,9})" * 3 + rb"\s")


def read_image(file: Path, white_level: int | None = None, colour: bool = False, frame: int | None = None) -> Pixels:
    """Read an image as displayed.

    DICOM goes through modality LUT, VOI LUT or window, inversion and padding. In other formats white is the largest
    value the format has, except in 16-bit files, which may hold fewer bits (see ``white_level``); equal colour channels
    are one grey channel; transparency is dropped and an EXIF orientation applied. Colour profiles are not applied.

    Args:
        file: A DICOM, PNG, JPEG, TIFF, PGM, BMP, GIF, WebP or JPEG 2000 file of one image.
        white_level: The value of white in a 16-bit file, as for all images of its set; ``None`` takes the smallest of
            ``LEVELS`` that this image does not exceed.
        colour: Return colour images as (H, W, 3). Otherwise they become luminance (ITU-R BT.601), and a colour DICOM
            image is an error.
        frame: The frame of a multi-frame DICOM file, from 1; ``None`` for the only one.

    Raises:
        DataError: The file is missing, empty, damaged, not a single image, or has values without a known white or
            above it.
    """
    head = head_of(file, MAX_BYTES if frame is None else MAX_BYTES_OF_FRAMES)
    if is_dicom(head):
        return read_display(file, colour, frame)
    if frame is not None:
        raise DataError(f"{file.name}: has no frame {frame}; only DICOM files have frames, name the file without it.")
    with reading(file, "an image"):
        return _display(file, *read_values(file, head), white_level, colour)


def _display(
    file: Path, values: NDArray[Any], white: int, path: list[str], white_level: int | None, colour: bool
) -> Pixels:
    if values.ndim == 3 and spread(values) == 0:
        values = values[..., 0]
        path.append("equal-channels")
    elif values.ndim == 3 and colour:
        path.append("colour")
    elif values.ndim == 3:
        values = luminance(values)
        path.append("luminance")
    if white == 65535:
        white = white_of_values(values, white_level, file.name)
        path += [f"range:{white}"] if white < 65535 else []
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


def white_of_values(values: NDArray[Any], white_level: int | None, name: str) -> int:
    """Return the value that is white in 16-bit values: that of their set, else the smallest of ``LEVELS`` above them.

    Raises:
        DataError: A value is above the white level of the set.
    """
    most = float(values.max())
    if white_level is None:
        return next(level for level in LEVELS if level >= most)
    if most > white_level:
        raise DataError(
            f"{name}: a 16-bit image with values up to {most:g}, above the white level {white_level} of its set; save "
            "it with the white of the other images, or set data.white_level."
        )
    return white_level


def brightest(file: Path) -> int | None:
    """Return the largest value of a 16-bit file; ``None`` for other and for unreadable files."""
    try:
        head = head_of(file)
        if is_dicom(head) or not _maybe_deep(file, head):
            return None
        with reading(file, "an image"):
            values, white, _ = read_values(file, head)
    except DataError:  # reading the image later gives the reason
        return None
    return int(values.max()) if white == 65535 else None


def _maybe_deep(file: Path, head: bytes) -> bool:
    """Return whether a file may have 16 bits, from its headers."""
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        return head[24] == 16
    if head[:2] in (b"P2", b"P5"):
        return b"65535" in head
    if tiff_start(head) is not None:
        with reading(file, "an image"):
            content = file.read_bytes()
            return read_directory(content, tiff_start(content) or 0).number(258, 1) > 8
    return head[:4] in (b"\xff\x4f\xff\x51", b"\0\0\0\x0c")


def head_of(file: Path, most: int = MAX_BYTES) -> bytes:
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
    if size > most:
        raise DataError(f"{file.name}: {size} bytes, more than one image needs; {FIX}.")
    return head


def read_values(file: Path, head: bytes, mask: bool = False) -> tuple[NDArray[Any], int, list[str]]:
    """Return the values (H, W) or (H, W, 3), the value of white (0: unknown) and the steps taken.

    Args:
        file: The file.
        head: Its first bytes.
        mask: Read a mask: indices of a coloured palette, and (H, W, 4) where the file has transparency.
    """
    if head[:2] in (b"P2", b"P5"):
        return _pgm(file)
    content = file.read_bytes()
    header = read_header(content)
    if header.rows * header.columns > MAX_PIXELS:
        raise DataError(f"{file.name}: {header.columns} x {header.rows} pixels, over {MAX_PIXELS}; downscale it.")
    if not header.isolated:
        return decode(content, mask, MAX_PIXELS)
    samples = 4 * (header.rows * header.columns or MAX_PIXELS)
    try:
        return decoding_process.decode_raster(content, samples, mask)
    except RuntimeError as error:
        raise DataError(
            f"{file.name}: cannot be read as an image ({error}); the file is damaged, incomplete or of another kind; "
            "copy or export it again."
        ) from error


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
        values = np.fromstring(re.sub(rb"#[^\r\n]*", b"", content[header.end() :]), np.int64, rows * columns, sep=" ")
    if values.size < rows * columns or values.min() < 0 or values.max() > white:
        raise DataError(f"{file.name}: PGM values missing or above the maximum {white} of its header; save it again.")
    return values.reshape(rows, columns).astype(np.min_scalar_type(white), copy=False), white, ["decode:PGM"]


def is_litter(name: str) -> bool:
    """Return whether a file or folder belongs to the operating system (``._x``, ``.DS_Store``, ``__MACOSX``)."""
    return name.startswith((".", "__MACOSX")) or name == "Thumbs.db"
