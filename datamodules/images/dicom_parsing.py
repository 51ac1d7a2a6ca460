"""Parse DICOM files: the attributes that pixels need, none of which identifies the patient.

Complete images in files with a damaged or missing envelope are read: without preamble or meta information, with bytes
after the pixel data, without the delimiter of compressed pixel data, deflated without a group length.
"""

from __future__ import annotations

import io
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset
from pydicom.filereader import read_partial
from pydicom.tag import Tag
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian

from datamodules.images.codestreams import StreamError
from datamodules.images.encapsulation import SEQUENCE_DELIMITER
from mtmedformer.errors import DataError

MAX_PIXELS = 1 << 26
"""Largest number of pixels of an image; the largest film scans have half as many."""

MAX_BYTES = 8 * MAX_PIXELS
"""Largest size of a file in bytes, also of a deflated DICOM file after inflation."""

MAX_BYTES_OF_FRAMES = 1 << 32
"""Largest size in bytes of a file of which one frame is read."""

PALETTE_ENTRIES = 1 << 16
"""Largest number of entries of a palette."""

_PIXEL_DATA = Tag("PixelData")
_GROUPS = ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence")

# fmt: off
_TAGS = [Tag(k) for k in (
    "SOPClassUID", "Modality", "PresentationIntentType", "ViewPosition", "ViewCodeSequence", "PatientOrientation",
    "ImageLaterality", "Laterality", "PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "Rows",
    "Columns", "SamplesPerPixel", "PlanarConfiguration", "NumberOfFrames", "PhotometricInterpretation",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit",
    "ModalityLUTSequence", "RescaleSlope", "RescaleIntercept", "VOILUTSequence", "WindowCenter", "WindowWidth",
    "VOILUTFunction", "PresentationLUTShape", "RedPaletteColorLookupTableDescriptor",
    "GreenPaletteColorLookupTableDescriptor", "BluePaletteColorLookupTableDescriptor",
    "RedPaletteColorLookupTableData", "GreenPaletteColorLookupTableData", "BluePaletteColorLookupTableData",
    "SegmentedRedPaletteColorLookupTableData", "SegmentedGreenPaletteColorLookupTableData",
    "SegmentedBluePaletteColorLookupTableData", "PixelData", *_GROUPS,
)] + [Tag(group, 0x0102) for group in range(0x6000, 0x6020, 2)]  # OverlayBitPosition
# fmt: on

_MACROS = {
    "FrameVOILUTSequence": ("WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence"),
    "PixelMeasuresSequence": ("PixelSpacing",),
    "PixelValueTransformationSequence": ("RescaleSlope", "RescaleIntercept"),
    "FramePixelDataPropertiesSequence": ("ImagerPixelSpacing",),
    "FrameAnatomySequence": ("FrameLaterality",),
}
"""Functional group macros of enhanced objects with the attributes that other objects have at the top level."""


@contextmanager
def reading(file: Path, kind: str) -> Iterator[None]:
    """Turn any error of a parser or decoder on a damaged or hostile file into a DataError, and suppress warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except DataError:
            raise
        except StreamError as error:
            raise DataError(f"{file.name}: {error}") from error
        except BaseException as error:
            if not of_a_decoder(error):
                raise
            raise DataError(
                f"{file.name}: cannot be read as {kind} ({reason(error)}); the file is damaged, "
                "incomplete or of another kind; copy or export it again."
            ) from error


def of_a_decoder(error: BaseException) -> bool:
    """Return whether a file caused the error, not an interrupt; a panic of pylibjpeg-rle (Rust) is no Exception."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def reason(error: BaseException) -> str:
    """Return class and last line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1].strip(' :')[:160]}" if lines else type(error).__name__


def is_dicom(head: bytes) -> bool:
    """Return whether a file's first 132 bytes are DICOM: ``DICM`` at its place, or an element of group 2 or 8."""
    little = head[:2] in (b"\2\0", b"\10\0") and head[3:4] == b"\0"
    big = head[:3] == b"\0\10\0" and head[4:6].isalpha() and head[4:6].isupper()
    return head[128:132] == b"DICM" or head[:4] == b"DICM" or little or big


def parse(file: Path, frame: int = 1) -> tuple[Dataset, list[str]]:
    """Read the attributes of an image, those of the functional groups of a frame included.

    Returns:
        The attributes, and the steps of ``Pixels.path`` about what was mended.
    """
    with file.open("rb") as opened:
        head = opened.read(1024)
        if head[:4] == b"DICM":  # the preamble was cut off
            header = _read(io.BytesIO(bytes(128) + head + opened.read()))
        elif head[128:132] == b"DICM" and DeflatedExplicitVRLittleEndian.encode() in head:
            header = _read(_inflate(file, head + opened.read()))
        else:
            opened.seek(0)
            header = _read(opened)
            if "PixelData" not in header and (complete := _without_delimiter(opened)):
                return complete, ["corrected:delimiter", *_flatten(complete, frame)]
    return header, _flatten(header, frame)


def _read(source: Any) -> Dataset:
    return read_partial(source, stop_when=_after_pixels(), force=True, specific_tags=list(_TAGS))


def _after_pixels() -> Callable[..., bool]:
    """Return a condition that ends the parsing after PixelData: what follows may be anything."""
    seen = False

    def stop(tag: Any, vr: str | None, length: int) -> bool:
        nonlocal seen
        before, seen = seen, seen or tag == _PIXEL_DATA
        return before

    return stop


def _without_delimiter(opened: Any) -> Dataset | None:
    """Read a file again with the delimiter that its compressed pixel data lack, where that is what is wrong."""
    opened.seek(0)
    content = opened.read(MAX_BYTES)
    if b"\xe0\x7f\x10\x00" not in content:
        return None
    header = _read(io.BytesIO(content + SEQUENCE_DELIMITER))
    return header if "PixelData" in header and header["PixelData"].is_undefined_length else None


def _inflate(file: Path, content: bytes) -> io.BytesIO:
    """Return a deflated file inflated; pydicom's own inflation has no limit of size."""
    start = _end_of_meta(content)
    for window in (-zlib.MAX_WBITS, zlib.MAX_WBITS):  # some writers add the header of zlib
        unzip = zlib.decompressobj(window)
        try:
            plain = unzip.decompress(content[start:], MAX_BYTES)
        except zlib.error as error:
            problem = error
            continue
        if unzip.unconsumed_tail:
            raise DataError(f"{file.name}: inflates to more than {MAX_BYTES} bytes; this is not a single image.")
        deflated, explicit = (uid.encode() for uid in (DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian))
        return io.BytesIO(content[:start].replace(deflated, explicit.ljust(len(deflated), b"\0"), 1) + plain)
    raise problem


def _end_of_meta(content: bytes) -> int:
    """Return where the data set begins; the group length of the meta information may be missing or wrong."""
    at = 132
    while content[at : at + 2] == b"\2\0" and content[at + 4 : at + 6].isalpha():
        long = content[at + 4 : at + 6] in (b"OB", b"OW", b"UN", b"SQ", b"UT", b"UC", b"UR")
        length = content[at + 8 : at + 12] if long else content[at + 6 : at + 8]
        at += (12 if long else 8) + int.from_bytes(length, "little")
    return at


def _flatten(header: Dataset, frame: int) -> list[str]:
    """Put the attributes of a frame's functional groups at the top level, and the groups away.

    Those of the frame itself go before those of all frames (PS3.3 C.7.6.16).

    Returns:
        A step for each group that is damaged; what it holds is not used.
    """
    found: dict[str, Any] = {}
    steps = []
    for name in (n for n in _GROUPS if n in header):
        try:
            group = header[name].value[frame - 1 if name.startswith("PerFrame") else 0]
            macros = {sequence: group[sequence].value[0] for sequence in _MACROS if group.get(sequence)}
            for sequence, macro in macros.items():
                for key in _MACROS[sequence]:
                    if key in macro:
                        found.setdefault(key, macro[key])
        except Exception:  # a damaged sequence may raise anything in the parser
            steps.append(f"{name}:broken")
        del header[name]
    for element in found.values():
        header[element.tag] = element
    return steps


def check_palettes(header: Dataset) -> None:
    """Refuse segmented palettes that expand to more entries than a palette has (PS3.3 C.7.9.2)."""
    for colour in ("Red", "Green", "Blue"):
        data = header.get(f"Segmented{colour}PaletteColorLookupTableData")
        descriptor = header.get(f"{colour}PaletteColorLookupTableDescriptor")
        if not isinstance(data, bytes) or not descriptor:
            continue
        words = "u1" if int(descriptor[2]) == 8 else "<u2" if header.original_encoding[1] else ">u2"
        if _entries(np.frombuffer(data[: len(data) // 2 * 2], words).tolist()) > PALETTE_ENTRIES:
            raise StreamError("its segmented palette is longer than a palette can be")


def _entries(words: list[int]) -> int:
    """Return an upper bound of the number of entries that segments expand to."""
    at, total, longest, indirect = 0, 0, 0, 0
    while at + 1 < len(words) and total <= PALETTE_ENTRIES:
        kind, length = words[at], words[at + 1]
        if kind == 2:
            indirect += length
            at += 4
            continue
        total, longest = total + length, max(longest, length)
        at += 2 + length if kind == 0 else 3
    return total + indirect * longest
