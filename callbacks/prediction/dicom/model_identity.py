"""Identity of the model in DICOM objects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import highdicom as hd
from pydicom.sr.coding import Code
from pydicom.uid import generate_uid

import mtmedformer
from callbacks.prediction.dicom.codes import concept
from callbacks.prediction.dicom.source_image import SourceImage
from mtmedformer.inference.results import NOTE

NAME = "MTMedFormer"

SERIES_NUMBERS = {"SEG": 9001, "SR": 9002, "PR": 9003, "SC": 9004}
"""High numbers, so that these series are listed after the images of a study."""


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

    def algorithm(self) -> hd.sr.AlgorithmIdentification:
        """Return the algorithm as a structured report names it."""
        parameters = [f"{key}: {value}" for key, value in self.parameters.items()]
        return hd.sr.AlgorithmIdentification(name=NAME, version=mtmedformer.__version__, parameters=parameters)

    def concept(self, name: str) -> Code:
        """Return the code of a class."""
        return concept(name, self.codes)

    def uid(self, *parts: str) -> str:
        """Return a unique identifier that is a function of model and parts."""
        return str(generate_uid(entropy_srcs=[self.weights, *parts]))

    def object_attributes(self, source: SourceImage, kind: str, content: bytes) -> dict[str, Any]:
        """Return the attributes every object needs; equal content of an equal source has equal identifiers.

        Args:
            source: The source image.
            kind: ``SEG``, ``SR``, ``PR`` (presentation state) or ``SC`` (secondary capture).
            content: Content of the object, in any form that is equal for equal content.
        """
        return {
            "series_instance_uid": self.uid(kind, str(source.header.SeriesInstanceUID)),
            "series_number": SERIES_NUMBERS[kind],
            "sop_instance_uid": self.uid(kind, source.key, content.hex()),
            "instance_number": source.number,
            "manufacturer": NAME,
            "manufacturer_model_name": NAME,
            "software_versions": mtmedformer.__version__,
            "device_serial_number": self.weights,
            "series_description": f"{NOTE.capitalize()}: {NAME} {self.weights}",
            "specific_character_set": "ISO_IR 192",  # patient names in any script
        }
