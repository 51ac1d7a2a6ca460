"""Headers of compressed image streams: JPEG, JPEG-LS and JPEG 2000.

Decoders allocate memory by the sizes in these headers, wherever they are. The whole marker structure is therefore read
before a stream is decoded: a second header, a size or a number of components that differs from what is expected, and a
stream that ends early are errors.

Reference:
    ITU-T T.81 annex B (JPEG), T.87 annex C (JPEG-LS), T.800 annexes A and I (JPEG 2000 and its file format).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_SCANS = 100
"""Largest number of scans of a JPEG image; progressive encoders write about ten, and each costs a pass over it."""

MAX_TILES = 1 << 14
"""Largest number of tiles of a JPEG 2000 image; decoders keep several kilobytes for each."""

JPEG, JPEG_LS, JPEG_2000 = "JPEG", "JPEG-LS", "JPEG 2000"

_SOC_SIZ = b"\xff\x4f\xff\x51"
_JP2 = b"\0\0\0\x0cjP  \r\n\x87\n"
_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd8-\xfe]")  # FF before other bytes belongs to the coded data


class StreamError(Exception):
    """What is wrong with the data of a file, in words that follow its name.

    Args:
        problem: What is wrong.
        fix: What the user can do.
    """

    def __init__(self, problem: str, fix: str = "export or copy the image again") -> None:
        super().__init__(f"{problem}; {fix}.")


@dataclass(frozen=True)
class Codestream:
    """What the headers of one compressed image state.

    Attributes:
        kind: ``JPEG``, ``JPEG-LS`` or ``JPEG 2000``.
        rows: Height in pixels.
        columns: Width in pixels.
        components: Samples per pixel.
        precision: Bits per sample.
        process: The marker of the JPEG frame header, for example ``0xC3`` (lossless); 0 for JPEG 2000.
        start: Position of the first byte in the data that were read.
        end: Position after the last byte; what follows is padding.
    """

    kind: str
    rows: int
    columns: int
    components: int
    precision: int
    process: int
    start: int
    end: int


def read_codestream(data: bytes, whole: bool = True) -> Codestream | None:
    """Read the headers of a compressed image.

    Args:
        data: The bytes of one frame, or of a JPEG or JPEG 2000 file.
        whole: Whether a JPEG image without end marker is an error.

    Returns:
        The image, or ``None`` where the data do not begin as such a stream.

    Raises:
        StreamError: The stream is incomplete, or its headers contradict each other.
    """
    if data[:2] == b"\xff\xd8":
        return _jpeg(data, whole)
    if data[:4] == _SOC_SIZ:
        return _jpeg_2000(data, 0, len(data))
    if data[: len(_JP2)] == _JP2:
        return _jpeg_2000(data, *_contiguous_codestream(data))
    return None


def _jpeg(data: bytes, whole: bool) -> Codestream:
    at, header, process, scans = 2, b"", 0, 0
    while True:
        found = _MARKER.search(data, at)  # decoders skip bytes before a marker, too
        if found is None and scans and not whole:
            break
        if found is None:
            raise StreamError("its JPEG stream ends early (no end marker)")
        marker, at = data[found.end() - 1], found.end()
        if marker == 0xD9:
            break
        if marker == 0xD8:
            raise StreamError("its JPEG stream contains a second image")
        length = int.from_bytes(data[at : at + 2], "big")
        if length < 2 or at + length > len(data):
            raise StreamError("its JPEG stream is damaged or ends early")
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            if header:
                raise StreamError("its JPEG stream has several headers with a size")
            header, process = data[at + 2 : at + length], marker
        if marker == 0xDC:
            raise StreamError("its JPEG stream changes its height in the middle (DNL)")
        at += length
        scans += marker == 0xDA
        if scans > MAX_SCANS:
            raise StreamError(f"its JPEG stream has more than {MAX_SCANS} scans")
    if len(header) < 6 or not scans:
        raise StreamError("its JPEG stream has no image")
    rows, columns = int.from_bytes(header[1:3], "big"), int.from_bytes(header[3:5], "big")
    kind = JPEG_LS if process == 0xF7 else JPEG
    return Codestream(kind, rows, columns, header[5], header[0], process, 0, at)


def _jpeg_2000(data: bytes, start: int, stop: int) -> Codestream:
    if data[start : start + 4] != _SOC_SIZ:
        raise StreamError("its JPEG 2000 stream has no header")
    at, siz = start + 2, b""
    while (marker := data[at : at + 2]) != b"\xff\x90":  # SOT, the first tile
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if marker[:1] != b"\xff" or length < 2 or at + 2 + length > stop:
            raise StreamError("its JPEG 2000 stream is damaged or ends early")
        if marker == b"\xff\x51":
            if siz:
                raise StreamError("its JPEG 2000 stream has several headers with a size")
            siz = data[at + 4 : at + 2 + length]
        at += 2 + length
    if len(siz) < 39:
        raise StreamError("the header of its JPEG 2000 stream is too short")
    x1, y1, x0, y0, tile_x, tile_y, tile_x0, tile_y0 = (int.from_bytes(siz[i : i + 4], "big") for i in range(2, 34, 4))
    components = int.from_bytes(siz[34:36], "big")
    if len(siz) != 36 + 3 * components or not tile_x or not tile_y or x0 >= x1 or y0 >= y1:
        raise StreamError("the header of its JPEG 2000 stream contradicts itself")
    if any(step != 1 for i in range(components) for step in siz[37 + 3 * i : 39 + 3 * i]):
        raise StreamError("the components of its JPEG 2000 stream have different sizes")
    tiles = -(-(x1 - tile_x0) // tile_x) * -(-(y1 - tile_y0) // tile_y)
    if not 0 < tiles <= MAX_TILES:
        raise StreamError(f"its JPEG 2000 stream has {tiles} tiles, more than {MAX_TILES}")
    end = _after_tiles(data, at, stop)
    return Codestream(JPEG_2000, y1 - y0, x1 - x0, components, (siz[36] & 0x7F) + 1, 0, start, end)


def _after_tiles(data: bytes, at: int, stop: int) -> int:
    """Return the position after the last tile-part, and after the end marker where there is one."""
    while data[at : at + 2] == b"\xff\x90" and at < stop:
        length = int.from_bytes(data[at + 6 : at + 10], "big")
        if length == 0:  # up to the end marker
            at = data.rfind(b"\xff\xd9", at, stop)
            if at < 0:
                raise StreamError("its JPEG 2000 stream ends early (no end marker)")
        elif length < 14 or at + length > stop:
            raise StreamError("its JPEG 2000 stream ends early")
        else:
            at += length
    return at + 2 if data[at : at + 2] == b"\xff\xd9" else at


def _contiguous_codestream(data: bytes) -> tuple[int, int]:
    """Return where the codestream in the boxes of a JP2 file begins and ends; the boxes are not decoded."""
    at, found = 0, (0, 0)
    while at + 8 <= len(data):
        length, kind, head = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8], 8
        if length == 1:
            length, head = int.from_bytes(data[at + 8 : at + 16], "big"), 16
        stop = len(data) if length == 0 else at + length
        if length and length < head:
            break
        if kind == b"jp2c":
            if found != (0, 0):
                raise StreamError("it holds several JPEG 2000 streams")
            found = (at + head, min(stop, len(data)))
        if stop >= len(data):
            break
        at = stop
    if found == (0, 0):
        raise StreamError("it holds no JPEG 2000 stream")
    return found
