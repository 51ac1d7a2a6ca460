"""All that is written of one image's prediction: masks, picture, DICOM objects, and the JSON that completes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from callbacks.prediction.dicom.outputs import DicomOutputs
from callbacks.prediction.prediction_files import PredictionFolder
from mtmedformer.batch import Meta, Task
from mtmedformer.errors import DataError
from mtmedformer.geometry import Bytes, Floats
from mtmedformer.inference.results import NOTE, Findings, FoundBox
from mtmedformer.plots.predictions import prediction_figure, preview_from_input, preview_of
from mtmedformer.storage.atomic_write import whole
from mtmedformer.storage.hashing import file_digest

Json = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """Where an image came from.

    Attributes:
        file: The image file.
        dicom: Whether it is DICOM.
        read: Reads the whole image as it is displayed.
    """

    file: Path
    dicom: bool
    read: Callable[[Path], Floats]


@dataclass(frozen=True)
class ImageOutputs:
    """Writes the outputs of one image after the other.

    Attributes:
        folder: Where to.
        model: Digest of the model's weights.
        tasks: The tasks of the model.
        least: Least score of a box that counts, by task and class.
        thresholds: Least probability of a class that counts as found, by task and class, where there is one.
        overlays: Whether to draw pictures.
        dicom: Makes the DICOM objects, or ``None`` for none.
    """

    folder: PredictionFolder
    model: str
    tasks: Mapping[str, Task]
    least: Mapping[tuple[str, str], float]
    thresholds: Mapping[tuple[str, str], float]
    overlays: bool
    dicom: DicomOutputs | None

    def write(self, found: Findings, image: Floats, source: Source | None) -> None:
        """Write everything of an image; its JSON comes last.

        Args:
            found: What was found in the image, in its original frame.
            image: float (h, w): the network's input, which the picture shows where there is no source.
            source: The image's file, where it is known.
        """
        problems = []
        digest = file_digest(source.file) if source else ""
        written = {"masks": self._masks(found)}
        files = [entry["file"] for by_class in written["masks"].values() for entry in by_class.values()]
        if self.dicom and source and source.dicom:
            try:
                files += self._dicom(self.dicom, found, source.file)
            except DataError as error:
                problems.append(("no DICOM objects", str(error)))
        if self.overlays:
            try:
                files.append(self._overlay(found, image, source, digest))
            except DataError as error:  # it could be read when it was predicted
                problems.append(("no overlay", str(error)))
        entry = self._entry(found, source, digest) | written | {"files": files}
        if problems:
            entry |= {"failed": "; ".join(p[0] for p in problems), "detail": "; ".join(p[1] for p in problems)}
        self.folder.finish(found.meta.id, entry)

    def _masks(self, found: Findings) -> dict[str, dict[str, Json]]:
        about = PngImagePlugin.PngInfo()
        about.add_text("Description", f"MTMedFormer {self.model}, {NOTE}")
        entries: dict[str, dict[str, Json]] = {}
        for task, masks in found.masks.items():
            for c, mask in masks.items():
                file = self.folder.path(f"masks/{task}", found.meta.id, f"_{c}.png")
                with whole(file) as part:
                    Image.fromarray(mask * np.uint8(255)).save(part, format="PNG", pnginfo=about)
                entries.setdefault(task, {})[c] = {"file": self._relative(file), **_area(mask, found.meta)}
        return entries

    def _dicom(self, outputs: DicomOutputs, found: Findings, source: Path) -> list[str]:
        files = []
        for kind, made in outputs.make(source, found).items():
            file = self.folder.path("dicom", found.meta.id, f".{kind}.dcm")
            with whole(file) as part:
                made.save_as(part)
            files.append(self._relative(file))
        return files

    def _overlay(self, found: Findings, image: Floats, source: Source | None, digest: str) -> str:
        shown = preview_of(source.read(source.file)) if source else preview_from_input(image, found.meta)
        footer = f"MTMedFormer {self.model}" + (f" · image {digest}" if digest else "")
        figure = prediction_figure(shown, found, self.tasks, self.least, footer)
        file = self.folder.path("overlays", found.meta.id, ".png")
        with whole(file) as part:
            figure.savefig(part, format="png", dpi=160, metadata={"Description": NOTE})
        figure.clear()  # its parts hold one another; without this films pile up until Python looks for such rings
        return self._relative(file)

    def _relative(self, file: Path) -> str:
        return file.relative_to(self.folder.root).as_posix()

    def _entry(self, found: Findings, source: Source | None, digest: str) -> Json:
        meta, stat = found.meta, source.file.stat() if source else None
        return {
            "image": meta.id,
            "note": NOTE,
            "model": self.model,
            "input": {"sha256": digest, "bytes": stat.st_size, "modified": stat.st_mtime_ns} if stat else None,
            "size": list(meta.original_size),
            "spacing": meta.spacing,
            "site": meta.site,
            "view": meta.view,
            "laterality": meta.laterality,
            "classes": found.classes,
            "boxes": {task: [_box(box) for box in boxes] for task, boxes in found.boxes.items()},
            "uncertainty": found.uncertainty,
            "row": self._row(found, digest),
        }

    def _row(self, found: Findings, digest: str) -> Json:
        """Return the image's line in the CSV: columns by task, in the order of tasks and classes."""
        meta = found.meta
        row: Json = {"image": meta.id, "site": meta.site, "view": meta.view or "", "laterality": meta.laterality or ""}
        for task in self.tasks:
            for c, p in found.classes.get(task, {}).items():
                row[f"{task}:{c}"] = f"{p:.4f}"
                if (task, c) in self.thresholds:
                    row[f"{task}:{c}:found"] = int(p >= self.thresholds[task, c])
            if task in found.boxes:
                boxes = found.boxes[task]
                row[f"{task}:boxes"] = sum(box.score >= self.least[task, box.name] for box in boxes)
                row[f"{task}:best"] = f"{boxes[0].score:.4f}" if boxes else ""
            for c, mask in found.masks.get(task, {}).items():
                area = _area(mask, meta)
                row[f"{task}:{c}:pixels"] = area["pixels"]
                row[f"{task}:{c}:mm2"] = "" if area["mm2"] is None else f"{area['mm2']:.1f}"
            for measure, value in found.uncertainty.get(task, {}).items():
                row[f"{task}:{measure}"] = f"{value:.4f}"
        return row | {"model": self.model, "input": digest, "note": NOTE}


def _area(mask: Bytes, meta: Meta) -> Json:
    pixels = int(mask.sum())
    return {"pixels": pixels, "mm2": pixels * meta.spacing[0] * meta.spacing[1] if meta.spacing else None}


def _box(box: FoundBox) -> Json:
    return {"class": box.name, "score": round(box.score, 4), "xyxy": [round(v, 2) for v in box.xyxy]}
