"""Frames of multi-frame DICOM files: their names ``file#frame``, their number, and the pixel data of one of them."""

from __future__ import annotations

import os
import re
from pathlib import Path

from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.pixels.utils import get_expected_length

from datamodules.images.codestreams import StreamError
from datamodules.images.dicom_parsing import is_dicom, parse, reading
from datamodules.images.encapsulation import fragments, is_stream
from datamodules.images.grayscale import number_of
from mtmedformer.errors import DataError

FIX = "name one frame, as in image.dcm#1, or export its frames as single-frame files"

_NAME = re.compile(r"(.+)#(\d{1,6})")


def named_frame(path: Path) -> tuple[Path, int | None]:
    """Split ``file#frame`` into the file and the number of the frame, from 1; a file of the whole name goes first."""
    found = _NAME.fullmatch(path.name)
    if found is None or os.path.isfile(path):
        return path, None
    return path.with_name(found[1]), int(found[2])


def frame_count(file: Path) -> int:
    """Return the number of images in a file: of frames where it is multi-frame DICOM, else 1.

    The pixel data decide: an image called multi-frame that has one frame counts as one, and so does a file that cannot
    be read; reading it gives the reason.
    """
    try:
        with file.open("rb") as opened:
            if not is_dicom(opened.read(132)):
                return 1
        with reading(file, "DICOM"):
            declared = dcmread(file, force=True, stop_before_pixels=True, specific_tags=["NumberOfFrames"])
            if declared_frames(declared) < 2:
                return 1
            header, _ = parse(file)
            if header["PixelData"].is_undefined_length:
                return len(split_frames(fragments(header.PixelData), declared_frames(header)))
            whole, one = len(header.PixelData), frame_length(header)
            return declared_frames(header) if whole >= declared_frames(header) * one > 0 else 1
    except (DataError, OSError):
        return 1


def declared_frames(header: Dataset) -> int:
    """Return NumberOfFrames, 1 where it is missing."""
    return max(1, int(number_of(header, "NumberOfFrames") or 1))


def frame_length(header: Dataset) -> int:
    """Return the length in bytes of one uncompressed frame; 0 where frames do not begin with a byte."""
    single = Dataset()
    for key in ("Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "PhotometricInterpretation"):
        setattr(single, key, header.get(key) or 1)
    single.NumberOfFrames = 1
    bits = single.Rows * single.Columns * single.SamplesPerPixel * single.BitsAllocated
    return get_expected_length(single) if bits % 8 == 0 else 0


def keep_frame(header: Dataset, frame: int) -> None:
    """Reduce uncompressed pixel data to one frame.

    Raises:
        StreamError: There is no such frame, or the pixel data do not have the length of their frames.
    """
    count, length = declared_frames(header), frame_length(header)
    check_number(frame, count)
    if length == 0:
        raise StreamError(f"NumberOfFrames is {count}, and its frames do not begin with a byte", FIX)
    excess = len(header.PixelData) - count * length
    if excess < 0 or excess >= length or any(header.PixelData[count * length :]):
        raise StreamError(
            f"the pixel data are {len(header.PixelData)} bytes, but {count} frames of {length} bytes need "
            f"{count * length}",
            "the file is damaged, incomplete or its header is wrong; export or copy the image again",
        )
    header.PixelData = header.PixelData[(frame - 1) * length : frame * length]
    header.NumberOfFrames = 1


def split_frames(pieces: list[bytes], count: int) -> list[list[bytes]]:
    """Return the fragments of each frame of compressed pixel data; all of them as one where ``count`` is 1.

    Raises:
        StreamError: The fragments are not those of so many frames.
    """
    if count == 1 or len(pieces) == 1:
        return [pieces]
    if len(pieces) == count:
        return [[piece] for piece in pieces]
    starts = [place for place, piece in enumerate(pieces) if is_stream(piece)]
    if len(starts) != count or starts[0] != 0:
        raise StreamError(f"NumberOfFrames is {count}, but the pixel data hold {len(starts)} compressed frames")
    return [pieces[start:end] for start, end in zip(starts, [*starts[1:], len(pieces)], strict=True)]


def check_number(frame: int, count: int) -> None:
    """Refuse a frame that the file does not have.

    Raises:
        StreamError: There is no such frame.
    """
    if not 1 <= frame <= count:
        raise StreamError(f"has no frame {frame}", f"its frames are #1 to #{count}" if count > 1 else "it is one image")
