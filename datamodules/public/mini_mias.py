"""mini-MIAS: the images and ``Info.txt`` as records."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from datamodules.base import MedicalDataModule
from datamodules.images.presets import BreastPreset, Preset
from datamodules.public.layout import clipped, files_below, locate, one_hot, require_records
from datamodules.records import Catalogue, ClassTruth, MaskSource, MaskTruth, Record, Truth
from mtmedformer.batch import Task
from mtmedformer.errors import DataError

SIDE = 1024
TISSUES = {"F": "fatty", "G": "fatty_glandular", "D": "dense_glandular"}
SEVERITIES = {"B": "benign", "M": "malignant"}
PATHOLOGY = ("normal", "benign", "malignant")
ABNORMALITIES = {
    "CALC": "calcification",
    "CIRC": "circumscribed_mass",
    "SPIC": "spiculated_mass",
    "MISC": "other_mass",
    "ARCH": "architectural_distortion",
    "ASYM": "asymmetry",
}
LINE = re.compile(r"^(mdb\d{3})\s+([FGD])\s+(NORM|CALC|CIRC|SPIC|MISC|ARCH|ASYM)(?:\s+([BM]))?(?:\s+(\S.*?))?\s*$")


class InfoRow(NamedTuple):
    """One line of ``Info.txt``; ``circle`` is ``(x, y, radius)`` with y from the top, or ``None``."""

    image: str
    tissue: str
    abnormality: str
    severity: str | None
    circle: tuple[float, float, float] | None


class MiniMIASDataModule(MedicalDataModule):
    """mini-MIAS: 322 film mammograms (MLO), 1024 × 1024 pixels, with a circle around each abnormality.

    Expected below ``root``:

        Info.txt (or README)
        mdb001.pgm … mdb322.pgm

    Source: Suckling et al., Excerpta Medica ICS 1069 (1994) 375-378. Licence: for research; see the set's own licence
    agreement.

    Args:
        root: Folder with the images and ``Info.txt`` (or ``README``), or one that contains it.
        lesion_classes: Classes of ``lesions`` and ``lesion``: one, by severity, or by abnormality.
        preset: Framing and augmentation; by default cropped to the breast and turned to one side.
        kwargs: Arguments of `MedicalDataModule`.

    Raises:
        DataError: The layout is not found under ``root``, or a table is incomplete (on ``catalogue`` and ``setup``).
    """

    def __init__(
        self,
        root: Path,
        lesion_classes: Literal["lesion", "severity", "abnormality"] = "lesion",
        preset: Preset | None = BreastPreset(),  # noqa: B008  presets have no state
        **kwargs: Any,
    ) -> None:
        super().__init__(preset=preset, **kwargs)
        self.root = Path(root)
        self.lesion_classes = lesion_classes

    def catalogue(self) -> Catalogue:
        """Read the tables and list the files as records; see ``read_catalogue`` in this module."""
        return read_catalogue(self.root, self.lesion_classes)


def read_catalogue(root: Path, lesion_classes: Literal["lesion", "severity", "abnormality"] = "lesion") -> Catalogue:
    """Turn ``mdb001.pgm … mdb322.pgm`` and ``Info.txt`` into records.

    Boxes and masks come from circles, so both tasks are weak. An image with an abnormality that has no circle (a widely
    spread calcification) is *unknown* for them; a normal image is a true negative. Films come in pairs of one woman:
    an odd number is the right breast, the next even number the left one.

    The arguments are those of `MiniMIASDataModule`.

    Returns:
        ``pathology`` (normal, benign, malignant: the worst of the image), ``abnormality`` (several may hold),
        ``tissue`` (background; ``groups["client"]`` is the usual split into federated sites), ``lesions`` and
        ``lesion``.

    Raises:
        DataError: The layout is missing, or a line of the table cannot be read.
    """
    folder = locate(root, ["Info.txt|README|README.txt|info.txt"], "mini-MIAS")
    table = next(folder / name for name in ("Info.txt", "info.txt", "README", "README.txt") if (folder / name).exists())
    by_image: dict[str, list[InfoRow]] = {}
    for row in read_rows(table):
        by_image.setdefault(row.image, []).append(row)
    files = {file.stem: file for file in reversed(files_below(folder, (".pgm", ".png")))}

    classes = {
        "lesion": ("lesion",),
        "severity": tuple(SEVERITIES.values()),
        "abnormality": tuple(ABNORMALITIES.values()),
    }[lesion_classes]
    records, unlocated = [], 0
    for image, rows in by_image.items():
        if image not in files:
            continue
        number = int(image[3:])
        truth, located = _truth(rows, classes, lesion_classes)
        unlocated += not located
        records.append(
            Record(
                image,
                files[image],
                f"mias{(number + 1) // 2:03d}",
                truth,
                "mini_mias",
                view="MLO",
                laterality="R" if number % 2 else "L",
                weak=frozenset({"lesions", "lesion"}) & truth.keys(),
                groups={"client": f"tissue_{rows[0].tissue}"},
                size=(SIDE, SIDE),
            )
        )
    require_records(records, "mini-MIAS", folder, len(by_image))
    notes = []
    if len(records) < len(by_image):
        notes.append(f"mini-MIAS: {len(by_image) - len(records)} of {len(by_image)} listed images are not on disk")
    if unlocated:
        notes.append(
            f"mini-MIAS: {unlocated} abnormal images have a finding without position; 'lesions' and 'lesion' unknown"
        )
    tasks = (
        Task("pathology", "classification", PATHOLOGY),
        Task("abnormality", "classification", tuple(ABNORMALITIES.values()), multi_label=True),
        Task("tissue", "classification", tuple(TISSUES.values())),
        Task("lesions", "detection", classes, weak=True),
        Task("lesion", "segmentation", classes, multi_label=True, weak=True),
    )
    return Catalogue({task.name: task for task in tasks}, records, notes)


def read_rows(table: Path) -> list[InfoRow]:
    """Read the lines ``REFNUM BG CLASS [SEVERITY X Y RADIUS]``; other text is skipped.

    The origin is the bottom-left corner (note 3): pixel row ``1023 - y``, whose centre lies at ``1023.5 - y`` from the
    top.
    """
    rows = []
    for line in table.read_text(encoding="latin-1").splitlines():
        if not re.match(r"^mdb\d", line):
            continue
        match = LINE.match(line)
        if match is None or (match[3] == "NORM") != (match[4] is None):
            raise DataError(f"{table}: line {line!r} is not 'REFNUM TISSUE CLASS [SEVERITY X Y RADIUS]'")
        rest, circle = match[5] or "", None
        if re.fullmatch(r"\d+\s+\d+\s+\d+", rest):
            x, y, radius = (int(part) for part in rest.split())
            circle = (x + 0.5, SIDE - 1 - y + 0.5, float(radius))
        elif rest and "NOTE" not in rest:
            raise DataError(f"{table}: line {line!r} ends in {rest!r}; expected X Y RADIUS or a *NOTE*")
        rows.append(InfoRow(match[1], match[2], match[3], match[4], circle))
    if not rows:
        raise DataError(f"{table} has no line that starts with an image name such as mdb001")
    return rows


def _truth(rows: Sequence[InfoRow], classes: tuple[str, ...], lesion_classes: str) -> tuple[dict[str, Truth], bool]:
    severities = {SEVERITIES[row.severity] for row in rows if row.severity}
    worst = next((name for name in ("malignant", "benign") if name in severities), "normal")
    abnormal = {ABNORMALITIES[row.abnormality] for row in rows if row.abnormality != "NORM"}
    truth: dict[str, Truth] = {
        "pathology": one_hot(PATHOLOGY, worst),
        "abnormality": ClassTruth(tuple(float(name in abnormal) for name in ABNORMALITIES.values())),
        "tissue": one_hot(tuple(TISSUES.values()), TISSUES[rows[0].tissue]),
    }
    lesions = [row for row in rows if row.abnormality != "NORM"]
    if any(row.circle is None for row in lesions):
        return truth, False
    boxes, labels = [], []
    discs: dict[int, list[tuple[float, float, float]]] = {}
    for row in lesions:
        assert row.circle is not None
        x, y, radius = row.circle
        name = {
            "lesion": "lesion",
            "severity": SEVERITIES.get(row.severity or "", ""),
            "abnormality": ABNORMALITIES[row.abnormality],
        }[lesion_classes]
        boxes.append((x - radius, y - radius, x + radius, y + radius))
        labels.append(classes.index(name))
        discs.setdefault(classes.index(name), []).append(row.circle)
    box_truth, outside = clipped(boxes, labels, SIDE, SIDE)
    if outside:
        return truth, False
    sources = tuple(MaskSource(discs=tuple(discs.get(index, ()))) for index in range(len(classes)))
    return truth | {"lesions": box_truth, "lesion": MaskTruth(sources)}, True
