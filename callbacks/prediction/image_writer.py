"""Files of one predicted image: masks, overlay, DICOM objects, and a JSON that is written last."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from callbacks.prediction.dicom.objects import DicomObjects
from callbacks.prediction.familiarity_of_images import columns
from callbacks.prediction.prediction_folder import PredictionFolder, safe_class
from mtmedformer.batch import Meta, Task
from mtmedformer.errors import DataError
from mtmedformer.geometry import Bytes, Floats
from mtmedformer.inference.results import NOTE, FoundBox, FoundValue, ImageResult
from mtmedformer.plots.predictions import prediction_figure, preview_from_input, preview_of
from mtmedformer.storage.atomic_write import atomic_write
from mtmedformer.storage.hashing import file_digest

Json = dict[str, Any]


@dataclass(frozen=True)
class ImageSource:
    """File of an image.

    Attributes:
        file: The image file.
        dicom: Whether it is DICOM.
        read: Function that reads the whole image, or a frame of it, as displayed.
        frame: The frame of a multi-frame file, from 1.
        state: ``file_state`` before it was predicted, if known.
    """

    file: Path
    dicom: bool
    read: Callable[[Path, int | None], Floats]
    frame: int | None = None
    state: tuple[int, int] | None = None


@dataclass(frozen=True)
class ImageWriter:
    """Writes the files of one image after the other.

    Attributes:
        folder: Output folder.
        model: Digest of the weights.
        tasks: Tasks of the model.
        box_thresholds: Minimum score of a box that counts, by task and class.
        class_thresholds: Minimum probability of a class that counts as found, by task and class; classes without an
            entry have no threshold.
        overlays: Whether to draw pictures.
        dicom: Builder of the DICOM objects, or ``None`` for no objects.
        refuse_unfamiliar: Whether an unfamiliar image gets a row in the tables and no prediction.
    """

    folder: PredictionFolder
    model: str
    tasks: Mapping[str, Task]
    box_thresholds: Mapping[tuple[str, str], float]
    class_thresholds: Mapping[tuple[str, str], float]
    overlays: bool
    dicom: DicomObjects | None
    refuse_unfamiliar: bool = False

    def write(self, result: ImageResult, image: Floats, source: ImageSource | None) -> None:
        """Write all files of an image, the JSON last.

        Args:
            result: Predictions in original pixels.
            image: float (h, w) or (h, w, 3): the network input; the overlay shows it where there is no source.
            source: File of the image, where it is known.

        Raises:
            DataError: The file of the image is gone or has changed since it was predicted.
        """
        problems = []
        digest = file_digest(source.file) if source else ""
        if source and source.state not in (None, file_state(source.file)):
            raise DataError("the file changed while it was predicted; repeat the command")
        if self.refuse_unfamiliar and result.familiarity is not None and result.familiarity.unfamiliar:
            self._refuse(result, source, digest)
            return
        written = {"masks": self._masks(result)}
        files = [entry["file"] for by_class in written["masks"].values() for entry in by_class.values()]
        if self.dicom and source and source.dicom:
            try:
                files += self._dicom(self.dicom, result, source)
            except DataError as error:
                problems.append(("no DICOM objects", str(error)))
        if self.overlays:
            try:
                files.append(self._overlay(result, image, source, digest))
            except DataError as error:  # the file changed after it was predicted
                problems.append(("no overlay", str(error)))
        entry = self._entry(result, source, digest) | written | {"files": files}
        if problems:
            entry |= {"failed": "; ".join(p[0] for p in problems), "detail": "; ".join(p[1] for p in problems)}
        self.folder.finish(result.meta.id, entry)

    def _refuse(self, result: ImageResult, source: ImageSource | None, digest: str) -> None:
        """List an unfamiliar image without a prediction."""
        assert result.familiarity is not None
        nothing = ImageResult(result.meta, familiarity=result.familiarity)
        why = {"failed": "refused: unlike the training images", "detail": "; ".join(result.familiarity.reasons)}
        self.folder.finish(result.meta.id, self._entry(nothing, source, digest) | {"masks": {}, "files": []} | why)

    def _masks(self, result: ImageResult) -> dict[str, dict[str, Json]]:
        description = PngImagePlugin.PngInfo()
        description.add_text("Description", f"MTMedFormer {self.model}, {NOTE}")
        entries: dict[str, dict[str, Json]] = {}
        for task, masks in result.masks.items():
            for c, mask in masks.items():
                file = self.folder.path(f"masks/{safe_class(task)}", result.meta.id, f"_{safe_class(c)}.png")
                with atomic_write(file) as part:
                    Image.fromarray(mask * np.uint8(255)).save(part, format="PNG", pnginfo=description)
                entries.setdefault(task, {})[c] = {"file": self._relative(file), **_area(mask, result.meta)}
        return entries

    def _dicom(self, objects: DicomObjects, result: ImageResult, source: ImageSource) -> list[str]:
        files = []
        read = source.read if "sc" in objects.kinds else None
        for kind, dataset in objects.build(source.file, result, source.frame, read).items():
            file = self.folder.path("dicom", result.meta.id, f".{kind}.dcm")
            with atomic_write(file) as part:
                dataset.save_as(part)
            files.append(self._relative(file))
        return files

    def _overlay(self, result: ImageResult, image: Floats, source: ImageSource | None, digest: str) -> str:
        shown = preview_of(source.read(source.file, source.frame)) if source else preview_from_input(image, result.meta)
        footer = f"MTMedFormer {self.model}" + (f" · image {digest}" if digest else "")
        figure = prediction_figure(shown, result, self.tasks, self.box_thresholds, footer)
        file = self.folder.path("overlays", result.meta.id, ".png")
        with atomic_write(file) as part:
            figure.savefig(part, format="png", dpi=160, metadata={"Description": NOTE})
        figure.clear()  # breaks reference cycles, which would keep images in memory until the next garbage collection
        return self._relative(file)

    def _relative(self, file: Path) -> str:
        return file.relative_to(self.folder.root).as_posix()

    def _entry(self, result: ImageResult, source: ImageSource | None, digest: str) -> Json:
        meta, stat = result.meta, source.file.stat() if source else None
        return {
            "image": meta.id,
            "note": NOTE,
            "model": self.model,
            "input": {"sha256": digest, "bytes": stat.st_size, "modified": stat.st_mtime_ns} if stat else None,
            "frame": source.frame if source else None,
            "size": list(meta.original_size),
            "spacing": meta.spacing,
            "site": meta.site,
            "view": meta.view,
            "laterality": meta.laterality,
            "case": meta.case,
            "classes": result.classes,
            "values": {task: asdict(value) for task, value in result.values.items()},
            "boxes": {task: [_box(box) for box in boxes] for task, boxes in result.boxes.items()},
            "uncertainty": result.uncertainty,
            "familiarity": asdict(result.familiarity) if result.familiarity else None,
            "row": self._row(result, digest),
        }

    def _row(self, result: ImageResult, digest: str) -> Json:
        """Return the row of the image in the CSV, with columns in the order of tasks and classes."""
        meta = result.meta
        row: Json = {"image": meta.id, "site": meta.site, "view": meta.view or "", "laterality": meta.laterality or ""}
        if meta.case is not None:
            row["case"] = meta.case
        if result.familiarity is not None:
            row |= columns(result.familiarity)
        for task in self.tasks:
            for c, p in result.classes.get(task, {}).items():
                row[f"{task}:{c}"] = f"{p:.4f}"
                if (task, c) in self.class_thresholds:
                    row[f"{task}:{c}:found"] = int(p >= self.class_thresholds[task, c])
            if task in result.values:
                row |= _value_cells(task, result.values[task])
            if task in result.boxes:
                boxes = result.boxes[task]
                row[f"{task}:boxes"] = sum(box.score >= self.box_thresholds[task, box.name] for box in boxes)
                row[f"{task}:best"] = f"{boxes[0].score:.4f}" if boxes else ""
            for c, mask in result.masks.get(task, {}).items():
                area = _area(mask, meta)
                row[f"{task}:{c}:pixels"] = area["pixels"]
                row[f"{task}:{c}:mm2"] = "" if area["mm2"] is None else f"{area['mm2']:.1f}"
            for measure, value in result.uncertainty.get(task, {}).items():
                row[f"{task}:{measure}"] = f"{value:.4f}"
        return row | {"model": self.model, "input": digest, "note": NOTE}


def file_state(file: Path) -> tuple[int, int] | None:
    """Return size in bytes and time of the last change in ns; ``None`` where there is no such file."""
    try:
        now = file.stat()
    except OSError:
        return None
    return now.st_size, now.st_mtime_ns


def _area(mask: Bytes, meta: Meta) -> Json:
    pixels = int(mask.sum())
    return {"pixels": pixels, "mm2": pixels * meta.spacing[0] * meta.spacing[1] if meta.spacing else None}


def _value_cells(task: str, value: FoundValue) -> Json:
    """Return the cells of a number with its interval, where there is one, or of a grade."""
    if value.grade is not None:
        return {f"{task}:grade": value.grade}
    ends = {"value": value.value, "low": value.low, "high": value.high}
    cells: Json = {f"{task}:{end}": f"{number:.6g}" for end, number in ends.items() if number is not None}
    return cells | ({f"{task}:unit": value.unit} if value.unit else {})


def _box(box: FoundBox) -> Json:
    return {"class": box.name, "score": round(box.score, 4), "xyxy": [round(v, 2) for v in box.xyxy]}
