"""Generate the images and labels of phantom sites: drawing, scanner, DICOM files, masks and ``labels.csv``.

Anatomy and labels come from one random stream and the scanner from another, so that a changed scanner setting leaves
the anatomy and the labels as they are.
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
from scipy import ndimage

from datamodules.phantom.breast import Breast, draw_breast, sample_breast_lesions
from datamodules.phantom.chest import Chest, draw_chest, sample_opacities
from datamodules.phantom.dicom import write_dicom
from datamodules.phantom.drawing import SIDES, VIEWS, Bool, Drawing, Float
from datamodules.phantom.sites import BOUNDARIES, CLASSIFICATION, MASKS, QUANTITIES, PhantomSite

log = logging.getLogger(__name__)

VERSION = 3
"""Increased when the same settings draw other images or labels, so that older folders are not read."""

HEIGHT_MM = {"chest": 380.0, "breast": 260.0}
NOTHING = np.zeros((0, 0), np.float32)


def expose(
    absorption: Float, gamma: float, contrast: float, noise: float, blur: float, inverted: bool, rng: Generator
) -> Float:
    """Turn absorption into the grey values of a scanner, float32 (H, W) in [0, 1]; geometry does not change.

    Args:
        absorption: float32 (H, W) in [0, 1].
        gamma: Exponent of the response; below 1 brightens.
        contrast: Slope about mid-grey.
        noise: Standard deviation of the quantum noise at mid-grey; it grows with absorption, as fewer photons arrive.
        blur: Standard deviation of the blur in thousandths of the image height.
        inverted: Whether black and white are swapped without a mark in the file.
        rng: Source of the noise; the number of draws does not depend on the settings.
    """
    image = absorption
    if blur > 0:
        image = ndimage.gaussian_filter(image, blur * image.shape[0] / 1000)
    grain = rng.standard_normal(image.shape, dtype=np.float32)
    image = image + np.float32(noise) * (0.5 + image) * grain
    image = np.clip(0.5 + contrast * (np.clip(image, 0, 1) ** np.float32(gamma) - 0.5), 0, 1)
    shown: Float = (1 - image if inverted else image).astype(np.float32)
    return shown


def settings_key(sites: Mapping[str, PhantomSite], size: int, seed: int = 0) -> str:
    """Return the name of the folder of exactly these settings: 16 hexadecimal digits."""
    settings = {"version": VERSION, "size": size, "seed": seed, "sites": {n: asdict(s) for n, s in sites.items()}}
    return hashlib.blake2b(json.dumps(settings).encode(), digest_size=8).hexdigest()


def generate(folder: Path, sites: Mapping[str, PhantomSite], size: int, seed: int = 0) -> None:
    """Write the DICOM files, masks and ``labels.csv`` of all sites, completely or not at all.

    Args:
        folder: The folder to write; one that exists is complete and is kept.
        sites: Sites by name.
        size: Image height in pixels of sites without a size of their own.
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
            table[column] = table[column].fillna(0).astype(int)  # tasks of the other organ
        table.to_csv(partial / "labels.csv", index=False, lineterminator="\n")
        try:
            partial.rename(folder)
        except OSError:
            if not folder.exists():  # another process has written it meanwhile: the same files
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
    quantity: float


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
        drawn.append(replace(film, drawing=replace(film.drawing, absorption=NOTHING)))  # keep the masks only
    _add_truth(root, name, site, seed, rows, drawn)
    return rows


def _add_truth(
    root: Path, name: str, site: PhantomSite, seed: int, rows: list[dict[str, Any]], films: list[_Film]
) -> None:
    """Add the labels that this site has to its rows, and write its masks."""

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
    number, grade = QUANTITIES[site.organ]
    for row, film, counted, graded in zip(rows, films, chosen(number.name), chosen(grade.name), strict=True):
        value = round(film.quantity, 2)
        row[number.name] = value if counted else ""
        row[grade.name] = grade.classes[int(np.searchsorted(BOUNDARIES[site.organ], value))] if graded else ""


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
            extent = 100 * float((drawing.diseased & drawing.organ).sum() / drawing.organ.sum())
            yield _Film(patient, "AP" if portable else "PA", None, number, drawing, label, extent)


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
                yield _Film(patient, view, side, 2 * s + v, drawing, label, 100 * breast.density)


def _splits(patients: int, rng: Generator) -> list[str]:
    """Return the suggested split of each patient: 15 % test, 15 % val, 70 % train."""
    rank = rng.permutation(patients)
    test, val = round(0.15 * patients), round(0.3 * patients)
    return ["test" if r < test else "val" if r < val else "train" for r in rank]


def _stream(seed: int, *purpose: str | int) -> Generator:
    """Return a random stream per purpose, so that a setting does not change the draws of another purpose."""
    digest = hashlib.blake2b(json.dumps([seed, *purpose]).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


def enclosing_box(mask: Bool) -> list[int]:
    """Return the smallest box ``[x0, y0, x1, y1]`` (exclusive ends) around a mask that is not empty."""
    ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return [int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1]
