"""Decode image files that are not DICOM with Pillow: PNG, JPEG, TIFF and others.

The headers are read first, so that no size, directory or number of pieces in a file makes a decoder allocate or compute
more than its image needs. Formats with complicated decoders are decoded in ``datamodules.images.decoding_process``.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from datamodules.images.codestreams import StreamError, read_codestream
from datamodules.images.tiff_directories import check_directories, read_directory, tiff_start

Image.init()  # registers every format below; Image.open does not if it is given formats
_FORMATS = ("PNG", "JPEG", "TIFF", "PPM", "BMP", "GIF", "WEBP", "JPEG2000")
"""Formats that Pillow may try; none of them runs a program (EPS would)."""

_UNCOMPRESSED = 1


@dataclass(frozen=True)
class RasterHeader:
    """What the headers of an image file state.

    Attributes:
        rows: Height in pixels; 0 where only Pillow reads the header.
        columns: Width in pixels; 0 likewise.
        isolated: Whether the image is decoded in the process with limits.
    """

    rows: int
    columns: int
    isolated: bool


def read_header(content: bytes) -> RasterHeader:
    """Read the size of an image file by its format's own rules.

    Raises:
        StreamError: The headers contradict each other, or contain more than an image needs.
    """
    if content[:8] == b"\x89PNG\r\n\x1a\n":
        return RasterHeader(_big(content[20:24]), _big(content[16:20]), isolated=False)
    if (start := tiff_start(content)) is not None:
        return _tiff(content, start)
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return RasterHeader(*_webp(content), isolated=True)
    if coded := read_codestream(content, whole=False):
        return RasterHeader(coded.rows, coded.columns, isolated=coded.kind != "JPEG")
    if content[:4] == b"\0\0\0\x0c":
        raise StreamError("it holds no JPEG 2000 stream")
    return RasterHeader(0, 0, isolated=content[:2] in (b"P1", b"P3"))


def decode(content: bytes, mask: bool, most: int = 1 << 26) -> tuple[NDArray[Any], int, list[str]]:
    """Decode an image file.

    Args:
        content: The file.
        mask: Read a mask: indices of a coloured palette, and (H, W, 4) where the file has transparency.
        most: Largest number of pixels.

    Returns:
        The values (H, W), (H, W, 3) or (H, W, 4), the value of white (0: unknown) and the steps taken.

    Raises:
        StreamError: It is too large, or not a single image.
    """
    try:
        opened = Image.open(io.BytesIO(content), formats=_FORMATS)
    except UnidentifiedImageError as error:
        raise StreamError("cannot be read as an image", "it is damaged or in a format that is not read") from error
    with opened as image:
        path = [f"decode:{image.format}"]
        if image.width * image.height > most:
            raise StreamError(f"{image.width} x {image.height} pixels, over {most}", "downscale it")
        pages = image.format not in ("MPO", "TIFF")  # the further frames of an MPO are previews; TIFF was checked
        if pages and getattr(image, "is_animated", False):
            raise StreamError("has several pages or frames", "save each as a file of its own")
        _check_exif(image)
        arguments = image.tile[0].args if image.tile else ""
        raw = str(arguments[0] if isinstance(arguments, tuple) else arguments)
        inverted = image.format == "TIFF" and image.mode.startswith("I;16") and image.tag_v2.get(262) == 0  # type: ignore[attr-defined]
        if ";16" in raw and image.mode in ("RGB", "RGBA"):  # Pillow would drop the low bytes
            import cv2

            decoded: Any = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
            channels = [2, 1, 0, 3] if mask and decoded.shape[2] == 4 else [2, 1, 0]
            return np.ascontiguousarray(decoded[..., channels]), np.iinfo(decoded.dtype).max, path
        if (turn := image.getexif().get(0x0112, 1)) != 1:
            path.append(f"exif-orientation:{turn}")
        upright = ImageOps.exif_transpose(image)
        values, white = _values(upright, raw, mask)
        if inverted:
            path.append("invert:WhiteIsZero")
            values = np.uint16(65535) - values
        return values, white, path


def _values(image: Image.Image, raw: str, mask: bool) -> tuple[NDArray[Any], int]:
    """Return the values of an image of any mode and the value of white."""
    if image.mode == "P":
        index, colours = np.asarray(image), np.asarray(image.convert("RGB"))
        if mask and spread(colours):
            _check_background(index, colours)
            return index, 255
        return (np.asarray(image.convert("RGBA")) if mask else colours), 255
    if image.mode == "1":
        return np.asarray(image).astype(np.uint8), 1
    if mask and image.mode in ("LA", "PA", "RGBA"):
        return np.asarray(image.convert("RGBA")), 255
    if image.mode in ("LA", "La"):
        return np.asarray(image.getchannel(0)), 255
    if image.mode not in ("L", "I", "F") and not image.mode.startswith("I;16"):
        return np.asarray(image.convert("RGB")), 255
    values = np.asarray(image)
    if image.mode == "L":
        scale = {"L;2": 85, "L;4": 17}.get(raw[:3], 1)  # Pillow rescales 2 and 4 bits to 8
        return values // np.uint8(scale), 255 // scale
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    white = 4095 if raw == "I;12" else 65535 if image.mode.startswith("I;16") else 0
    if image.mode == "I" and values.min() >= 0 and values.max() <= 65535:
        white = 65535
    return values, white


def _check_background(index: NDArray[Any], colours: NDArray[Any]) -> None:
    """Raise if black, the background of a palette mask, has another index than 0."""
    black: NDArray[np.bool_] = colours.max(axis=2) == 0
    if (black & (index != 0)).any() and not black[index == 0].any():
        raise StreamError(
            f"a palette mask in which black has index {int(index[black].min())}, not 0, so its background is uncertain",
            "save the class numbers as one grey channel",
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


def _tiff(content: bytes, start: int) -> RasterHeader:
    directory = read_directory(content, start)
    if 8 <= directory.following < len(content):
        raise StreamError("has several pages or frames", "save each as a file of its own")
    check_directories(content, start)
    rows, columns = directory.number(257), directory.number(256)
    pieces = max(directory.count(273), directory.count(324))
    if pieces > 4 * (rows + rows * columns // 256) + 16:
        raise StreamError(f"its TIFF directory has {pieces} strips or tiles, more than its image needs")
    return RasterHeader(rows, columns, isolated=directory.number(259, _UNCOMPRESSED) != _UNCOMPRESSED)


def _webp(content: bytes) -> tuple[int, int]:
    kind, data = content[12:16], content[20:30]
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[7:10], "little"), 1 + int.from_bytes(data[4:7], "little")
    if kind == b"VP8L":
        packed = int.from_bytes(data[1:5], "little")
        return 1 + (packed >> 14 & 0x3FFF), 1 + (packed & 0x3FFF)
    return int.from_bytes(data[8:10], "little") & 0x3FFF, int.from_bytes(data[6:8], "little") & 0x3FFF


def _check_exif(image: Image.Image) -> None:
    block = image.info.get("exif")
    if isinstance(block, bytes) and (start := tiff_start(block := block.removeprefix(b"Exif\0\0"))) is not None:
        check_directories(block, start)


def _big(four: bytes) -> int:
    return int.from_bytes(four, "big")
