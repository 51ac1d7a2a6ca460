"""DICOM objects of a prediction: a segmentation of the masks and a report of everything, beside their source image.

They are for the site whose image it is: as DICOM demands, they carry its patient and study. Nothing else that is
written of a prediction does.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydicom.dataset import Dataset

from callbacks.prediction.dicom.identity import Identity, source_header
from callbacks.prediction.dicom.segmentation import segmentation
from callbacks.prediction.dicom.structured_report import report
from mtmedformer.errors import DataError
from mtmedformer.inference.results import Findings


@dataclass(frozen=True)
class DicomOutputs:
    """Makes the DICOM objects of one model's predictions.

    Attributes:
        identity: The model, and codes for its classes.
        least: Least score of a box that is reported, by task and class.
    """

    identity: Identity
    least: Mapping[tuple[str, str], float]

    def make(self, source: Path, found: Findings) -> dict[str, Dataset]:
        """Return the segmentation (``seg``, where the model has masks) and the report (``sr``) of an image.

        Args:
            source: The image's DICOM file.
            found: What was found in it.

        Raises:
            DataError: The file lacks what a reference to it needs, or its header does not make a valid object.
        """
        with warnings.catch_warnings():  # highdicom's quote the patient's name
            warnings.simplefilter("ignore")
            try:
                header = source_header(source)
                masks = segmentation(header, found, self.identity) if found.masks else None
                made = {} if masks is None else {"seg": masks}
                return made | {"sr": report(header, found, masks, self.identity, self.least)}
            except DataError:
                raise
            except Exception as error:  # of any kind, as headers are; its text may quote the patient too
                raise DataError(
                    f"{source.name}: its header does not make a valid DICOM object ({type(error).__name__}); check it "
                    "with dciodvfy, or predict with --dicom=false"
                ) from error
