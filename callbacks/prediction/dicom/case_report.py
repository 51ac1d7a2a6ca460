"""DICOM structured report of a case (an exam, a breast): pooled probabilities and numbers of all its images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import highdicom as hd
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes

from callbacks.prediction.dicom.codes import unit_code
from callbacks.prediction.dicom.model_identity import ModelIdentity
from callbacks.prediction.dicom.source_image import SourceImage
from callbacks.prediction.dicom.structured_report import observer, rounded


def case_report(
    sources: Sequence[SourceImage],
    scores: Mapping[str, Mapping[str, float]],
    units: Mapping[str, str],
    model: ModelIdentity,
) -> Dataset:
    """Build a Comprehensive 3D SR with one measurement group per class or number; each refers to all images.

    Args:
        sources: The source images.
        scores: Probability by task and class; a number has the class ``""``.
        units: Unit of the number of a task.
        model: Identity of the model.
    """
    algorithm = model.algorithm()
    instances = " ".join(source.key for source in sources)

    def group(task: str, label: str, value: float) -> Any:
        name = f"{task} of the case: {label}" if label else f"{task} of the case"
        measured = hd.sr.Measurement(
            name=codes.DCM.Probability if label else model.concept(task),
            value=rounded(value),
            unit=codes.UCUM.NoUnits if label else unit_code(units.get(task, "")),
            algorithm_id=algorithm,
        )
        return hd.sr.MeasurementsAndQualitativeEvaluations(
            tracking_identifier=hd.sr.TrackingIdentifier(uid=model.uid(instances, name), identifier=name),
            finding_type=model.concept(label) if label else None,
            measurements=[measured],
            source_images=[
                source.reference(hd.sr.SourceImageForMeasurementGroup.from_source_image) for source in sources
            ],
        )

    content = [group(task, label, value) for task, classes in scores.items() for label, value in classes.items()]
    attributes = model.object_attributes(sources[0], "SR", f"{instances} {scores}".encode())
    return hd.sr.Comprehensive3DSR(
        evidence=list({source.header.SOPInstanceUID: source.header for source in sources}.values()),
        content=hd.sr.MeasurementReport(
            observation_context=observer(model),
            procedure_reported=codes.SCT.ImagingProcedure,
            imaging_measurements=content,
            title=codes.DCM.ImagingMeasurementReport,
        ),
        is_complete=True,
        is_verified=False,
        **attributes,
    )
