"""DICOM objects of a prediction: a segmentation of the masks and a structured report.

DICOM requires that they carry patient and study of the source image, so they must stay at the site of the image. No
other output of a prediction contains patient data.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydicom.dataset import Dataset

from callbacks.prediction.dicom.model_identity import ModelIdentity, source_header
from callbacks.prediction.dicom.segmentation import segmentation
from callbacks.prediction.dicom.structured_report import structured_report
from mtmedformer.errors import DataError
from mtmedformer.inference.results import ImageResult


@dataclass(frozen=True)
class DicomObjects:
    """Builds the DICOM objects of one model's predictions.

    Attributes:
        model: Identity of the model, and codes of its classes.
        box_thresholds: Minimum score of a reported box, by task and class.
    """

    model: ModelIdentity
    box_thresholds: Mapping[tuple[str, str], float]

    def build(self, source: Path, result: ImageResult) -> dict[str, Dataset]:
        """Build the segmentation (``seg``, where the model has masks) and the structured report (``sr``) of an image.

        Args:
            source: DICOM file of the image.
            result: Predictions in original pixels.

        Raises:
            DataError: The file lacks identifiers, or its header does not give a valid object.
        """
        with warnings.catch_warnings():  # warnings of highdicom contain the patient's name
            warnings.simplefilter("ignore")
            try:
                header = source_header(source)
                masks = segmentation(header, result, self.model) if result.masks else None
                report = structured_report(header, result, masks, self.model, self.box_thresholds)
                return {"sr": report} if masks is None else {"seg": masks, "sr": report}
            except DataError:
                raise
            except Exception as error:  # headers fail in many ways; the error text may contain patient data
                raise DataError(
                    f"{source.name}: the header does not give a valid DICOM object ({type(error).__name__}); check it "
                    "with dciodvfy, or predict with --dicom=false"
                ) from error
