"""The source image of a DICOM object: the header of its file, and its frame in a multi-frame file."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import SecondaryCaptureImageStorage

from mtmedformer.errors import DataError

Reference = TypeVar("Reference", bound=Dataset)

_NEEDED = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
"""Attributes that a reference to the source needs; they have no substitute."""

_MAY_BE_EMPTY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    *("StudyID", "StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName"),
)
"""Attributes of type 2: they are written empty where the source lacks them."""

_MACROS = {
    "PixelMeasuresSequence": ("PixelSpacing", "SliceThickness", "SpacingBetweenSlices"),
    "PlaneOrientationSequence": ("ImageOrientationPatient",),
    "PlanePositionSequence": ("ImagePositionPatient",),
    "FrameVOILUTSequence": ("WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence"),
    "PixelValueTransformationSequence": ("RescaleSlope", "RescaleIntercept", "RescaleType"),
}
"""Functional groups of the place and the display of a frame, with the attributes that other files have at the top."""

_SHARED, _PER_FRAME = "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"


@dataclass(frozen=True)
class SourceImage:
    """An image to which DICOM objects refer.

    Attributes:
        header: Header of its file.
        frame: The frame of a multi-frame file, from 1; ``None`` for a file of one image.
    """

    header: Dataset
    frame: int | None = None

    @property
    def key(self) -> str:
        """Identifier of the image, also among the frames of its file."""
        return str(self.header.SOPInstanceUID) + (f"#{self.frame}" if self.frame else "")

    @property
    def number(self) -> int:
        """Number of the image in a series of its own."""
        number = self.frame or self.header.get("InstanceNumber")
        return int(number) if number and int(number) > 0 else 1

    def reference(self, from_source_image: Callable[[Dataset], Reference]) -> Reference:
        """Return an item of a structured report that refers to this image, its frame included.

        highdicom refuses frames of the classes that should have none, such as CR and DX; such files exist.

        Args:
            from_source_image: Constructor of the item from the header.
        """
        made = from_source_image(self.header)
        if self.frame:
            made.ReferencedSOPSequence[0].ReferencedFrameNumber = self.frame
        return made

    def single_frame(self) -> Dataset:
        """Return the header as that of a file of this image alone, a Secondary Capture image where it is multi-frame.

        highdicom needs functional groups that are alike in all frames, which ultrasound and others do not have.
        """
        if "NumberOfFrames" not in self.header:
            return self.header
        header, place = copy.deepcopy(self.header), (self.frame or 1) - 1
        shared = (header.get(_SHARED) or [])[:1]
        own = (header.get(_PER_FRAME) or [])[place : place + 1]
        for group in (*shared, *own):
            for macro, names in _MACROS.items():
                for item in (group.get(macro) or [])[:1]:
                    for name in (name for name in names if name in item):
                        header[name] = item[name]
        for name in ("NumberOfFrames", _SHARED, _PER_FRAME):
            if name in header:
                del header[name]
        header.SOPClassUID = SecondaryCaptureImageStorage
        return header

    def restore(self, made: Dataset) -> None:
        """Let an object that was made from ``single_frame`` refer to this image: its class, and its frame."""
        if "NumberOfFrames" not in self.header:
            return
        for element in made:
            for item in element.value if element.VR == "SQ" else ():
                if item.get("ReferencedSOPInstanceUID") == self.header.SOPInstanceUID:
                    item.ReferencedSOPClassUID = self.header.SOPClassUID
                    if self.frame and element.keyword != "ReferencedInstanceSequence":  # a list of files
                        item.ReferencedFrameNumber = self.frame
                self.restore(item)


def read_source(file: Path, frame: int | None = None) -> SourceImage:
    """Read the header of a source image, with empty values for missing attributes of type 2.

    Args:
        file: Its file.
        frame: The frame of a multi-frame image, from 1.

    Raises:
        DataError: It lacks an identifier that a reference to it needs.
    """
    header = dcmread(file, stop_before_pixels=True, force=True)
    missing = [name for name in _NEEDED if not header.get(name)]
    if missing:
        raise DataError(f"{file.name}: lacks {', '.join(missing)}, so no DICOM object can refer to it")
    for name in _MAY_BE_EMPTY:
        if name not in header:
            setattr(header, name, None)
    header.decode()  # from the character set of the file; it is written in another one
    return SourceImage(header, frame)


def valid_orientation(header: Dataset) -> list[str] | None:
    """Return the patient orientation of the source if it is valid; the attribute is required but may be empty."""
    given = header.get("PatientOrientation") or []
    parts = [str(part) for part in given] if not isinstance(given, str) else [given]
    valid = len(parts) == 2 and all(part and set(part) <= set("LRAPHF") for part in parts)
    return parts if valid else None
