"""Prepare one image for prediction, from a file or from an array of values, as training images are prepared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread

from datamodules.cache.preprocessing import Preprocessing
from datamodules.cache.quarantine import Issue
from datamodules.cache.rasterize import SMALLEST_SIDE
from datamodules.images.dicom_parsing import is_dicom
from datamodules.images.luminance import grey_of
from datamodules.images.pixels import white_of_values
from datamodules.loading.cases import case_of
from datamodules.loading.dataset import meta_of, pixels_of, tensor_of, with_channels
from datamodules.records import Record
from mtmedformer.batch import Meta, Sample
from mtmedformer.errors import DataError
from mtmedformer.geometry import Floats, warp

IN_HEADER = ("patient", "study", "view", "laterality")
"""Fields that may name the case of a DICOM file."""


def prepare_file(record: Record, preprocessing: Preprocessing) -> Sample | Issue:
    """Decode and frame the image file of a record.

    Args:
        record: The image; its truth is not used.
        preprocessing: Frame and size of the network's input.

    Returns:
        A sample with an image (C, H, W) in [0, 1] and without truth, or the reason why the image cannot be used.
    """
    entry = preprocessing.apply(record)
    if isinstance(entry, Issue):
        return entry
    image = tensor_of(pixels_of(entry, preprocessing.channels))
    return Sample(image, {}, meta_of(record, entry, entry.to_original, ""))


def with_case(sample: Sample | Issue, file: Path, case: Sequence[str]) -> Sample | Issue:
    """Add the case of a DICOM file to its sample, from the header.

    Args:
        sample: As from `prepare_file`.
        file: The file.
        case: Names of fields, of ``IN_HEADER``.

    Returns:
        The sample; without a case where the file is no DICOM file or a field has no value.
    """
    if not case or isinstance(sample, Issue):
        return sample
    with file.open("rb") as stream:
        if not is_dicom(stream.read(1024)):
            return sample
    header = dcmread(file, force=True, stop_before_pixels=True, specific_tags=["PatientID", "StudyInstanceUID"])
    patient, study = (str(header.get(name) or "").strip() for name in ("PatientID", "StudyInstanceUID"))
    if not patient and ("patient" in case or not study):
        return sample
    meta = sample.meta
    groups = {"study": study} if study else {}
    whole = Record(meta.id, file, patient or study, view=meta.view, laterality=meta.laterality, groups=groups)
    return replace(sample, meta=replace(meta, case=case_of(whole, case, "")))


def prepare_array(
    image: NDArray[Any], preprocessing: Preprocessing, laterality: Literal["L", "R"] | None = None
) -> Sample:
    """Frame an array of grey or colour values; the result is that of a file with the same values.

    Args:
        image: (H, W), or (H, W, 3) in red, green and blue where the network's input has 3 channels; 0 is black: float
            in [0, 1], uint8, or uint16, whose white level is that of ``preprocessing``, as in files.
        preprocessing: Frame and size of the network's input.
        laterality: ``L`` or ``R`` where the side of a mammogram is known.

    Raises:
        DataError: The array has another shape or type, values outside its range, one value throughout, or a side
            below 8 pixels.
    """
    pixels, levels = _levels(image, preprocessing)
    frame = preprocessing.preset.frame(grey_of(pixels), preprocessing.size, laterality)
    rounded = np.rint(warp(pixels, frame).clip(0, 1) * levels)  # as a cache entry of 8 or 16 bits
    size = (int(pixels.shape[0]), int(pixels.shape[1]))
    meta = Meta("array", "", laterality=laterality, to_original=frame.to_original, original_size=size)
    return Sample(tensor_of(with_channels(rounded / np.float32(levels), preprocessing.channels)), {}, meta)


def _levels(image: NDArray[Any], preprocessing: Preprocessing) -> tuple[Floats, int]:
    """Return an array as float32 in [0, 1], and the white level of the entry that its file would have."""
    colour = image.ndim == 3 and image.shape[2] == preprocessing.channels == 3
    if not (image.ndim == 2 or colour) or min(image.shape[:2]) < SMALLEST_SIDE:
        other = " or one colour image (height, width, 3)" if preprocessing.channels == 3 else ""
        raise DataError(
            f"the array has shape {image.shape}; give one grey image (height, width){other} of at least 8 x 8"
        )
    if image.min() == image.max():
        raise DataError(f"the array is {image.flat[0]} everywhere; there is nothing to see")
    if image.dtype == np.uint8:
        return np.divide(image, 255, dtype=np.float32), 255
    if image.dtype == np.uint16:
        white = white_of_values(image, preprocessing.white_level, "the array")
        return np.divide(image, white, dtype=np.float32), 255 if white <= 255 else 65535
    if image.dtype.kind != "f" or not (image.min() >= 0 and image.max() <= 1):  # NaN compares False
        raise DataError(
            f"the array is {image.dtype} from {image.min()} to {image.max()}; give float in [0, 1] (0 black, 1 white), "
            "uint8 or uint16"
        )
    return image.astype(np.float32), 65535
