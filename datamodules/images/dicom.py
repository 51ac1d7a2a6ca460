"""DICOM images as displayed, with pixel spacing, view and side from the header."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_color_lut

from datamodules.images.dicom_decoding import read_file
from datamodules.images.dicom_parsing import reading
from datamodules.images.grayscale import Values, apply_chain, display_chain, number_of
from mtmedformer.errors import DataError

_VIEWS = {
    code: view
    for view, codes in {
        "CC": "399162004 R-10242",
        "MLO": "399368009 R-10226",
        "ML": "399260004 R-10224",
        "LM": "399352003 R-10228",
        "LMO": "399099002 R-10230",
        "FB": "399196006 R-10244",
        "XCCL": "399192008 R-1024A",
        "XCCM": "399101009 R-1024B",
        "SIO": "399188001 R-102D0",
        "PA": "272479007 R-40888",
        "AP": "399348003 R-10206",
    }.items()
    for code in codes.split()
}
"""SNOMED CT and SNOMED RT codes of PS3.16 CID 4014 (mammography) and CID 4010 (projection radiography)."""

SMALLEST_MM, LARGEST_MM = 0.001, 20.0
"""Pixel spacings outside this range in mm are not used; detectors have 0.05 to 0.2, scintigraphy about 5."""


_LOSSY = ("JPEGBaseline8Bit", "JPEGExtended12Bit", "JPEGLSNearLossless", "JPEG2000", "JPEG2000MC", "HTJ2K")
"""Transfer syntaxes whose compression may change values."""


@dataclass(frozen=True, eq=False)
class Pixels:
    """An image as displayed, and the steps that produced it.

    Attributes:
        pixels: float32 (H, W), or (H, W, 3) in red, green and blue, in [0, 1]; 0 is black (air in a radiograph), 1 is
            white.
        bits: Bit depth of the stored values (8, 12, 16 …).
        path: The steps in order, for example ``("decode:JPEG2000Lossless", "window:0:LINEAR",
            "invert:MONOCHROME1", "padding")``. A step that could not be applied ends in ``:broken`` or ``:outside``.
        spacing: ``(row, column)`` spacing of the pixels in mm, or ``None``.
        view: ``PA``, ``AP``, ``CC``, ``MLO`` …, or ``None``.
        laterality: Side, ``L`` or ``R``, or ``None``.
    """

    pixels: NDArray[np.float32]
    bits: int
    path: tuple[str, ...]
    spacing: tuple[float, float] | None = None
    view: str | None = None
    laterality: str | None = None


def read_display(file: Path, colour: bool = False, frame: int | None = None) -> Pixels:
    """Read a DICOM image as displayed (modality LUT, VOI LUT or window, inversion, padding; palette, YBR to RGB).

    Args:
        file: A DICOM file. An image whose Presentation Intent Type is FOR PROCESSING (raw detector data)
            is read too; ``path`` then contains ``for-processing``.
        colour: Return colour images as (H, W, 3); otherwise they are an error.
        frame: The frame of a multi-frame image, from 1; ``None`` for the only one.

    Raises:
        DataError: The file is damaged, no image, has several frames or not this one, or no decoder is installed.
    """
    with reading(file, "DICOM"):
        header, stored, path = read_file(file, frame)
        if str(header.get("PresentationIntentType")).strip().upper() == "FOR PROCESSING":
            path.append("for-processing")
        if header.PhotometricInterpretation == "PALETTE COLOR":
            stored = _palette_colours(header, stored)
        if stored.ndim == 3 and colour and _spread(stored) > _slight(stored):
            path.append("colour")
        elif stored.ndim == 3:
            stored = _gray(file, stored)
            path.append("equal-channels")
        pixels = apply_chain(display_chain(header, stored, path), stored)
        return Pixels(pixels, int(header.BitsStored), tuple(path), _spacing(header), _view(header), _laterality(header))


def read_stored(file: Path) -> tuple[Values, bool]:
    """Read the stored integers (H, W) of a DICOM image, without rescale, window, palette or inversion.

    Returns:
        The integers, and whether the encoding of the file may have changed them.

    Raises:
        DataError: As ``read_display``.
    """
    with reading(file, "DICOM"):
        _, stored, path = read_file(file)
        return _gray(file, stored) if stored.ndim == 3 else stored.copy(), path[0].removeprefix("decode:") in _LOSSY


def _palette_colours(header: Dataset, stored: Values) -> Values:
    """Return the colours (H, W, 3) of palette indices, as uint8 or uint16 with the largest value as white.

    pydicom does not swap the words of big-endian palettes, and takes entries of 8 bits in words of 16 for deep ones.
    """
    names = [f"{colour}PaletteColorLookupTable" for colour in ("Red", "Green", "Blue")]
    words = [header.get(f"{name}Data") for name in names]
    if header.original_encoding[1] is False:
        for name, data in zip(names, words, strict=True):
            if isinstance(data, bytes):
                header[f"{name}Data"].value = np.frombuffer(data[: len(data) // 2 * 2], "<u2").byteswap().tobytes()
    colours: Values = apply_color_lut(stored, header)
    if colours.dtype == np.uint16:
        tables = [np.frombuffer(header[f"{name}Data"].value, "<u2") for name in names if header.get(f"{name}Data")]
        nominal = [int(header[f"{name}Descriptor"].value[2]) for name in names]
        brightest = max(int(table.max()) for table in tables) if tables else int(colours.max())
        if brightest <= 255 and (tables or max(nominal) == 8):
            return colours.astype(np.uint8)
    return colours


def _gray(file: Path, channels: Values) -> Values:
    """Return the grey level of three equal channels; a lossy colour transform may make them slightly unequal."""
    if (spread := _spread(channels)) > _slight(channels):
        raise DataError(
            f"{file.name}: SamplesPerPixel or a palette makes it a colour image (channels differ by up to {spread}); "
            "with encoder.in_chans=1 only grey images are read. Leave it out, export it as MONOCHROME2, or set "
            "encoder.in_chans to 3."
        )
    return np.ascontiguousarray(channels[..., 1])


def _spread(channels: Values) -> int:
    """Return the largest difference between green and another channel."""
    red, green, blue = (channels[..., i].astype(np.int64) for i in range(3))
    return max(int(np.abs(red - green).max()), int(np.abs(blue - green).max()))


def _slight(channels: Values) -> int:
    """Return the largest difference that a lossy colour transform makes in a grey image."""
    return 4 * int(np.iinfo(channels.dtype).max) // 255


def _spacing(header: Dataset) -> tuple[float, float] | None:
    for key in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"):
        row, column = number_of(header, key, 0), number_of(header, key, 1)
        if row and column and all(SMALLEST_MM <= side <= LARGEST_MM for side in (row, column)):
            return row, column
    return None


def _view(header: Dataset) -> str | None:
    if view := str(header.get("ViewPosition") or "").strip().upper():
        return view
    for item in header.get("ViewCodeSequence") or ():
        if coded := _VIEWS.get(str(item.get("CodeValue", "")).strip()):
            return coded
    orientation = str(header.get("PatientOrientation"))  # CBIS-DDSM has the view here
    return orientation if orientation in _VIEWS.values() else None


def _laterality(header: Dataset) -> str | None:
    for key in ("ImageLaterality", "FrameLaterality", "Laterality"):
        if (side := str(header.get(key) or "").strip().upper()) in ("L", "R"):
            return side
    return None
