"""A DICOM segmentation of a prediction's masks: one binary segment a class, in the frame of the source image."""

from __future__ import annotations

import hashlib

import highdicom as hd
import numpy as np
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes

import mtmedformer
from callbacks.prediction.dicom.codes import category
from callbacks.prediction.dicom.identity import NAME, Identity
from mtmedformer.inference.results import Findings


def segmentation(header: Dataset, found: Findings, identity: Identity) -> Dataset:
    """Return the masks as a segmentation, segments in the order of tasks and classes, empty ones too.

    Args:
        header: The source image's.
        found: What was found in it; at least one mask.
        identity: The model.
    """
    named = [(task, c, mask) for task, masks in found.masks.items() for c, mask in masks.items()]
    masks = np.stack([mask for _, _, mask in named], axis=-1)[None]
    algorithm = hd.AlgorithmIdentificationSequence(
        name=NAME,
        family=codes.DCM.ArtificialIntelligence,
        version=mtmedformer.__version__,
        parameters=identity.parameters,
    )
    segments = [
        hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=f"{task}: {c}"[:64],
            segmented_property_category=category(c),
            segmented_property_type=identity.concept(c),
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
            tracking_id=f"{task}: {c}"[:64],
            tracking_uid=identity.uid(str(header.SOPInstanceUID), task, c),
        )
        for number, (task, c, _) in enumerate(named, start=1)
    ]
    spacing = found.meta.spacing
    if spacing is None and "PixelSpacing" in header and "ImageOrientationPatient" not in header:
        del header.PixelSpacing  # of no use to the reader; highdicom would take it over and then not read it back
    made = hd.seg.Segmentation(
        source_images=[header],
        pixel_array=masks,
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=segments,
        content_description="Research use only, not for diagnosis",
        content_label="PREDICTION",
        omit_empty_frames=False,  # an empty segment says that nothing was found
        # a projection has no slices, but highdicom reads no spacing back without their thickness
        pixel_measures=hd.PixelMeasuresSequence(spacing, slice_thickness=1.0) if spacing else None,
        **identity.describe(header, "SEG", hashlib.sha256(masks.data).digest()),
    )
    made.PatientOrientation = _orientation(header)
    return made


def _orientation(header: Dataset) -> list[str] | None:
    """Return the source's patient orientation where it is valid; the attribute must be there, but may be empty."""
    given = header.get("PatientOrientation") or []
    parts = [str(part) for part in given] if not isinstance(given, str) else [given]
    valid = len(parts) == 2 and all(part and set(part) <= set("LRAPHF") for part in parts)
    return parts if valid else None
