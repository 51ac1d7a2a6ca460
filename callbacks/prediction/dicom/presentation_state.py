"""DICOM presentation state of a prediction: boxes, outlines of masks and probabilities as graphic annotations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cv2
import highdicom as hd
import numpy as np
from contourpy import contour_generator
from numpy.typing import NDArray
from PIL import ImageCms
from pydicom.dataset import Dataset

from callbacks.prediction.dicom.model_identity import ModelIdentity
from callbacks.prediction.dicom.source_image import SourceImage
from mtmedformer.batch import Task
from mtmedformer.errors import DataError
from mtmedformer.geometry import Bytes
from mtmedformer.inference.results import NOTE, ImageResult
from mtmedformer.plots.style import class_colours

MOST_POINTS = 4000
"""Largest number of points of an outline; the length of the attribute is limited to 8191."""

_PIXEL = hd.pr.AnnotationUnitsValues.PIXEL


def presentation_state(
    source: SourceImage,
    result: ImageResult,
    tasks: Mapping[str, Task],
    model: ModelIdentity,
    box_thresholds: Mapping[tuple[str, str], float],
) -> Dataset:
    """Build a softcopy presentation state: grayscale (GSPS), or colour for a colour image.

    Each class of a mask or box has a layer of its own, in its colour of the overlays; probabilities are text in the
    upper left corner. Window and rescale are those of the image.

    Args:
        source: The source image.
        result: Predictions in original pixels.
        tasks: The tasks by name, in the order of the colours.
        model: Identity of the model.
        box_thresholds: Minimum score of a drawn box, by task and class.

    Raises:
        DataError: The image has a palette; there is no presentation state of its colours.
    """
    header = source.single_frame()
    if header.PhotometricInterpretation == "PALETTE COLOR":
        raise DataError("no presentation state of a palette image: it would show the indices of the palette")
    layers, annotations = [], []
    for number, ((task, c), colour) in enumerate(class_colours(tasks.values()).items(), start=1):
        graphics, texts = _drawn(result, task, c, box_thresholds)
        if graphics:
            layer = hd.pr.GraphicLayer(
                f"CLASS_{_letters(number)}", number, f"{task}: {c}"[:64], hd.color.CIELabColor.from_string(colour)
            )
            layers.append(layer)
            annotations.append(hd.pr.GraphicAnnotation([header], layer, None, None, graphics, texts or None))
    layer = hd.pr.GraphicLayer("PROBABILITIES", len(layers) + 1, NOTE.capitalize())
    layers.append(layer)
    annotations.append(hd.pr.GraphicAnnotation([header], layer, text_objects=[_summary(result)]))
    display: dict[str, Any] = {"presentation_lut_transformation": _polarity(header)}
    kind: Any = hd.pr.GrayscaleSoftcopyPresentationState
    if int(header.get("SamplesPerPixel", 1)) > 1:
        kind = hd.pr.ColorSoftcopyPresentationState
        display = {} if "ICCProfile" in header else {"icc_profile": _srgb()}
    content = repr([(a.get("GraphicObjectSequence"), a.get("TextObjectSequence")) for a in annotations]).encode()
    made: Dataset = kind(
        referenced_images=[header],
        content_label="PREDICTION",
        content_description="Research use only, not for diagnosis",
        graphic_layers=layers,
        graphic_annotations=annotations,
        **display,
        **model.object_attributes(source, "PR", content),
    )
    source.restore(made)
    return made


def outlines(mask: Bytes) -> list[NDArray[np.float64]]:
    """Return the closed outlines of a mask, holes included: (N, 2) points ``(x, y)`` along the edges of its pixels."""
    lines = contour_generator(z=np.pad(mask, 1)).lines(0.5)
    found = []
    for line in lines:
        # the padding of one pixel, and pixel centres at 0.5
        points: NDArray[Any] = np.asarray(line, np.float32) - np.float32(0.5)
        tolerance = 0.0
        while len(points) > MOST_POINTS:
            tolerance += 0.25
            points = cv2.approxPolyDP(points[:-1, None], tolerance, closed=True)[:, 0]
            points = np.concatenate([points, points[:1]])
        found.append(points.astype(np.float64).clip(0, (mask.shape[1], mask.shape[0])))
    return found


def _drawn(
    result: ImageResult, task: str, name: str, box_thresholds: Mapping[tuple[str, str], float]
) -> tuple[list[Any], list[Any]]:
    """Return the graphic and text objects of a class: rectangles with their scores, and outlines."""
    graphics, texts = [], []
    for box in result.boxes.get(task, ()):
        if box.name == name and box.score >= box_thresholds[task, name]:
            x0, y0, x1, y1 = box.xyxy
            corners = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]], np.float64)
            graphics.append(hd.pr.GraphicObject(hd.pr.GraphicTypeValues.POLYLINE, corners, _PIXEL))
            anchor = (float(x0), float(y0))
            texts.append(
                hd.pr.TextObject(f"{name} {box.score:.2f}", _PIXEL, anchor_point=anchor, anchor_point_visible=False)
            )
    if (mask := result.masks.get(task, {}).get(name)) is not None and mask.any():
        graphics += [hd.pr.GraphicObject(hd.pr.GraphicTypeValues.POLYLINE, line, _PIXEL) for line in outlines(mask)]
    return graphics, texts


def _summary(result: ImageResult) -> Any:
    text = "\r\n".join([NOTE.capitalize(), *probability_lines(result)])
    display = hd.pr.AnnotationUnitsValues.DISPLAY
    return hd.pr.TextObject(text[:1024], display, bounding_box=(0.0, 0.0, 0.5, 0.2), text_justification="LEFT")


def probability_lines(result: ImageResult) -> list[str]:
    """Return one line per classification task, the most probable classes first."""
    lines = []
    for task, classes in result.classes.items():
        ranked = sorted(classes.items(), key=lambda item: -item[1])
        lines.append(f"{task}: " + ", ".join(f"{c} {p:.2f}" for c, p in ranked[:5]))
    return lines


def _srgb() -> bytes:
    """Return the colour profile of images that have none, as that of an input device (PS3.3 C.11.15)."""
    profile: bytes = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile[:12] + b"scnr" + profile[16:]


def _polarity(header: Dataset) -> Any:
    """Return the presentation LUT of an image: a presentation state replaces its photometric interpretation."""
    inverse = header.PhotometricInterpretation == "MONOCHROME1" or header.get("PresentationLUTShape") == "INVERSE"
    shape = hd.PresentationLUTShapeValues.INVERSE if inverse else hd.PresentationLUTShapeValues.IDENTITY
    return hd.PresentationLUTTransformation(presentation_lut_shape=shape)


def _letters(number: int) -> str:
    """Return a number as letters; highdicom takes no digits in the name of a layer."""
    letters = ""
    while number:
        number, rest = divmod(number - 1, 26)
        letters = chr(65 + rest) + letters
    return letters
