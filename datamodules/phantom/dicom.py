"""Writes the images and the truth of invented sites: drawing, scanner, DICOM file, ``labels.csv``.

Anatomy and truth come from one random stream, the scanner from another, so that turning a dial of the scanner never
changes what is there to be found.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.random import Generator
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, RLELossless, generate_uid
from scipy import ndimage

from datamodules.phantom.breast import Breast, draw_breast, sample_breast_lesions
from datamodules.phantom.chest import Chest, draw_chest, sample_opacities
from datamodules.phantom.drawing import SIDES, VIEWS, Bool, Drawing, Float
from mtmedformer.batch import Task

log = logging.getLogger(__name__)

Organ = Literal["chest", "breast"]
TransferSyntax = Literal["explicit", "rle", "jpeg2000"]

VERSION = 2
"""Raised whenever the same settings would draw other images, so that no stale tree is ever read."""

CLASSIFICATION = {
    "chest": Task("finding", "classification", ("clear", "ground_glass", "consolidation")),
    "breast": Task("pathology", "classification", ("normal", "benign", "malignant")),
}
LESIONS = {"chest": ("ground_glass", "consolidation"), "breast": ("mass", "calcification")}
MASKS = {
    organ: tuple(Task(name, "segmentation", (label,), multi_label=True) for name, label in names.items())
    for organ, names in {
        "chest": {"lungs": "lung", "infection": "infection"},
        "breast": {"breast": "breast", "lesion": "lesion"},
    }.items()
}
"""The mask of the organ, then that of its lesions; one class is one sigmoid channel."""
HEIGHT_MM = {"chest": 380.0, "breast": 260.0}
SYNTAXES = {"explicit": ExplicitVRLittleEndian, "rle": RLELossless, "jpeg2000": JPEG2000Lossless}
SOP_CLASSES = {
    "CR": "1.2.840.10008.5.1.4.1.1.1",
    "DX": "1.2.840.10008.5.1.4.1.1.1.1",
    "MG": "1.2.840.10008.5.1.4.1.1.1.2",
}
NOTHING = np.zeros((0, 0), np.float32)
MARGIN = 0.06
"""Share of the stored range that stays unused at either end, so that a reader who ignores the window sees grey."""


@dataclass(frozen=True)
class PhantomSite:
    """One invented hospital: who comes, what its scanner does to the image, and what its readers have labelled.

    Attributes:
        organ: ``chest`` (one or two frontal films a patient) or ``breast`` (CC and MLO of both sides).
        patients: Number of patients.
        prevalence: Share of chests, or of single breasts, with a finding.
        gamma: Exponent of the scanner's response; below 1 brightens.
        contrast: Slope of the response about mid-grey.
        noise: Standard deviation of the noise at mid-grey, of a range of 1.
        blur: Standard deviation of the blur in thousandths of the image height.
        inverted: Whether black and white are swapped *without any word of it* in the files: a real domain shift.
        monochrome1: Whether the files store white as 0 *and say so*: readers undo it, nothing shifts.
        bits: Bits stored a pixel.
        transfer_syntax: ``explicit`` (uncompressed), ``rle`` or ``jpeg2000`` (lossless).
        size: Image height in pixels; ``None`` takes the data set's.
        marker: Whether a lead marker (side, view) is in the image.
        labelled: Share of images labelled for each task, for example ``{"finding": 1.0, "lungs": 0.25}``; a task that
            is not listed is unlabelled. ``None`` labels everything.
    """

    organ: Organ = "chest"
    patients: int = 64
    prevalence: float = 0.5
    gamma: float = 1.0
    contrast: float = 1.0
    noise: float = 0.015
    blur: float = 0.0
    inverted: bool = False
    monochrome1: bool = False
    bits: Literal[8, 12, 16] = 12
    transfer_syntax: TransferSyntax = "explicit"
    size: int | None = None
    marker: bool = True
    labelled: dict[str, float] | None = None


def expose(
    absorption: Float, gamma: float, contrast: float, noise: float, blur: float, inverted: bool, rng: Generator
) -> Float:
    """Turn absorption into the grey values a scanner shows, float32 (H, W) in [0, 1]; geometry is never touched.

    Args:
        absorption: float32 (H, W) in [0, 1].
        gamma: Exponent of the response; below 1 brightens.
        contrast: Slope about mid-grey.
        noise: Standard deviation of the quantum noise at mid-grey; it grows with absorption, as fewer photons arrive.
        blur: Standard deviation of the blur in thousandths of the image height.
        inverted: Whether black and white are swapped without any word of it in the file.
        rng: Source of the noise; drawn from whatever the noise, so that no other dial moves it.
    """
    image = absorption
    if blur > 0:
        image = ndimage.gaussian_filter(image, blur * image.shape[0] / 1000)
    grain = rng.standard_normal(image.shape, dtype=np.float32)
    image = image + np.float32(noise) * (0.5 + image) * grain
    image = np.clip(0.5 + contrast * (np.clip(image, 0, 1) ** np.float32(gamma) - 0.5), 0, 1)
    shown: Float = (1 - image if inverted else image).astype(np.float32)
    return shown


def write_dicom(
    path: Path,
    image: Float,
    *,
    modality: Literal["CR", "DX", "MG"],
    patient: str,
    site: str,
    view: str,
    laterality: str | None,
    bits: int,
    monochrome1: bool,
    transfer_syntax: TransferSyntax,
    spacing: float,
    number: int,
) -> None:
    """Write grey values as one DICOM file; the same arguments give the same bytes.

    Args:
        path: The file to write.
        image: float32 (H, W) in [0, 1], white 1.
        modality: ``CR`` or ``DX`` (chest), ``MG`` (breast).
        patient: Invented PatientID.
        site: Goes into InstitutionName, and with patient and number into the UIDs.
        view: ViewPosition.
        laterality: ``L``, ``R`` or ``None``.
        bits: BitsStored: 8, 12 or 16.
        monochrome1: Whether the file stores white as 0 and says so.
        transfer_syntax: ``explicit``, ``rle`` or ``jpeg2000``, all lossless.
        spacing: Pixel spacing in mm.
        number: Number of the image within the patient.
    """
    top = 2**bits - 1
    low = round(MARGIN * top)
    stored = np.round(low + image.astype(np.float64) * (top - 2 * low))
    if monochrome1:
        stored = top - stored
    ds = Dataset()
    ds.SOPClassUID = SOP_CLASSES[modality]
    ds.SOPInstanceUID = generate_uid(entropy_srcs=["instance", patient, str(number)])
    ds.StudyInstanceUID = generate_uid(entropy_srcs=["study", patient])
    ds.SeriesInstanceUID = generate_uid(entropy_srcs=["series", patient, str(number)])
    ds.StudyID, ds.SeriesNumber, ds.InstanceNumber = "1", number + 1, 1
    ds.StudyDate = ds.StudyTime = ds.AccessionNumber = ds.ReferringPhysicianName = ""
    ds.PatientID = ds.PatientName = patient
    ds.PatientBirthDate = ds.PatientSex = ""
    ds.Modality, ds.Manufacturer, ds.InstitutionName = modality, "MTMedFormer phantom", site
    ds.BodyPartExamined, ds.ViewPosition, ds.BurnedInAnnotation = "BREAST" if modality == "MG" else "CHEST", view, "NO"
    if modality == "MG":
        ds.ImageLaterality = laterality
        ds.PatientOrientation = ["A", "R"] if laterality == "L" else ["P", "L"]
        if view == "MLO":
            ds.PatientOrientation[1] = "F"
    else:
        ds.PatientOrientation = ["L", "F"]
    if modality != "CR":
        ds.PresentationIntentType = "FOR PRESENTATION"
        ds.PixelIntensityRelationship, ds.PixelIntensityRelationshipSign = "LOG", -1 if monochrome1 else 1
        ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = "0", "1", "US"
        ds.PresentationLUTShape = "INVERSE" if monochrome1 else "IDENTITY"
        ds.LossyImageCompression = "00"
    ds.ImagerPixelSpacing = ds.PixelSpacing = [f"{spacing:.6g}"] * 2
    ds.Rows, ds.Columns = image.shape
    ds.SamplesPerPixel, ds.PixelRepresentation = 1, 0
    ds.PhotometricInterpretation = "MONOCHROME1" if monochrome1 else "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = (8 if bits == 8 else 16), bits, bits - 1
    ds.WindowCenter, ds.WindowWidth = f"{(top + 1) / 2:g}", f"{top - 2 * low + 1:g}"
    ds.PixelData = stored.astype("<u1" if bits == 8 else "<u2").tobytes()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    if transfer_syntax != "explicit":
        ds.compress(SYNTAXES[transfer_syntax], encoding_plugin="pylibjpeg", generate_instance_uid=False)
    ds.save_as(path, enforce_file_format=True)


def settings_key(sites: Mapping[str, PhantomSite], size: int, seed: int) -> str:
    """Return the name of the folder that holds exactly these settings."""
    settings = {"version": VERSION, "size": size, "seed": seed, "sites": {n: asdict(s) for n, s in sites.items()}}
    return hashlib.blake2b(json.dumps(settings).encode(), digest_size=8).hexdigest()


def generate(folder: Path, sites: Mapping[str, PhantomSite], size: int, seed: int) -> None:
    """Write the DICOM files, masks and ``labels.csv`` of all sites, all of it or nothing.

    Args:
        folder: Where the tree goes; one that exists is complete and left as it is.
        sites: Sites by name.
        size: Image height of sites that have none of their own.
        seed: Seed of everything drawn.
    """
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        partial.chmod(0o755)
        tables = [pd.DataFrame(_site_rows(partial, name, site, size, seed)) for name, site in sites.items()]
        table = pd.concat(tables, ignore_index=True)
        for column in table.columns[table.columns.str.startswith("has_")]:
            table[column] = table[column].fillna(0).astype(int)  # the tasks of the other organ
        table.to_csv(partial / "labels.csv", index=False, lineterminator="\n")
        try:
            partial.rename(folder)
        except OSError:
            if not folder.exists():  # another process was quicker: its tree is the same
                raise
        else:
            log.info("Generated %d phantom images of %d sites in %s", len(table), len(sites), folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@dataclass(frozen=True)
class _Film:
    patient: int
    view: str
    laterality: str | None
    number: int
    drawing: Drawing
    label: str


def _site_rows(root: Path, name: str, site: PhantomSite, size: int, seed: int) -> list[dict[str, Any]]:
    """Draw, expose and write every image of one site; return its rows of ``labels.csv``."""
    size = size if site.size is None else site.size
    for kind in ("images", "masks"):
        (root / kind / name).mkdir(parents=True, exist_ok=True)
    code = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=4).hexdigest()
    splits = _splits(site.patients, _stream(seed, name, "split"))
    films = _chests if site.organ == "chest" else _breasts
    modality: Literal["CR", "DX", "MG"] = "MG" if site.organ == "breast" else "CR" if site.monochrome1 else "DX"
    rows: list[dict[str, Any]] = []
    drawn: list[_Film] = []
    for film in films(name, site, size, seed):
        stem = f"{film.patient:04d}_{film.number}_{film.laterality or ''}{film.view}"
        patient = f"PHANTOM-{code}-{film.patient:04d}"
        h, w = film.drawing.absorption.shape
        rng = _stream(seed, name, "noise", film.patient, film.number)
        image = expose(film.drawing.absorption, site.gamma, site.contrast, site.noise, site.blur, site.inverted, rng)
        write_dicom(
            root / "images" / name / f"{stem}.dcm",
            image,
            modality=modality,
            patient=patient,
            site=name,
            view=film.view,
            laterality=film.laterality,
            bits=site.bits,
            monochrome1=site.monochrome1,
            transfer_syntax=site.transfer_syntax,
            spacing=HEIGHT_MM[site.organ] / h,
            number=film.number,
        )
        rows.append(
            {
                "image": f"images/{name}/{stem}.dcm",
                "site": name,
                "client": name,
                "patient": patient,
                "split": splits[film.patient],
                "organ": site.organ,
                "laterality": film.laterality or "",
                "view": film.view,
                "width": w,
                "height": h,
            }
        )
        drawn.append(replace(film, drawing=replace(film.drawing, absorption=NOTHING)))  # the masks are all that is left
    _add_truth(root, name, site, seed, rows, drawn)
    return rows


def _add_truth(
    root: Path, name: str, site: PhantomSite, seed: int, rows: list[dict[str, Any]], films: list[_Film]
) -> None:
    """Add what this site's readers have labelled to its rows, and write the masks; the rest leaves no trace."""

    def chosen(task: str) -> list[bool]:
        share = 1.0 if site.labelled is None else site.labelled.get(task, 0.0)
        order = _stream(seed, name, "labels", task).permutation(len(films))
        return [bool(rank < round(share * len(films))) for rank in order]

    classes = CLASSIFICATION[site.organ].name
    has_class, has_boxes = chosen(classes), chosen("lesions")
    for row, film, cls, det in zip(rows, films, has_class, has_boxes, strict=True):
        lesions = film.drawing.lesions if det else []
        row |= {
            "has_cls": int(cls),
            "label": film.label if cls else "",
            classes: film.label if cls else "",
            "has_det": int(det),
            "boxes": json.dumps([enclosing_box(mask) for _, mask in lesions]),
            "box_labels": json.dumps([kind for kind, _ in lesions]),
        }
    for i, task in enumerate(MASKS[site.organ]):
        for row, film, known in zip(rows, films, chosen(task.name), strict=True):
            row |= {f"has_{task.name}": int(known), f"mask_{task.name}": ""}
            if known:
                mask = film.drawing.diseased if i else film.drawing.organ
                file = f"masks/{name}/{Path(row['image']).stem}_{task.name}.png"
                Image.fromarray(np.where(mask, 255, 0).astype(np.uint8)).save(root / file)
                row[f"mask_{task.name}"] = file


def _chests(name: str, site: PhantomSite, size: int, seed: int) -> Iterator[_Film]:
    for patient in range(site.patients):
        chest = Chest.sample(_stream(seed, name, "anatomy", patient))
        rng = _stream(seed, name, "disease", patient)
        diseased = rng.random() < site.prevalence
        opacities = sample_opacities(rng, "consolidation" if rng.random() < 0.5 else "ground_glass")
        rng = _stream(seed, name, "films", patient)
        for number in range(1 + (rng.random() < 0.25)):
            portable = bool(rng.random() < 0.25)
            pose, shift = chest.posed(rng, portable)
            drawing = draw_chest(pose, opacities if diseased else [], size, shift, site.marker)
            kinds = {kind for kind, _ in drawing.lesions}
            label = next((k for k in ("consolidation", "ground_glass") if k in kinds), "clear")
            yield _Film(patient, "AP" if portable else "PA", None, number, drawing, label)


def _breasts(name: str, site: PhantomSite, size: int, seed: int) -> Iterator[_Film]:
    for patient in range(site.patients):
        breast = Breast.sample(_stream(seed, name, "anatomy", patient))
        for s, side in enumerate(SIDES):
            rng = _stream(seed, name, "disease", patient, s)
            diseased, malignant = rng.random() < site.prevalence, bool(rng.random() < 0.5)
            lesions = sample_breast_lesions(rng, malignant)
            for v, view in enumerate(VIEWS):
                drawing = draw_breast(breast, lesions if diseased else [], side, view, size, site.marker)
                label = ("malignant" if malignant else "benign") if diseased else "normal"
                yield _Film(patient, view, side, 2 * s + v, drawing, label)


def _splits(patients: int, rng: Generator) -> list[str]:
    """Return a suggested split of each patient: 15 % test, 15 % val, the rest train."""
    rank = rng.permutation(patients)
    test, val = round(0.15 * patients), round(0.3 * patients)
    return ["test" if r < test else "val" if r < val else "train" for r in rank]


def _stream(seed: int, *purpose: str | int) -> Generator:
    """Return a random stream of its own for each purpose, so that no dial disturbs what another one draws."""
    digest = hashlib.blake2b(json.dumps([seed, *purpose]).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


def enclosing_box(mask: Bool) -> list[int]:
    """Return the smallest box ``[x0, y0, x1, y1]`` (exclusive ends) around a mask that is not empty."""
    ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return [int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1]
