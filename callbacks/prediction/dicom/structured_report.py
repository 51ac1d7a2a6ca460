"""DICOM structured report of a prediction (template TID 1500): probabilities, boxes and areas with coded names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import highdicom as hd
import numpy as np
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from callbacks.prediction.dicom.codes import unit_code
from callbacks.prediction.dicom.model_identity import NAME, ModelIdentity
from callbacks.prediction.dicom.source_image import SourceImage
from mtmedformer.inference.results import FoundBox, FoundValue, ImageResult

PIXELS = Code("{pixels}", "UCUM", "pixels")


def structured_report(
    source: SourceImage,
    result: ImageResult,
    masks: Dataset | None,
    model: ModelIdentity,
    box_thresholds: Mapping[tuple[str, str], float],
) -> Dataset:
    """Build a Comprehensive 3D SR of all predictions of an image.

    It has one measurement group per number (with its unit, and the distances to the ends of its interval) or grade, per
    class with its probability, per box with its rectangle and score, and per mask with a reference to its segment and
    its area (in pixels where the spacing is unknown).

    Args:
        source: The source image.
        result: Predictions in original pixels.
        masks: Segmentation of the masks, if any.
        model: Identity of the model.
        box_thresholds: Minimum score of a reported box, by task and class.
    """
    groups = _MeasurementGroups(source, result, model)
    content = [
        *(groups.value(task, value) for task, value in result.values.items()),
        *(groups.probability(task, c, p) for task, classes in result.classes.items() for c, p in classes.items()),
        *(
            groups.box(task, number, box)
            for task, boxes in result.boxes.items()
            for number, box in enumerate((b for b in boxes if b.score >= box_thresholds[task, b.name]), start=1)
        ),
    ]
    if masks is not None:
        named = [(task, c, int(m.sum())) for task, by_class in result.masks.items() for c, m in by_class.items()]
        content += [groups.area(task, c, n, masks, k) for k, (task, c, n) in enumerate(named, start=1)]
    content_digest = repr(
        (result.values, result.classes, result.boxes, masks is not None and masks.SOPInstanceUID)
    ).encode()
    return hd.sr.Comprehensive3DSR(
        evidence=[source.header] if masks is None else [source.header, masks],
        content=hd.sr.MeasurementReport(
            observation_context=observer(model),
            procedure_reported=codes.SCT.ImagingProcedure,
            imaging_measurements=content,
            title=codes.DCM.ImagingMeasurementReport,
        ),
        is_complete=True,
        is_verified=False,
        **model.object_attributes(source, "SR", content_digest),
    )


class _MeasurementGroups:
    """Builds the measurement groups of one image."""

    def __init__(self, source: SourceImage, result: ImageResult, model: ModelIdentity) -> None:
        self.source, self.result, self.model = source, result, model
        self.algorithm = model.algorithm()

    def value(self, task: str, value: FoundValue) -> Any:
        """Return the measurement group of a number with its unit and interval, or of a grade as a coded evaluation."""
        measurements, evaluations = [], []
        name = self.model.concept(task)
        if value.grade is not None:
            evaluations.append(hd.sr.QualitativeEvaluation(name=name, value=self.model.concept(value.grade)))
        else:
            measurements.append(
                hd.sr.Measurement(
                    name=name,
                    value=rounded(value.value),
                    unit=unit_code(value.unit),
                    algorithm_id=self.algorithm,
                    properties=_interval(value),
                )
            )
        return hd.sr.MeasurementsAndQualitativeEvaluations(
            tracking_identifier=self._tracking(task),
            measurements=measurements or None,
            qualitative_evaluations=evaluations or None,
            source_images=[self.source.reference(hd.sr.SourceImageForMeasurementGroup.from_source_image)],
        )

    def probability(self, task: str, name: str, value: float) -> Any:
        """Return the measurement group of a class."""
        measured = hd.sr.Measurement(
            name=codes.DCM.Probability, value=rounded(value), unit=codes.UCUM.NoUnits, algorithm_id=self.algorithm
        )
        return hd.sr.MeasurementsAndQualitativeEvaluations(
            tracking_identifier=self._tracking(f"{task}: {name}"),
            finding_type=self.model.concept(name),
            measurements=[measured],
            source_images=[self.source.reference(hd.sr.SourceImageForMeasurementGroup.from_source_image)],
        )

    def box(self, task: str, number: int, box: FoundBox) -> Any:
        """Return the measurement group of a box: a closed rectangle in original pixels, and the score in percent."""
        x0, y0, x1, y1 = box.xyxy
        corners = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]])
        region = hd.sr.ImageRegion(
            graphic_type=hd.sr.GraphicTypeValues.POLYLINE,
            graphic_data=corners,
            source_image=self.source.reference(hd.sr.SourceImageForRegion.from_source_image),
        )
        certainty = hd.sr.Measurement(
            name=codes.DCM.CertaintyOfFinding,
            value=rounded(100 * box.score),
            unit=codes.UCUM.Percent,
            algorithm_id=self.algorithm,
        )
        return hd.sr.PlanarROIMeasurementsAndQualitativeEvaluations(
            tracking_identifier=self._tracking(f"{task}: {box.name} {number}"),
            referenced_region=region,
            finding_type=self.model.concept(box.name),
            measurements=[certainty],
        )

    def area(self, task: str, name: str, pixels: int, masks: Dataset, segment: int) -> Any:
        """Return the measurement group of a mask."""
        spacing = self.result.meta.spacing
        value, unit = (pixels * spacing[0] * spacing[1], codes.UCUM.SquareMillimeter) if spacing else (pixels, PIXELS)
        reference = hd.sr.ReferencedSegmentationFrame(
            sop_class_uid=masks.SOPClassUID,
            sop_instance_uid=masks.SOPInstanceUID,
            frame_number=segment,  # one frame per segment, in the same order
            segment_number=segment,
            source_image=self.source.reference(hd.sr.SourceImageForSegmentation.from_source_image),
        )
        del reference[0].ReferencedSOPSequence[0].ReferencedFrameNumber  # only one of the two is allowed (PS3.3 C.18.4)
        return hd.sr.PlanarROIMeasurementsAndQualitativeEvaluations(
            tracking_identifier=hd.sr.TrackingIdentifier(
                uid=masks.SegmentSequence[segment - 1].TrackingUID, identifier=f"{task}: {name}"
            ),
            referenced_segment=reference,
            finding_type=self.model.concept(name),
            measurements=[
                hd.sr.Measurement(name=codes.SCT.Area, value=rounded(value), unit=unit, algorithm_id=self.algorithm)
            ],
        )

    def _tracking(self, what: str) -> Any:
        uid = self.model.uid(self.source.key, what)
        return hd.sr.TrackingIdentifier(uid=uid, identifier=what)


def observer(model: ModelIdentity) -> Any:
    """Return the context that names the model as the observer."""
    device = hd.sr.DeviceObserverIdentifyingAttributes(
        uid=model.uid("device"),
        name=NAME,
        manufacturer_name=NAME,
        model_name=NAME,
        serial_number=model.weights,
    )
    return hd.sr.ObservationContext(
        observer_device_context=hd.sr.ObserverContext(
            observer_type=codes.DCM.Device, observer_identifying_attributes=device
        )
    )


def _interval(value: FoundValue) -> Any:
    """Return the distances of the ends of the interval from the number; ``None`` without an interval."""
    if value.low is None or value.high is None:
        return None
    return hd.sr.MeasurementProperties(
        upper_measurement_uncertainty=rounded(value.high - value.value),
        lower_measurement_uncertainty=rounded(value.value - value.low),
    )


def rounded(value: float) -> float:
    """Round a value so that it fits a decimal string of 16 characters."""
    return float(f"{value:.6g}")
