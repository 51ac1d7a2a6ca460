"""DICOM segmentation of predicted masks: one binary segment per class, in pixels of the source image."""

from __future__ import annotations

import hashlib

import highdicom as hd
import numpy as np
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes

import mtmedformer
from callbacks.prediction.dicom.codes import category
from callbacks.prediction.dicom.model_identity import NAME, ModelIdentity
from callbacks.prediction.dicom.source_image import SourceImage, valid_orientation
from mtmedformer.inference.results import ImageResult


def segmentation(source: SourceImage, result: ImageResult, model: ModelIdentity) -> Dataset:
    """Build a segmentation with one segment per class, in the order of tasks and classes, empty segments included.

    Args:
        source: The source image.
        result: Predictions with at least one mask.
        model: Identity of the model.
    """
    header = source.single_frame()
    named = [(task, c, mask) for task, masks in result.masks.items() for c, mask in masks.items()]
    masks = np.stack([mask for _, _, mask in named], axis=-1)[None]
    algorithm = hd.AlgorithmIdentificationSequence(
        name=NAME,
        family=codes.DCM.ArtificialIntelligence,
        version=mtmedformer.__version__,
        parameters=model.parameters,
    )
    segments = [
        hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=f"{task}: {c}"[:64],
            segmented_property_category=category(c),
            segmented_property_type=model.concept(c),
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
            tracking_id=f"{task}: {c}"[:64],
            tracking_uid=model.uid(source.key, task, c),
        )
        for number, (task, c, _) in enumerate(named, start=1)
    ]
    spacing = result.meta.spacing
    if spacing is None and "PixelSpacing" in header and "ImageOrientationPatient" not in header:
        del header.PixelSpacing  # without meaning here; highdicom would copy it and then fail to read it back
    dataset = hd.seg.Segmentation(
        source_images=[header],
        pixel_array=masks,
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=segments,
        content_description="Research use only, not for diagnosis",
        content_label="PREDICTION",
        omit_empty_frames=False,  # an empty segment means that the structure was not found
        # a projection has no slices, but highdicom reads the spacing back only with a slice thickness
        pixel_measures=hd.PixelMeasuresSequence(spacing, slice_thickness=1.0) if spacing else None,
        **model.object_attributes(source, "SEG", hashlib.sha256(masks.data).digest()),
    )
    dataset.PatientOrientation = valid_orientation(header)
    source.restore(dataset)
    return dataset
