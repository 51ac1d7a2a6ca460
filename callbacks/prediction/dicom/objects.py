"""DICOM objects of a prediction: a segmentation of the masks and a structured report.

DICOM requires that they carry patient and study of the source image, so they must stay at the site of the image. No
other output of a prediction contains patient data.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pydicom.dataset import Dataset

from callbacks.prediction.dicom.case_report import case_report
from callbacks.prediction.dicom.model_identity import ModelIdentity
from callbacks.prediction.dicom.presentation_state import presentation_state
from callbacks.prediction.dicom.secondary_capture import secondary_capture
from callbacks.prediction.dicom.segmentation import segmentation
from callbacks.prediction.dicom.source_image import SourceImage, read_source
from callbacks.prediction.dicom.structured_report import structured_report
from mtmedformer.batch import Task
from mtmedformer.errors import DataError
from mtmedformer.geometry import Floats
from mtmedformer.inference.results import ImageResult


@dataclass(frozen=True)
class DicomObjects:
    """Builds the DICOM objects of one model's predictions.

    Attributes:
        model: Identity of the model, and codes of its classes.
        box_thresholds: Minimum score of a reported box, by task and class.
        units: Unit of the number of a task, by its name.
        tasks: The tasks by name, in the order of the colours of presentation states and secondary captures.
        kinds: What is built: ``seg``, ``sr``, ``gsps`` and ``sc``.
    """

    model: ModelIdentity
    box_thresholds: Mapping[tuple[str, str], float]
    units: Mapping[str, str] = field(default_factory=dict)
    tasks: Mapping[str, Task] = field(default_factory=dict)
    kinds: tuple[str, ...] = ("seg", "sr")

    def build(
        self,
        file: Path,
        result: ImageResult,
        frame: int | None = None,
        read: Callable[[Path, int | None], Floats] | None = None,
    ) -> dict[str, Dataset]:
        """Build the objects of an image by kind.

        These are a segmentation (``seg``, where the model has masks), a structured report (``sr``), a presentation
        state (``gsps``) and a secondary capture (``sc``).

        Args:
            file: DICOM file of the image.
            result: Predictions in original pixels.
            frame: The frame of a multi-frame image, from 1.
            read: Function that reads the image as displayed, for a secondary capture.

        Raises:
            DataError: The file lacks identifiers, or its header does not give a valid object.
        """
        with _valid(file.name):
            return self._build(read_source(file, frame), result, read and read(file, frame))

    def _build(self, source: SourceImage, result: ImageResult, picture: Floats | None) -> dict[str, Dataset]:
        made: dict[str, Dataset] = {}
        if "seg" in self.kinds and result.masks:
            made["seg"] = segmentation(source, result, self.model)
        if "sr" in self.kinds:
            made["sr"] = structured_report(source, result, made.get("seg"), self.model, self.box_thresholds)
        if "gsps" in self.kinds:
            made["gsps"] = presentation_state(source, result, self.tasks, self.model, self.box_thresholds)
        if "sc" in self.kinds and picture is not None:
            made["sc"] = secondary_capture(source, picture, result, self.tasks, self.model, self.box_thresholds)
        return made

    def build_case(
        self,
        files: Sequence[Path],
        scores: Mapping[str, Mapping[str, float]],
        frames: Sequence[int | None] | None = None,
    ) -> Dataset:
        """Build the structured report of a case.

        Args:
            files: DICOM files of its images.
            scores: Pooled probability by task and class; a number has the class ``""``.
            frames: The frame of each image in its file, ``None`` in files of one image.

        Raises:
            DataError: As `build`, or the images belong to several studies.
        """
        with _valid(files[0].name):
            images = zip(files, frames or [None] * len(files), strict=True)
            sources = [read_source(file, frame) for file, frame in images]
            if len({source.header.StudyInstanceUID for source in sources}) > 1:
                raise DataError(f"{files[0].name}: the images of its case belong to several studies")
            return case_report(sources, scores, self.units, self.model)


@contextmanager
def _valid(name: str) -> Iterator[None]:
    """Turn what headers raise into a ``DataError``, without warnings, which contain the patient's name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except DataError:
            raise
        except Exception as error:  # headers fail in many ways; the error text may contain patient data
            raise DataError(
                f"{name}: the header does not give a valid DICOM object ({type(error).__name__}); check it "
                "with dciodvfy, or predict with --dicom=false"
            ) from error
