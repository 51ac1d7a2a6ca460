"""A DICOM report of a prediction (template TID 1500): probabilities, boxes and areas under coded names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import highdicom as hd
import numpy as np
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

import mtmedformer
from callbacks.prediction.dicom.identity import NAME, Identity
from mtmedformer.inference.results import Findings, FoundBox

PIXELS = Code("{pixels}", "UCUM", "pixels")


def report(
    header: Dataset,
    found: Findings,
    masks: Dataset | None,
    identity: Identity,
    least: Mapping[tuple[str, str], float],
) -> Dataset:
    """Return everything that was found as a Comprehensive 3D SR.

    A class is a measurement group with its probability; a box one with its rectangle and its score; a mask one that
    refers to its segment and has its area (in pixels where the spacing is unknown).

    Args:
        header: The source image's.
        found: What was found in it.
        masks: The segmentation of its masks, if any.
        identity: The model.
        least: Least score of a box that is reported, by task and class.
    """
    groups = _Groups(header, found, identity)
    content = [
        *(groups.probability(task, c, p) for task, classes in found.classes.items() for c, p in classes.items()),
        *(
            groups.box(task, number, box)
            for task, boxes in found.boxes.items()
            for number, box in enumerate((b for b in boxes if b.score >= least[task, b.name]), start=1)
        ),
    ]
    if masks is not None:
        named = [(task, c, int(m.sum())) for task, by_class in found.masks.items() for c, m in by_class.items()]
        content += [groups.area(task, c, n, masks, k) for k, (task, c, n) in enumerate(named, start=1)]
    said = repr((found.classes, found.boxes, masks is not None and masks.SOPInstanceUID)).encode()
    return hd.sr.Comprehensive3DSR(
        evidence=[header] if masks is None else [header, masks],
        content=hd.sr.MeasurementReport(
            observation_context=_observer(identity),
            procedure_reported=codes.SCT.ImagingProcedure,
            imaging_measurements=content,
            title=codes.DCM.ImagingMeasurementReport,
        ),
        is_complete=True,
        is_verified=False,
        **identity.describe(header, "SR", said),
    )


class _Groups:
    """Makes the measurement groups of one image."""

    def __init__(self, header: Dataset, found: Findings, identity: Identity) -> None:
        self.header, self.found, self.identity = header, found, identity
        self.algorithm = hd.sr.AlgorithmIdentification(
            name=NAME,
            version=mtmedformer.__version__,
            parameters=[f"{key}: {value}" for key, value in identity.parameters.items()],
        )

    def probability(self, task: str, name: str, value: float) -> Any:
        """Return the group of a class."""
        measured = hd.sr.Measurement(
            name=codes.DCM.Probability, value=_rounded(value), unit=codes.UCUM.NoUnits, algorithm_id=self.algorithm
        )
        return hd.sr.MeasurementsAndQualitativeEvaluations(
            tracking_identifier=self._tracked(f"{task}: {name}"),
            finding_type=self.identity.concept(name),
            measurements=[measured],
            source_images=[hd.sr.SourceImageForMeasurementGroup.from_source_image(self.header)],
        )

    def box(self, task: str, number: int, box: FoundBox) -> Any:
        """Return the group of a box: a closed rectangle in pixels of the source image, and the score in percent."""
        x0, y0, x1, y1 = box.xyxy
        corners = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]])
        region = hd.sr.ImageRegion(
            graphic_type=hd.sr.GraphicTypeValues.POLYLINE,
            graphic_data=corners,
            source_image=hd.sr.SourceImageForRegion.from_source_image(self.header),
        )
        certainty = hd.sr.Measurement(
            name=codes.DCM.CertaintyOfFinding,
            value=_rounded(100 * box.score),
            unit=codes.UCUM.Percent,
            algorithm_id=self.algorithm,
        )
        return hd.sr.PlanarROIMeasurementsAndQualitativeEvaluations(
            tracking_identifier=self._tracked(f"{task}: {box.name} {number}"),
            referenced_region=region,
            finding_type=self.identity.concept(box.name),
            measurements=[certainty],
        )

    def area(self, task: str, name: str, pixels: int, masks: Dataset, segment: int) -> Any:
        """Return the group of a mask."""
        spacing = self.found.meta.spacing
        value, unit = (pixels * spacing[0] * spacing[1], codes.UCUM.SquareMillimeter) if spacing else (pixels, PIXELS)
        there = hd.sr.ReferencedSegmentationFrame(
            sop_class_uid=masks.SOPClassUID,
            sop_instance_uid=masks.SOPInstanceUID,
            frame_number=segment,  # one frame a segment, in their order
            segment_number=segment,
            source_image=hd.sr.SourceImageForSegmentation.from_source_image(self.header),
        )
        del there[0].ReferencedSOPSequence[0].ReferencedFrameNumber  # only one of the two may be there (PS3.3 C.18.4)
        return hd.sr.PlanarROIMeasurementsAndQualitativeEvaluations(
            tracking_identifier=hd.sr.TrackingIdentifier(
                uid=masks.SegmentSequence[segment - 1].TrackingUID, identifier=f"{task}: {name}"
            ),
            referenced_segment=there,
            finding_type=self.identity.concept(name),
            measurements=[
                hd.sr.Measurement(name=codes.SCT.Area, value=_rounded(value), unit=unit, algorithm_id=self.algorithm)
            ],
        )

    def _tracked(self, what: str) -> Any:
        uid = self.identity.uid(str(self.header.SOPInstanceUID), what)
        return hd.sr.TrackingIdentifier(uid=uid, identifier=what)


def _observer(identity: Identity) -> Any:
    device = hd.sr.DeviceObserverIdentifyingAttributes(
        uid=identity.uid("device"),
        name=NAME,
        manufacturer_name=NAME,
        model_name=NAME,
        serial_number=identity.model,
    )
    return hd.sr.ObservationContext(
        observer_device_context=hd.sr.ObserverContext(
            observer_type=codes.DCM.Device, observer_identifying_attributes=device
        )
    )


def _rounded(value: float) -> float:
    """Return a value that fits a decimal string of 16 characters."""
    return float(f"{value:.6g}")
