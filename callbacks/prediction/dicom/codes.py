"""Coded concepts of classes: SNOMED CT and DICOM codes where they exist, private codes otherwise."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

PRIVATE = "99MTMF"
"""Coding scheme of classes without a code; DICOM reserves names that begin with 99 for private schemes."""

ANATOMY: Code = codes.SCT.AnatomicalStructure
ABNORMALITY: Code = codes.SCT.MorphologicallyAbnormalStructure
ANYTHING: Code = codes.SCT.BodyStructure
"""Categories of a segment (DICOM PS3.16, CID 7150); the last includes both and is used for unknown classes."""

_ORGANS: dict[str, Code] = {
    "lung": codes.SCT.Lung,
    "heart": codes.SCT.Heart,
    "breast": codes.SCT.Breast,
    "rib": codes.SCT.Rib,
    "clavicle": codes.SCT.Clavicle,
    "trachea": codes.SCT.Trachea,
    "mediastinum": codes.SCT.Mediastinum,
    "nipple": codes.SCT.Nipple,
    "axillary lymph node": codes.SCT.AxillaryLymphNode,
    "pectoral muscle": codes.SCT.PectoralisMajorMuscle,
}

_ABNORMALITIES: dict[str, Code] = {
    "lesion": codes.SCT.Lesion,
    "nodule": codes.SCT.Nodule,
    "mass": codes.SCT.Mass,
    "tumor": codes.SCT.Neoplasm,
    "tumour": codes.SCT.Neoplasm,
    "neoplasm": codes.SCT.Neoplasm,
    "cyst": codes.SCT.Cyst,
    "calcification": codes.SCT.CalcificationOfBreast,
    "calcification cluster": codes.SCT.CalcificationCluster,
    "architectural distortion": codes.SCT.ArchitecturalDistortionOfBreast,
    "opacity": codes.DCM.Opacity,
    "lung opacity": codes.DCM.Opacity,
    "ground glass": codes.DCM.GroundGlassOpacity,
    "ground glass opacity": codes.DCM.GroundGlassOpacity,
    "infiltrate": codes.DCM.Infiltrate,
    "pneumothorax": codes.SCT.Pneumothorax,
    "pleural effusion": codes.SCT.PleuralEffusion,
    "effusion": codes.SCT.Effusion,
    "cardiomegaly": codes.SCT.Cardiomegaly,
    "edema": codes.SCT.Edema,
    "fibrosis": codes.SCT.Fibrosis,
    "pneumonia": Code("233604007", "SCT", "Pneumonia"),
    "covid19": Code("840539006", "SCT", "COVID-19"),
    "covid 19": Code("840539006", "SCT", "COVID-19"),
}

_JUDGEMENTS: dict[str, Code] = {
    "normal": codes.SCT.Normal,
    "abnormal": codes.SCT.Abnormal,
    "benign": codes.SCT.Benign,
    "malignant": codes.SCT.Malignant,
}


def concept(name: str, own: Mapping[str, tuple[str, str, str]]) -> Code:
    """Return the code of a class.

    Args:
        name: Name of the class; case, ``_``, ``-`` and a final ``s`` are ignored.
        own: User-defined ``(value, scheme, meaning)`` by class; they take precedence.
    """
    if name in own:
        return Code(*own[name])
    plain = _plain(name)
    for known in (_ORGANS, _ABNORMALITIES, _JUDGEMENTS):
        for spelling in (plain, plain.removesuffix("s")):
            if spelling in known:
                return known[spelling]
    value = name if len(name) <= 16 and re.fullmatch(r"[\w.-]+", name, re.ASCII) else _digest(name)
    return Code(value, PRIVATE, name[:64])


_UCUM = {"mm": "millimeter", "cm": "centimeter", "mm2": "square millimeter", "cm2": "square centimeter"}
_UCUM |= {"mm3": "cubic millimeter", "cm3": "cubic centimeter", "mL": "milliliter", "kg": "kilogram"}
_UCUM |= {"a": "year", "mo": "month", "d": "day", "%": "percent", "1": "no units"}

_UNITS = {"": "1", "percent": "%", "ml": "mL", "year": "a", "years": "a", "month": "mo", "months": "mo", "days": "d"}
_UNITS |= {code: code for code in _UCUM}
"""UCUM codes of units, by their spelling in lower case."""


def unit_code(unit: str) -> Code:
    """Return the UCUM code of a unit; a word without a code is an annotation in braces, as UCUM provides for counts."""
    plain = unit.strip().lower().replace("²", "2").replace("³", "3")
    if plain in _UNITS:
        return Code(_UNITS[plain], "UCUM", _UCUM[_UNITS[plain]])
    word = re.sub(r"[^!-z|~]", "_", unit)[:14]
    return Code(f"{{{word}}}", "UCUM", unit[:64])


def category(name: str) -> Code:
    """Return the category of a segment of a class: anatomy, abnormality, or both."""
    plain = _plain(name)
    for known, kind in ((_ORGANS, ANATOMY), (_ABNORMALITIES, ABNORMALITY)):
        if plain in known or plain.removesuffix("s") in known:
            return kind
    return ANYTHING


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name.strip().lower())


def _digest(name: str) -> str:
    return hashlib.blake2b(name.encode(), digest_size=8).hexdigest()
