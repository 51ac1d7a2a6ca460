"""INbreast: the release's table, DICOM files and XML contours as records."""

from __future__ import annotations

import plistlib
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple
from xml.parsers.expat import ExpatError

from datamodules.base import MedicalDataModule
from datamodules.images.presets import BreastPreset, Preset
from datamodules.public.layout import files_below, locate, one_hot, read_table, require_records, rows_of
from datamodules.records import BoxTruth, Catalogue, MaskSource, MaskTruth, Record, Truth
from mtmedformer.batch import Task
from mtmedformer.errors import DataError

BIRADS, DENSITY = ("1", "2", "3", "4", "5", "6"), ("A", "B", "C", "D")
MASKS = ("mass", "calcification", "distortion", "asymmetry")
BOXES = ("mass", "calcification_cluster", "distortion", "asymmetry")
NAMES = {
    "mass": "mass",
    "spiculated region": "spiculation",
    "espiculated region": "spiculation",
    "calcification": "calcification",
    "calcifications": "calcification",
    "cluster": "cluster",
    "distortion": "distortion",
    "asimmetry": "asymmetry",
    "assymetry": "asymmetry",
    "asymmetry": "asymmetry",
}
"""Kind of a region by its name as the release spells it (lower case)."""
UNNAMED = re.compile(r"^(|unnamed|point ?\d*)$")
MASK_OF = {"spiculation": "mass", "cluster": "calcification"}
BOX_OF = {"mass": "mass", "cluster": "calcification_cluster", "distortion": "distortion", "asymmetry": "asymmetry"}

Point = tuple[float, float]


class Region(NamedTuple):
    """A region of an XML file: its kind (``None``: unknown) and its points in pixels of the image."""

    kind: str | None
    points: tuple[Point, ...]


class INbreastDataModule(MedicalDataModule):
    """INbreast: digital mammograms of 115 women with BI-RADS, density and exact contours.

    Expected below ``root``:

        INbreast.csv                              separated by semicolons
        AllDICOMs/<file>_<patient>_MG_R_CC_ANON.dcm
        AllXML/<file>.xml                         contours in pixels (OsiriX)

    Source: Moreira et al., Academic Radiology 2012, doi 10.1016/j.acra.2011.09.014.
    Licence: for research, by agreement with the authors; see the release's ``README``.

    Args:
        root: ``INbreast Release 1.0`` or a folder that contains it.
        birads_positive: Lowest BI-RADS that counts as positive in ``suspicion``.
        birads_3: Whether BI-RADS 3 (probably benign) is negative or left unknown in ``suspicion``.
        point_radius: Radius in pixels of the disc drawn for a point calcification.
        unknown_names: If a region's name is not in ``NAMES``: ``error`` raises and lists the names, ``unknown`` leaves
            ``lesions`` and ``lesion`` of that image unknown.
        preset: Framing and augmentation; by default cropped to the breast and turned to one side.
        kwargs: Arguments of `MedicalDataModule`.

    Raises:
        DataError: The layout is not found under ``root``, or a table is incomplete (on ``catalogue`` and ``setup``).
    """

    def __init__(
        self,
        root: Path,
        birads_positive: int = 4,
        birads_3: Literal["negative", "unknown"] = "negative",
        point_radius: float = 1.0,
        unknown_names: Literal["error", "unknown"] = "error",
        preset: Preset | None = BreastPreset(),  # noqa: B008  presets have no state
        **kwargs: Any,
    ) -> None:
        super().__init__(preset=preset, **kwargs)
        self.root = Path(root)
        self.birads_positive = birads_positive
        self.birads_3 = birads_3
        self.point_radius = point_radius
        self.unknown_names = unknown_names

    def catalogue(self) -> Catalogue:
        """Read the tables and list the files as records; see ``read_catalogue`` in this module."""
        return read_catalogue(self.root, self.birads_positive, self.birads_3, self.point_radius, self.unknown_names)


def read_catalogue(
    root: Path,
    birads_positive: int = 4,
    birads_3: Literal["negative", "unknown"] = "negative",
    point_radius: float = 1.0,
    unknown_names: Literal["error", "unknown"] = "error",
) -> Catalogue:
    """Turn ``INbreast.csv``, ``AllDICOMs`` and ``AllXML`` into records.

    The patient is the second part of the DICOM's name: the table's own patient column reads ``removed``. An image
    without XML file is a true negative only if its BI-RADS is 1. A region of one or two points is a point
    calcification; it is part of the mask, never a box. A spiculated region belongs to the mask of its mass and is a
    box only where no mass lies in it.

    The arguments are those of `INbreastDataModule`.

    Returns:
        ``birads`` (4a–c are 4), ``suspicion``, ``density`` (ACR 1–4 as A–D), ``lesions`` (one box per region) and
        ``lesion`` (masks).

    Raises:
        DataError: The layout is missing, a table or XML file is incomplete, or a region has an unknown name.
    """
    folder = locate(root, ["INbreast.csv", "AllDICOMs"], "INbreast")
    table = folder / "INbreast.csv"
    rows = rows_of(read_table(table, ["Laterality", "View", "File Name", "ACR", "Bi-Rads"], sep=";"))
    files = {file.name.split("_")[0]: file for file in files_below(folder / "AllDICOMs", (".dcm",))}
    contours = {file.stem: file for file in files_below(folder / "AllXML", (".xml",))}
    strange: Counter[str] = Counter()

    records = []
    for row in rows:
        name = row["File Name"]
        if name not in files:
            continue
        tokens = files[name].stem.split("_")
        if len(tokens) < 2:
            raise DataError(f"{files[name]}: expected a name such as 20586908_<patient>_MG_R_CC_ANON.dcm")
        truth = _labels(row, table, birads_positive, birads_3)
        regions = read_regions(contours[name], strange) if name in contours else None
        if regions is None and contours and row["Bi-Rads"] == "1":
            regions = []
        if regions is not None and all(region.kind for region in regions):
            truth["lesion"] = _masks(regions, point_radius)
            boxes = _boxes(regions)
            truth |= {"lesions": boxes} if boxes else {}
        view = {"ML": "MLO"}.get(row["View"], row["View"])
        records.append(Record(name, files[name], tokens[1], truth, "inbreast", view=view, laterality=row["Laterality"]))
    require_records(records, "INbreast", folder / "AllDICOMs", len(rows))
    if strange and unknown_names == "error":
        listing = ", ".join(f"{name!r} ({count})" for name, count in sorted(strange.items()))
        raise DataError(
            f"INbreast: {folder / 'AllXML'} has regions of unknown name: {listing}; known are {', '.join(NAMES)}. Set "
            "unknown_names: unknown to leave the lesions of those images unknown"
        )
    notes = []
    if len(records) < len(rows):
        notes.append(f"INbreast: {len(rows) - len(records)} of {len(rows)} listed images are not on disk")
    unlisted = len(files.keys() - {row["File Name"] for row in rows})
    if unlisted:
        notes.append(f"INbreast: {unlisted} images on disk are not in {table.name} and were left out")
    unknown = sum("lesions" not in r.truth for r in records)
    if unknown:
        notes.append(
            f"INbreast: boxes or masks are unknown in {unknown} images (a region without usable name or extent, or no "
            "XML file although BI-RADS is above 1)"
        )
    tasks = (
        Task("birads", "classification", BIRADS),
        Task("suspicion", "classification", ("negative", "positive")),
        Task("density", "classification", DENSITY),
        Task("lesions", "detection", BOXES),
        Task("lesion", "segmentation", MASKS, multi_label=True),
    )
    return Catalogue({task.name: task for task in tasks}, records, notes)


def read_regions(file: Path, strange: Counter[str]) -> list[Region]:
    """Read an OsiriX plist; names that are not in ``NAMES`` are counted in ``strange`` and come back as ``None``.

    A point without a name, or called ``Point 1``, is a calcification (only those are marked by points).

    Raises:
        DataError: The file is not such a plist, or its counts of regions or points are wrong.
    """
    try:
        with file.open("rb") as stream:
            image = plistlib.load(stream, fmt=plistlib.FMT_XML)["Images"][0]
        raw: list[dict[str, Any]] = list(image["ROIs"])
        declared = int(image["NumberOfROIs"])
    except (plistlib.InvalidFileException, ExpatError, KeyError, IndexError, TypeError, ValueError) as error:
        raise DataError(f"{file} is not an OsiriX plist with Images[0].ROIs ({type(error).__name__})") from error
    if len(raw) != declared:
        raise DataError(f"{file}: NumberOfROIs is {declared}, but there are {len(raw)}")
    regions = []
    for roi in raw:
        points = _points(roi, file)
        name = " ".join(str(roi.get("Name", "")).lower().split())
        kind = NAMES.get(name)
        if kind is None and UNNAMED.match(name):
            kind = "calcification" if len(points) <= 2 else None
        elif kind is None:
            strange[str(roi.get("Name"))] += 1
        if points:
            regions.append(Region(kind, points))
    return regions


def _points(roi: dict[str, Any], file: Path) -> tuple[Point, ...]:
    """Return the points ``(x, y)`` = (column, row) of a region, written as ``"(2204.5, 1254.2)"``."""
    pairs = [re.findall(r"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?", str(text)) for text in roi.get("Point_px", [])]
    if len(pairs) != int(roi.get("NumberOfPoints", -1)) or any(len(pair) != 2 for pair in pairs):
        raise DataError(f"{file}: a region's Point_px does not hold NumberOfPoints pairs such as '(12.5, 30.0)'")
    return tuple((float(x), float(y)) for x, y in pairs)


def _labels(row: dict[str, str], table: Path, birads_positive: int, birads_3: str) -> dict[str, Truth]:
    match = re.fullmatch(r"([1-6])[abc]?", row["Bi-Rads"].lower())
    if match is None or row["ACR"] not in {"", "1", "2", "3", "4"}:
        raise DataError(
            f"{table}: image {row['File Name']} has Bi-Rads {row['Bi-Rads']!r} and ACR {row['ACR']!r}; expected "
            "1–6 (4a–4c) and 1–4 or blank"
        )
    birads = match[1]
    truth: dict[str, Truth] = {"birads": one_hot(BIRADS, birads)}
    if birads != "3" or birads_3 == "negative" or birads_positive <= 3:
        positive = int(birads) >= birads_positive
        truth["suspicion"] = one_hot(("negative", "positive"), "positive" if positive else "negative")
    if row["ACR"]:
        truth["density"] = one_hot(DENSITY, DENSITY[int(row["ACR"]) - 1])
    return truth


def _extent(points: Sequence[Point]) -> tuple[float, float, float, float]:
    xs, ys = [x for x, _ in points], [y for _, y in points]
    return min(xs), min(ys), max(xs), max(ys)


def _boxes(regions: Sequence[Region]) -> BoxTruth | None:
    """Return one box per mass, cluster, distortion and asymmetry, and per spiculated region without a mass in it.

    If one of them is only a point, it has no extent and the boxes are unknown (``None``).
    """
    masses = [_extent(r.points) for r in regions if r.kind == "mass" and len(r.points) > 2]
    boxes, labels = [], []
    for region in regions:
        kind = region.kind
        box = _extent(region.points)
        if kind == "spiculation" and not any(_meet(box, mass) for mass in masses):
            kind = "mass"
        if kind in BOX_OF:
            if len(region.points) <= 2 or box[2] <= box[0] or box[3] <= box[1]:
                return None
            boxes.append(box)
            labels.append(BOXES.index(BOX_OF[kind]))
    return BoxTruth(tuple(boxes), tuple(labels))


def _meet(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return min(a[2], b[2]) > max(a[0], b[0]) and min(a[3], b[3]) > max(a[1], b[1])


def _masks(regions: Sequence[Region], point_radius: float) -> MaskTruth:
    """Return one source per class; a class without region is annotated and empty. Points are pixels of the file."""
    polygons: dict[str, list[tuple[Point, ...]]] = {name: [] for name in MASKS}
    for region in regions:
        kind = region.kind or ""
        polygons[MASK_OF.get(kind, kind)].append(region.points)
    return MaskTruth(tuple(MaskSource(polygons=tuple(polygons[n]), point_radius=point_radius) for n in MASKS))
