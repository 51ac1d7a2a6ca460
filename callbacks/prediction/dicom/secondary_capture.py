"""DICOM Secondary Capture of a prediction: the image with boxes, outlines and probabilities drawn into its pixels."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import highdicom as hd
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pydicom.dataset import Dataset

from callbacks.prediction.dicom.model_identity import ModelIdentity
from callbacks.prediction.dicom.presentation_state import outlines, probability_lines
from callbacks.prediction.dicom.source_image import SourceImage, valid_orientation
from mtmedformer.batch import Task
from mtmedformer.geometry import Bytes, Floats
from mtmedformer.inference.results import NOTE, ImageResult
from mtmedformer.plots.style import class_colours


def secondary_capture(
    source: SourceImage,
    picture: Floats,
    result: ImageResult,
    tasks: Mapping[str, Task],
    model: ModelIdentity,
    box_thresholds: Mapping[tuple[str, str], float],
) -> Dataset:
    """Build a colour image of the size of the source, which any viewer shows.

    Args:
        source: The source image.
        picture: float32 (H, W) or (H, W, 3) in [0, 1]: the source as displayed.
        result: Predictions in original pixels.
        tasks: The tasks by name, in the order of the colours.
        model: Identity of the model.
        box_thresholds: Minimum score of a drawn box, by task and class.
    """
    pixels = drawn(picture, result, tasks, box_thresholds)
    header = source.header
    made = hd.sc.SCImage.from_ref_dataset(
        header,
        pixel_array=pixels,
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        pixel_spacing=result.meta.spacing,  # type: ignore[arg-type]  # of floats, as in the constructor
        laterality=result.meta.laterality,
        patient_orientation=("L", "F"),  # required by highdicom, replaced below
        transfer_syntax_uid="1.2.840.10008.1.2.1",
        **model.object_attributes(source, "SC", hashlib.sha256(pixels.data).digest()),
    )
    setattr(made, "PatientOrientation", valid_orientation(header))  # noqa: B010  empty where it is unknown
    made.BurnedInAnnotation = "YES"
    made.ImageType = ["DERIVED", "SECONDARY"]
    made.DerivationDescription = f"{NOTE.capitalize()}: predictions drawn into the image"
    reference = Dataset()
    reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = header.SOPClassUID, header.SOPInstanceUID
    if source.frame:
        reference.ReferencedFrameNumber = source.frame
    made.SourceImageSequence = [reference]
    return made


def drawn(
    picture: Floats, result: ImageResult, tasks: Mapping[str, Task], box_thresholds: Mapping[tuple[str, str], float]
) -> Bytes:
    """Draw the predictions into an image: uint8 (H, W, 3) of its size, with lines and text in proportion to it."""
    grey = np.rint(picture.clip(0, 1) * 255).astype(np.uint8)
    image = Image.fromarray(grey if grey.ndim == 3 else np.repeat(grey[..., None], 3, axis=2))
    draw, side = ImageDraw.Draw(image), max(image.size)
    width, size = max(1, round(side / 500)), max(10, round(side / 45))
    font = ImageFont.load_default(size)
    for (task, c), colour in class_colours(tasks.values()).items():
        if (mask := result.masks.get(task, {}).get(c)) is not None and mask.any():
            for line in outlines(mask):
                draw.line([(x - 0.5, y - 0.5) for x, y in line.tolist()], fill=colour, width=width)
        for box in result.boxes.get(task, ()):
            if box.name == c and box.score >= box_thresholds[task, c]:
                x0, y0, x1, y1 = (round(v) for v in box.xyxy)
                draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=colour, width=width)
                place = (x0, y0 - size - width) if y0 > size + width else (x0 + 2 * width, y0 + width)
                draw.text(place, f"{c} {box.score:.2f}", fill=colour, font=font, stroke_width=1, stroke_fill="black")
    lines = "\n".join([NOTE.capitalize(), *probability_lines(result)])
    draw.multiline_text((width, width), lines, fill="white", font=font, stroke_width=1, stroke_fill="black")
    return np.asarray(image)
