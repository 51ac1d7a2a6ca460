"""Identity of the model in DICOM objects, and the header of the source image."""

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
"""High numbers, so that these series are listed after the images of a study."""

_NEEDED = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
"""Attributes that a reference to the source needs; they have no substitute."""

_MAY_BE_EMPTY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    *("StudyID", "StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName"),
)
"""Attributes of type 2: they are written empty where the source lacks them."""


@dataclass(frozen=True)
class ModelIdentity:
    """The model as named in DICOM objects.

    Attributes:
        weights: Digest of its weights.
        codes: User-defined codes of classes, ``(value, scheme, meaning)``.
    """

    weights: str
    codes: Mapping[str, tuple[str, str, str]] = field(default_factory=dict)

    @property
    def parameters(self) -> dict[str, str]:
        """Parameters of the algorithm, besides its name and version."""
        return {"model": self.weights, "note": NOTE}

    def concept(self, name: str) -> Code:
        """Return the code of a class."""
        return concept(name, self.codes)

    def uid(self, *parts: str) -> str:
        """Return a unique identifier that is a function of model and parts."""
        return str(generate_uid(entropy_srcs=[self.weights, *parts]))

    def object_attributes(self, header: Dataset, kind: str, content: bytes) -> dict[str, Any]:
        """Return the attributes every object needs; equal content of an equal source has equal identifiers.

        Args:
            header: Header of the source image.
            kind: ``SEG`` or ``SR``.
            content: Content of the object, in any form that is equal for equal content.
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
            "device_serial_number": self.weights,
            "series_description": f"{NOTE.capitalize()}: {NAME} {self.weights}",
            "specific_character_set": "ISO_IR 192",  # patient names in any script
        }


def source_header(source: Path) -> Dataset:
    """Read the header of a source image, with empty values for missing attributes of type 2.

    Raises:
        DataError: It lacks an identifier that a reference to it needs.
    """
    header = dcmread(source, stop_before_pixels=True, force=True)
    missing = [name for name in _NEEDED if not header.get(name)]
    if missing:
        raise DataError(f"{source.name}: lacks {', '.join(missing)}, so no DICOM object can refer to it")
    for name in _MAY_BE_EMPTY:
        if name not in header:
            setattr(header, name, None)
    header.decode()  # from the character set of the file; it is written in another one
    return header
