"""Parse, check and decode DICOM files to stored values.

Only the attributes in ``_TAGS`` are parsed, none of which identifies the patient.
"""

from __future__ import annotations

import io
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.encaps import get_frame
from pydicom.filereader import read_file_meta_info
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.utils import as_pixel_options
from pydicom.tag import Tag
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from datamodules.images import gdcm_process
from datamodules.images.grayscale import Values, white_of
from mtmedformer.errors import DataError

MAX_PIXELS = 1 << 26
"""Largest number of pixels of an image; the largest film scans have half as many."""

MAX_BYTES = 8 * MAX_PIXELS
"""Largest size of a file in bytes, also of a deflated DICOM file after inflation."""

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
    "SegmentedBluePaletteColorLookupTableData", "ExtendedOffsetTable", "ExtendedOffsetTableLengths", "PixelData",
)]
# fmt: on

_DECODERS = ("pylibjpeg", "pillow", "pyjpegls", "pydicom")
"""Decoder plugins that raise on damaged streams, in order of preference. GDCM may crash, so it comes last and runs in a
process of its own. For a lossless syntax all give the same bits."""


@contextmanager
def reading(file: Path, kind: str) -> Iterator[None]:
    """Turn any error of a parser or decoder on a damaged or hostile file into a DataError, and suppress warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except DataError:
            raise
        except BaseException as error:
            if not _of_a_decoder(error):
                raise
            raise DataError(
                f"{file.name}: cannot be read as {kind} ({_reason(error)}); the file is damaged, "
                "incomplete or of another kind; copy or export it again."
            ) from error


def _of_a_decoder(error: BaseException) -> bool:
    """Return whether a file caused the error, not an interrupt; a panic of pylibjpeg-rle (Rust) is no Exception."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1].strip(' :')[:160]}" if lines else type(error).__name__


def read_file(file: Path) -> tuple[Dataset, Values, list[str]]:
    """Parse, check and decode a file; the returned header has every attribute that the later steps require."""
    header = _parse(file)
    _check(file, header)
    stored, path = _decode(file, header)
    return header, _stored_bits(header, stored.astype(stored.dtype.newbyteorder("="), copy=False)), path


def _parse(file: Path) -> Dataset:
    source: Any = file
    with file.open("rb") as opened:
        head = opened.read(1024)
    if head[128:132] == b"DICM" and DeflatedExplicitVRLittleEndian.encode() in head:
        source = _inflate(file, read_file_meta_info(file).get("FileMetaInformationGroupLength"))
    return dcmread(source, force=True, specific_tags=_TAGS)


def _inflate(file: Path, group_length: Any) -> io.BytesIO:
    """Return a deflated file inflated; pydicom's own inflation has no limit of size."""
    content = file.read_bytes()
    start = 144 + int(group_length)  # preamble, prefix and the 12-byte group length element itself
    unzip = zlib.decompressobj(-zlib.MAX_WBITS)
    plain = unzip.decompress(content[start:], MAX_BYTES)
    if unzip.unconsumed_tail:
        raise DataError(f"{file.name}: inflates to more than {MAX_BYTES} bytes; this is not a single image.")
    deflated, explicit = (uid.encode() for uid in (DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian))
    return io.BytesIO(content[:start].replace(deflated, explicit.ljust(len(deflated), b"\0"), 1) + plain)


def _check(file: Path, header: Dataset) -> None:
    if "PixelData" not in header:
        raise DataError(
            f"{file.name}: has no PixelData (a report, a header only, or incomplete); leave it out or copy it again."
        )
    missing = [k for k in ("Rows", "Columns", "BitsAllocated", "PhotometricInterpretation") if not header.get(k)]
    if missing:
        raise DataError(f"{file.name}: {', '.join(missing)} missing or empty; export the image again.")
    if (frames := header.get("NumberOfFrames")) and int(frames) != 1:
        raise DataError(f"{file.name}: NumberOfFrames is {int(frames)}; export its frames as single-frame files.")
    if (count := int(header.Rows) * int(header.Columns)) > MAX_PIXELS:
        raise DataError(f"{file.name}: Rows x Columns is {count} pixels, more than {MAX_PIXELS}; downscale the image.")
    header.setdefault("SamplesPerPixel", 1)
    header.setdefault("PixelRepresentation", 0)
    header.setdefault("BitsStored", header.BitsAllocated)


def _decode(file: Path, header: Dataset) -> tuple[Values, list[str]]:
    """Return the stored values, (H, W) or (H, W, 3) as RGB, possibly a read-only view of the file's bytes."""
    syntax = UID(header.file_meta.get("TransferSyntaxUID") or _native(file, header))
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise DataError(
            f"{file.name}: TransferSyntaxUID {syntax.name} is not an image encoding; export uncompressed or JPEG 2000."
        ) from None
    path = [f"decode:{syntax.keyword or syntax}"]
    options: Any = {"correct_unused_bits": False, "view_only": True}  # _stored_bits corrects, and copies, where needed
    if not syntax.is_encapsulated:
        return decoder.as_array(header, index=0, **options)[0], path
    if syntax != RLELossless:
        _check_stream(file, header)
    reasons = []
    for plugin in (p for p in (*_DECODERS, "gdcm") if p in decoder.available_plugins):
        try:
            if syntax == RLELossless and header.SamplesPerPixel == 1:  # as_array would copy once more
                return _view_as_array(header, decoder.as_buffer(header, index=0, decoding_plugin=plugin)[0]), path
            if plugin == "gdcm":
                return gdcm_process.decode(syntax, header.PixelData, as_pixel_options(header)), path
            return decoder.as_array(header, index=0, decoding_plugin=plugin, **options)[0], path
        except BaseException as error:  # each decoder has its own exceptions; the next one may succeed
            if not _of_a_decoder(error):
                raise
            reasons.append(f"{plugin}: {_reason(error)}")
    raise DataError(
        f"{file.name}: TransferSyntaxUID {syntax.name} cannot be decoded "
        f"({'; '.join(reasons) or 'no decoder installed'}); the file is damaged, or needs `gdcmconv --raw` or "
        "`dcmdjpeg` first."
    )


def _view_as_array(header: Dataset, buffer: Any) -> Values:
    kind = "i" if header.PixelRepresentation else "u"
    return np.frombuffer(buffer, f"<{kind}{header.BitsAllocated // 8}").reshape(header.Rows, header.Columns)


def _check_stream(file: Path, header: Dataset) -> None:
    """Compare the size in a JPEG, JPEG-LS or JPEG 2000 stream, by which decoders allocate memory, with the header's."""
    frame = get_frame(header.PixelData, 0, number_of_frames=1)
    size, rows, columns = _coded_size(frame), int(header.Rows), int(header.Columns)
    if size and size != (rows, columns):
        raise DataError(
            f"{file.name}: Rows x Columns is {rows} x {columns} but the compressed image is {size[0]} x {size[1]}; "
            "export it again."
        )
    if frame[:2] == b"\xff\xd8" and b"\xff\xd9" not in frame[-16:]:  # GDCM would fill in the missing rows
        raise DataError(f"{file.name}: PixelData ends before its JPEG stream does; copy or export the file again.")


def _stored_bits(header: Dataset, stored: Values) -> Values:
    """Clear the bits outside BitsStored: overlays in the high bits (retired), or values stored in the upper bits."""
    bits, white = 8 * stored.itemsize, white_of(header)
    low = int(header.get("HighBit") or header.BitsStored - 1) + 1 - int(header.BitsStored)
    low = low if 0 < low <= bits - int(header.BitsStored) else 0
    least, most = (-(white + 1) // 2, white // 2) if header.PixelRepresentation else (0, white)
    if stored.dtype.kind not in "iu" or bits == header.BitsStored:
        return stored
    if stored.min() >= least and stored.max() <= most:
        return stored
    shift = bits - int(header.BitsStored)
    cleared: Values = (stored << (shift - low)) >> shift
    return cleared


def _native(file: Path, header: Dataset) -> str:
    """Return the syntax of a file without meta information, which only uncompressed data may lack."""
    if header["PixelData"].is_undefined_length:
        raise DataError(f"{file.name}: TransferSyntaxUID missing, its pixels are compressed; export the image again.")
    return ImplicitVRLittleEndian if header.original_encoding[0] else ExplicitVRLittleEndian


def _coded_size(frame: bytes) -> tuple[int, int] | None:
    """Return (rows, columns) in the header of a JPEG, JPEG-LS or JPEG 2000 stream."""
    start = frame.find(b"\xff\x4f\xff\x51", 0, 4096)
    if start >= 0:
        x1, y1, x0, y0 = (int.from_bytes(frame[i : i + 4], "big") for i in range(start + 8, start + 24, 4))
        return y1 - y0, x1 - x0
    at = 2
    while frame[:2] == b"\xff\xd8" and at + 9 <= len(frame) and frame[at] == 0xFF:
        marker = frame[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            return int.from_bytes(frame[at + 5 : at + 7], "big"), int.from_bytes(frame[at + 7 : at + 9], "big")
        at += 2 + int.from_bytes(frame[at + 2 : at + 4], "big")
    return None
