"""Facts of a DICOM header that tell kinds of images apart, in one spelling; none of them identifies a patient."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path

from pydicom import dcmread

from datamodules.images.dicom_parsing import is_dicom

_TAGS = ["Modality", "BodyPartExamined", "PhotometricInterpretation"]

_CODE = re.compile(r"[A-Z0-9 _/-]{1,16}")
"""Form of a defined term of DICOM; other texts are not used, because they might name a person."""

_RADIOGRAPHY = "CR/DX"
_MODALITIES = {"CR": _RADIOGRAPHY, "DX": _RADIOGRAPHY, "RG": _RADIOGRAPHY, "OT": "", "SC": ""}
"""Modalities with one name for the same kind of image, and those that name none."""

_PARTS = (("CHEST", ("CHEST", "THORAX", "LUNG")), ("BREAST", ("BREAST", "MAMMO")))

_VIEWS = {"L": "LATERAL", "LL": "LATERAL", "RL": "LATERAL", "LAT": "LATERAL", "LLAT": "LATERAL", "RLAT": "LATERAL"}


def header_facts(file: Path | None, view: str | None = None) -> dict[str, str]:
    """Return the known facts of an image: ``Modality``, ``BodyPartExamined``, ``View``, ``Photometric``.

    CR and DX are one modality, because both are projection radiographs; MONOCHROME1 and MONOCHROME2 are one kind of
    pixels (``grey``), because both are displayed alike.

    Args:
        file: The image file, if there is one; one that is not DICOM, or cannot be read, has no facts but its view.
        view: View from the table or the header, as in ``Meta``.
    """
    header = _header(file) if file else {}
    photometric = header.get("PhotometricInterpretation", "")
    modality, part = header.get("Modality", ""), header.get("BodyPartExamined", "")
    facts = {
        "Modality": _MODALITIES.get(modality, modality),
        "BodyPartExamined": next((name for name, words in _PARTS if any(word in part for word in words)), part),
        "View": canonical_view(view),
        "Photometric": ("grey" if photometric.startswith("MONOCHROME") else "colour") if photometric else "",
    }
    return {name: value for name, value in facts.items() if value}


def canonical_view(view: str | None) -> str:
    """Return a view as one word: ``AP Supine`` is ``AP``, ``LL`` is ``LATERAL``; empty where it is unknown."""
    first = re.split(r"[\s_,;]+", (view or "").strip().upper())[0]
    return _VIEWS.get(first, first) if _CODE.fullmatch(first) else ""


def _header(file: Path) -> Mapping[str, str]:
    try:
        with file.open("rb") as stream:
            if not is_dicom(stream.read(132)):
                return {}
        with warnings.catch_warnings():  # warnings of pydicom contain values of the header
            warnings.simplefilter("ignore")
            read = dcmread(file, force=True, stop_before_pixels=True, specific_tags=list(_TAGS))
        values = {name: str(read.get(name) or "").strip().upper() for name in _TAGS}
    except Exception:  # a broken header may raise anything in the parser; its facts are unknown
        return {}
    return {name: value for name, value in values.items() if _CODE.fullmatch(value)}
