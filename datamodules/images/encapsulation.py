"""The compressed frame of a single-frame DICOM image, put together from its fragments.

The offset table is not used: a single frame is all fragments in their order. Real files have tables that point
elsewhere, no table, no delimiter at the end, or padding after the stream.
"""

from __future__ import annotations

from pydicom.encaps import encapsulate

from datamodules.images.codestreams import StreamError

_ITEM, _DELIMITER = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"

SEQUENCE_DELIMITER = _DELIMITER + bytes(4)
"""Ends encapsulated pixel data."""


def fragments(pixel_data: bytes) -> list[bytes]:
    """Return the fragments of encapsulated pixel data, without the offset table.

    Raises:
        StreamError: A fragment is incomplete, or there is none.
    """
    found, at = [], 0
    while at + 8 <= len(pixel_data) and pixel_data[at : at + 4] == _ITEM:
        length = int.from_bytes(pixel_data[at + 4 : at + 8], "little")
        if at + 8 + length > len(pixel_data):
            missing = at + 8 + length - len(pixel_data)
            raise StreamError(f"PixelData is incomplete, its last fragment lacks {missing} of {length} bytes")
        found.append(pixel_data[at + 8 : at + 8 + length])
        at += 8 + length
    rest = pixel_data[at:]
    if rest.strip(b"\0") and rest[:4] != _DELIMITER:
        raise StreamError("PixelData is damaged between its fragments")
    if len(found) > 1 and not is_stream(found[0]):  # the offset table, which some writers omit
        del found[0]
    if not any(found):
        raise StreamError("PixelData holds no compressed image")
    return found


def one_frame(pieces: list[bytes]) -> bytes:
    """Join the fragments of one frame.

    Raises:
        StreamError: They are several frames.
    """
    streams = sum(is_stream(piece) for piece in pieces)
    if streams > 1:
        raise StreamError(f"PixelData holds {streams} compressed frames, but NumberOfFrames is 1")
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def encapsulated(frame: bytes) -> bytes:
    """Return one frame as the value of PixelData."""
    return encapsulate([frame], has_bot=False)


def is_stream(piece: bytes) -> bool:
    """Return whether a fragment begins as a JPEG, JPEG-LS or JPEG 2000 image does."""
    return piece[:3] == b"\xff\xd8\xff" or piece[:4] in (b"\xff\x4f\xff\x51", b"\0\0\0\x0c")
