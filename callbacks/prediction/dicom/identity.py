"""Who made a DICOM object, of which image, and what it is known by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.sr.coding import Code
from pydicom.uid import generate_uid

import mtmedformer
from callbacks.prediction.dicom.codes import concept
from mtmedformer.errors import DataError
from mtmedformer.inference.results import NOTE

NAME = "MTMedFormer"

SERIES_NUMBERS = {"SEG": 9001, "SR": 9002}
"""High, so that the series stand behind the images of a study."""

_NEEDED = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
"""What a reference to the source is made of; nothing can stand in for them."""

_MAY_BE_EMPTY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    *("StudyID", "StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName"),
)
"""Attributes of type 2: empty where a source lacks them, which says that nothing is known."""


@dataclass(frozen=True)
class Identity:
    """The model as DICOM objects name it.

    Attributes:
        model: Digest of its weights.
        codes: Codes of classes that the user gave, ``(value, scheme, meaning)``.
    """

    model: str
    codes: Mapping[str, tuple[str, str, str]] = field(default_factory=dict)

    @property
    def parameters(self) -> dict[str, str]:
        """What goes with the algorithm's name and version."""
        return {"model": self.model, "note": NOTE}

    def concept(self, name: str) -> Code:
        """Return the code of a class."""
        return concept(name, self.codes)

    def uid(self, *parts: str) -> str:
        """Return a unique identifier that is the same for the same model and parts."""
        return str(generate_uid(entropy_srcs=[self.model, *parts]))

    def describe(self, header: Dataset, kind: str, content: bytes) -> dict[str, Any]:
        """Return what every object needs to say of itself; equal content of an equal source has equal identifiers.

        Args:
            header: The source image's.
            kind: ``SEG`` or ``SR``.
            content: What the object says.
        """
        number = header.get("InstanceNumber")
        return {
            "series_instance_uid": self.uid(kind, str(header.SeriesInstanceUID)),
            "series_number": SERIES_NUMBERS[kind],
            "sop_instance_uid": self.uid(kind, str(header.SOPInstanceUID), content.hex()),
            "instance_number": int(number) if number and int(number) > 0 else 1,
            "manufacturer": NAME,
            "manufacturer_model_name": NAME,
            "software_versions": mtmedformer.__version__,
            "device_serial_number": self.model,
            "series_description": f"{NOTE.capitalize()}: {NAME} {self.model}",
            "specific_character_set": "ISO_IR 192",  # names of patients in any script
        }


def source_header(source: Path) -> Dataset:
    """Read a source image's header, with empty values where it lacks what may be empty.

    Raises:
        DataError: It lacks an identifier without which nothing can refer to it.
    """
    header = dcmread(source, stop_before_pixels=True, force=True)
    missing = [name for name in _NEEDED if not header.get(name)]
    if missing:
        raise DataError(f"{source.name}: lacks {', '.join(missing)}, so no DICOM object can refer to it")
    for name in _MAY_BE_EMPTY:
        if name not in header:
            setattr(header, name, None)
    header.decode()  # from the file's character set, to be written in another
    return header
