"""Check and decode DICOM images to stored values.

Header and data must agree before anything is decoded. Where they contradict each other and the data decide, the header
is corrected and the step ``corrected:<attribute>`` records it; otherwise the image is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset
from pydicom.pixels.decoders.base import Decoder, get_decoder
from pydicom.pixels.utils import as_pixel_options, get_expected_length
from pydicom.uid import (
    JPEG2000,
    UID,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from datamodules.images import decoding_process
from datamodules.images.codestreams import JPEG, JPEG_2000, JPEG_LS, Codestream, StreamError, read_codestream
from datamodules.images.dicom_parsing import MAX_PIXELS, check_palettes, of_a_decoder, parse
from datamodules.images.encapsulation import encapsulated, fragments, one_frame
from datamodules.images.frames import FIX, check_number, declared_frames, keep_frame, split_frames
from datamodules.images.grayscale import Values, number_of
from datamodules.images.stored_values import image_bits
from mtmedformer.errors import DataError

_DECODERS = ("pylibjpeg", "pillow", "pyjpegls", "pydicom", "gdcm")
"""Decoder plugins in order of preference. GDCM may crash on a damaged stream, so it comes last. For a lossless syntax
all give the same bits."""

_SAMPLES = {"MONOCHROME1": 1, "MONOCHROME2": 1, "PALETTE COLOR": 1} | dict.fromkeys(
    ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT"), 3
)


def read_file(file: Path, frame: int | None = None) -> tuple[Dataset, Values, list[str]]:
    """Parse, check and decode a file; the returned header has every attribute that the later steps require.

    Args:
        file: The file.
        frame: The frame of a multi-frame image, from 1; ``None`` for the only one.
    """
    header, mended = parse(file, frame or 1)
    _check(file, header)
    stored, path = _decode(file, header, frame)
    path += mended
    return header, image_bits(header, stored.astype(stored.dtype.newbyteorder("="), copy=False), path), path


def _check(file: Path, header: Dataset) -> None:
    """Refuse an image whose attributes cannot be used, and complete those that have a default."""
    if "PixelData" not in header:
        raise DataError(
            f"{file.name}: has no PixelData (a report, a header only, or incomplete); leave it out or copy it again."
        )
    missing = [k for k in ("Rows", "Columns", "BitsAllocated", "PhotometricInterpretation") if not header.get(k)]
    if missing:
        raise DataError(f"{file.name}: {', '.join(missing)} missing or empty; export the image again.")
    if (count := int(header.Rows) * int(header.Columns)) > MAX_PIXELS:
        raise DataError(f"{file.name}: Rows x Columns is {count} pixels, more than {MAX_PIXELS}; downscale the image.")
    for key, default in (("SamplesPerPixel", 1), ("PixelRepresentation", 0), ("BitsStored", header.BitsAllocated)):
        if header.get(key) is None or (key != "PixelRepresentation" and header.get(key) == 0):
            setattr(header, key, default)
    if header.SamplesPerPixel not in (1, 3):
        raise DataError(
            f"{file.name}: SamplesPerPixel is {header.SamplesPerPixel}; only images of 1 or 3 samples are read, export "
            "it as MONOCHROME2 or RGB."
        )
    check_palettes(header)


def _decode(file: Path, header: Dataset, frame: int | None) -> tuple[Values, list[str]]:
    """Return the stored values, (H, W) or (H, W, 3) as RGB, possibly a read-only view of the file's bytes."""
    syntax, path = _syntax(header)
    if syntax is not None:
        decoder = _decoder(syntax)
        if not syntax.is_encapsulated:
            if frame is not None:
                keep_frame(header, frame)
            path = [f"decode:{syntax.keyword}", *path, *_check_length(header)]
            header.file_meta.TransferSyntaxUID = syntax
            options: Any = {"correct_unused_bits": False, "view_only": True}  # image_bits corrects them
            return decoder.as_array(header, index=0, **options)[0], path
    return _decode_stream(file, header, syntax, path, frame)


def _syntax(header: Dataset) -> tuple[UID | None, list[str]]:
    """Return the transfer syntax by the meta information and the form of PixelData; ``None``: the stream decides."""
    given = header.file_meta.get("TransferSyntaxUID")
    syntax = UID(given) if given else None
    implicit, little = header.original_encoding
    native = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian
    if header["PixelData"].is_undefined_length:  # only compressed data may be (PS3.5 A.4)
        uncompressed = syntax is not None and syntax.is_transfer_syntax and not syntax.is_encapsulated
        return (None if uncompressed else syntax), []
    if syntax is None:
        return native, []
    _decoder(syntax)
    if syntax.is_encapsulated and 0 <= len(header.PixelData) - get_expected_length(header) <= 1:
        return native, ["corrected:TransferSyntaxUID"]
    return syntax, []


def _decoder(syntax: UID) -> Decoder:
    try:
        return get_decoder(syntax)
    except NotImplementedError:
        raise StreamError(
            f"TransferSyntaxUID {syntax.name} is not an image encoding", "export uncompressed or JPEG 2000"
        ) from None


def _check_length(header: Dataset) -> list[str]:
    """Compare the length of uncompressed pixel data with the header.

    Bytes after the image must be padding (see ``_is_padding``); else it would be cut or sheared.
    """
    length, frames, steps = len(header.PixelData), number_of(header, "NumberOfFrames") or 1, []
    header.NumberOfFrames = 1
    samples = _SAMPLES.get(str(header.PhotometricInterpretation), header.SamplesPerPixel)
    if samples != header.SamplesPerPixel:
        given, header.SamplesPerPixel = header.SamplesPerPixel, samples
        if not 0 <= length - get_expected_length(header) <= 1:
            raise StreamError(f"SamplesPerPixel is {given}, but the image is {header.PhotometricInterpretation}")
        steps.append("corrected:SamplesPerPixel")
    if header.SamplesPerPixel == 3:
        header.setdefault("PlanarConfiguration", 0)
    expected = get_expected_length(header)
    excess = length - expected
    size = f"{header.Rows} x {header.Columns}"
    if frames > 1 and not 0 <= excess <= 1:
        raise StreamError(f"NumberOfFrames is {frames:g}", FIX)
    if frames > 1:
        steps.append("corrected:NumberOfFrames")
    if excess < 0:
        raise StreamError(
            f"the pixel data are {length} bytes, but Rows x Columns ({size}, BitsAllocated {header.BitsAllocated}) "
            f"needs {expected}",
            "the file is damaged, incomplete or its header is wrong; export or copy the image again",
        )
    if excess > 1 and not _is_padding(header, expected):
        raise StreamError(
            f"the pixel data are {length} bytes, but Rows x Columns ({size}, BitsAllocated {header.BitsAllocated}) "
            f"needs {expected}",
            "the header is wrong, and the image would be cut or sheared; export the image again",
        )
    return steps


def _is_padding(header: Dataset, expected: int) -> bool:
    """Return whether the bytes after an uncompressed image are padding: zeros that no other size explains.

    Less than two rows of zeros may be padding although another number of rows or columns explains them; another number
    of columns then makes neighbouring rows less alike.
    """
    content, rows, columns = header.PixelData, int(header.Rows), int(header.Columns)
    excess, row, column = len(content) - expected, expected // rows, expected // columns
    if any(content[expected:]) or (excess % row == 0 and excess >= 2 * row):
        return False
    if excess % column or row % columns:
        return True
    given, other = (
        np.frombuffer(content, np.uint8, rows * width).reshape(rows, -1, row // columns)[..., -1].astype(int)
        for width in (row, row + excess // rows)
    )
    return excess < row + column and bool(_steps(given) <= _steps(other))


def _steps(values: Values) -> float:
    """Return the mean difference between neighbouring rows."""
    return float(np.abs(np.diff(values, axis=0)).mean()) if len(values) > 1 else 0.0


def _decode_stream(
    file: Path, header: Dataset, syntax: UID | None, path: list[str], number: int | None
) -> tuple[Values, list[str]]:
    """Decode compressed pixel data of one frame, whose headers are checked first."""
    pieces = fragments(header.PixelData)
    if number is not None:
        frames = split_frames(pieces, declared_frames(header))
        check_number(number, len(frames))
        pieces = frames[number - 1]
    elif declared_frames(header) > 1 and len(pieces) > 1:
        raise StreamError(f"NumberOfFrames is {declared_frames(header)}", FIX)
    elif declared_frames(header) > 1:
        path.append("corrected:NumberOfFrames")
    header.NumberOfFrames = 1
    frame = one_frame(pieces)
    if syntax != RLELossless:
        coded = read_codestream(frame)
        if coded is None:
            name = "missing" if syntax is None else syntax.name
            raise StreamError(f"TransferSyntaxUID is {name}, but the pixel data do not begin as a compressed image")
        path += _check_stream(header, coded)
        if syntax is None or _kind(syntax) != coded.kind:
            syntax, path = _syntax_of(coded), [*path, "corrected:TransferSyntaxUID"]
        frame = frame[coded.start : coded.end]
    header.PixelData = encapsulated(frame)
    if header.SamplesPerPixel == 3:
        header.setdefault("PlanarConfiguration", 0)
    path.insert(0, f"decode:{syntax.keyword or syntax}")
    plugins = [p for p in _DECODERS if p in _decoder(syntax).available_plugins]
    if syntax == RLELossless and header.SamplesPerPixel == 1 and plugins[:1] == ["pylibjpeg"]:
        try:  # in this process, since it writes no more than the image; as_array would copy once more
            buffer, _ = get_decoder(syntax).as_buffer(header, index=0, decoding_plugin="pylibjpeg")
            return _view_as_array(header, buffer), path
        except BaseException as error:
            if not of_a_decoder(error):
                raise
            plugins.remove("pylibjpeg")
    try:
        return decoding_process.decode_dicom(syntax, header.PixelData, as_pixel_options(header), plugins), path
    except RuntimeError as error:
        raise DataError(
            f"{file.name}: TransferSyntaxUID {syntax.name} cannot be decoded "
            f"({str(error) or 'no decoder installed'}); the file is damaged, or needs `gdcmconv --raw` or `dcmdjpeg` "
            "first."
        ) from error


def _view_as_array(header: Dataset, buffer: Any) -> Values:
    kind = "i" if header.PixelRepresentation else "u"
    return np.frombuffer(buffer, f"<{kind}{header.BitsAllocated // 8}").reshape(header.Rows, header.Columns)


def _check_stream(header: Dataset, coded: Codestream) -> list[str]:
    """Compare the headers of a stream, by which decoders allocate memory, with those of the file."""
    rows, columns, steps = int(header.Rows), int(header.Columns), []
    if (coded.rows, coded.columns) != (rows, columns):
        raise StreamError(
            f"Rows x Columns is {rows} x {columns} but the compressed image is {coded.rows} x {coded.columns}"
        )
    samples = _SAMPLES.get(str(header.PhotometricInterpretation), header.SamplesPerPixel)
    if coded.components != header.SamplesPerPixel and coded.components == samples:
        header.SamplesPerPixel = samples
        steps.append("corrected:SamplesPerPixel")
    if coded.components != header.SamplesPerPixel or samples != header.SamplesPerPixel:
        raise StreamError(
            f"SamplesPerPixel is {header.SamplesPerPixel} ({header.PhotometricInterpretation}) but the compressed "
            f"image has {coded.components} components"
        )
    if coded.process in (0xC0, 0xC1, 0xC2) and coded.precision not in (8, 12):
        raise StreamError(f"its lossy JPEG stream has {coded.precision} bits per sample, where JPEG has 8 or 12")
    if coded.precision > header.BitsAllocated:
        raise StreamError(
            f"BitsAllocated is {header.BitsAllocated} but the compressed image has {coded.precision} bits per sample"
        )
    return steps


def _kind(syntax: UID) -> str:
    number = str(syntax).removeprefix("1.2.840.10008.1.2.4.")
    return JPEG_2000 if number.startswith(("9", "20")) else JPEG_LS if number.startswith("8") else JPEG


def _syntax_of(coded: Codestream) -> UID:
    """Return a transfer syntax with which the stream is decoded."""
    if coded.kind == JPEG:
        return {0xC0: JPEGBaseline8Bit, 0xC3: JPEGLosslessSV1}.get(coded.process, JPEGExtended12Bit)
    return JPEGLSLossless if coded.kind == JPEG_LS else JPEG2000
