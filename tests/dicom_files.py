"""Synthetic DICOM files for tests: any pixels, any attributes, any transfer syntax that pydicom can write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    generate_uid,
)

NATIVE = (ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)


def film(rows: int = 40, columns: int = 32, bits: int = 12, signed: bool = False, seed: int = 0) -> np.ndarray:
    """Return a smooth, slightly noisy picture that uses the whole range of its bits."""
    y, x = np.mgrid[0 : 1 : rows * 1j, 0 : 1 : columns * 1j]
    level = np.exp(-8 * ((x - 0.4) ** 2 + (y - 0.6) ** 2)) + 0.05 * np.random.default_rng(seed).random((rows, columns))
    level = (level - level.min()) / (level.max() - level.min())
    values = np.rint(level * ((1 << bits) - 1)).astype(np.int64) - ((1 << bits - 1) if signed else 0)
    return values.astype(f"{'i' if signed else 'u'}{1 if bits <= 8 else 2 if bits <= 16 else 4}")


def lut_item(first: int, levels: Any, bits: int = 16, as_bytes: bool = False) -> Dataset:
    """Return an item of a modality or VOI LUT sequence; ``as_bytes`` writes its data as OW instead of US."""
    item = Dataset()
    item.add_new("LUTDescriptor", "SS" if first < 0 else "US", [len(levels), first, bits])
    if as_bytes:
        item.add_new("LUTData", "OW", np.asarray(levels, "<u2").tobytes())
    else:
        item.add_new("LUTData", "US", [int(v) for v in levels])
    return item


def write_dicom(
    file: Path,
    pixels: np.ndarray,
    syntax: str = ExplicitVRLittleEndian,
    *,
    bits: int | None = None,
    preamble: bool = True,
    **attributes: Any,
) -> Path:
    """Write an image of (H, W), or (H, W, 3) for colour, as DICOM.

    Args:
        file: Where to.
        pixels: Stored values, 8-, 16- or 32-bit integers.
        syntax: Transfer syntax; compressed ones are encoded by pydicom's plugins.
        bits: BitsStored; default all bits of the array.
        preamble: Whether the file starts with the 128 bytes, ``DICM`` and the meta information.
        **attributes: Further attributes by keyword; ``None`` deletes one.
    """
    allocated = 8 * pixels.itemsize
    image = Dataset()
    image.SOPClassUID, image.SOPInstanceUID = ComputedRadiographyImageStorage, generate_uid(entropy_srcs=[file.name])
    image.Modality, image.PatientName, image.PatientID = "CR", "Secret^Patient", "SECRET-ID"
    image.Rows, image.Columns = pixels.shape[:2]
    image.SamplesPerPixel = 1 if pixels.ndim == 2 else 3
    image.PhotometricInterpretation = "MONOCHROME2" if pixels.ndim == 2 else "RGB"
    if pixels.ndim == 3:
        image.PlanarConfiguration = 0
    image.BitsAllocated, image.BitsStored = allocated, bits or allocated
    image.HighBit, image.PixelRepresentation = image.BitsStored - 1, int(pixels.dtype.kind == "i")
    big, native = syntax == ExplicitVRBigEndian, syntax in NATIVE
    content = pixels.astype(pixels.dtype.newbyteorder(">" if big else "<")).tobytes()
    image.add_new("PixelData", "OW" if allocated > 8 else "OB", content + b"\0" * (len(content) % 2))
    for key, value in attributes.items():
        if value is None:
            delattr(image, key)
        else:
            setattr(image, key, value)
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = syntax if native else ExplicitVRLittleEndian
    if not native:
        image.compress(syntax, generate_instance_uid=False)
    implicit = syntax == ImplicitVRLittleEndian
    if preamble:
        image.save_as(file, enforce_file_format=True, implicit_vr=implicit, little_endian=not big)
    else:
        del image.file_meta
        image.save_as(file, implicit_vr=implicit, little_endian=not big)
    return file
