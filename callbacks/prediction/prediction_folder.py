"""Folder of predictions: files are written atomically, one JSON per finished image, and tables made from these.

A run that was interrupted continues with the images without a JSON.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mtmedformer.errors import ConfigError
from mtmedformer.inference.results import ABOUT, NOTE
from mtmedformer.protocols import WritesPredictions
from mtmedformer.storage.atomic_write import atomic_write
from mtmedformer.storage.hashing import file_digest
from mtmedformer.storage.safe_text import cell, printable

Json = dict[str, Any]

IMAGES = "images"
"""Folder of the JSON files, one per image."""

_FINISHED = ("files", "row", "boxes", "size", "input")
"""Keys of the JSON of a predicted image, besides its id."""

_NUMBER = re.compile(r"-?\d+(\.\d+)?")

PART, PATH = 100, 500
"""Longest part of a path, and longest path below the folder, in bytes."""


def predictions_root(trainer: Any, given: str | None = None) -> Path:
    """Return the output folder: the given one, that of the ``PredictionWriter``, or ``predictions`` in the run folder.

    Args:
        trainer: A Lightning Trainer.
        given: Configured folder of the callback, if any.
    """
    of_writer = (c.predictions_root for c in trainer.callbacks if isinstance(c, WritesPredictions))
    return Path(given or next(filter(None, of_writer), None) or Path(trainer.default_root_dir, "predictions"))


def safe_name(name: str) -> str:
    """Return the id of an image as a relative path that is valid on any file system, unique per id."""
    parts = [_shortened(re.sub(r"[^\w.-]+", "_", part).lstrip("."), PART) for part in name.split("/")]
    safe = "/".join(part or "_" for part in parts)
    if len(safe.encode()) > PATH:  # deep folders, whose path below the output folder might be too long
        safe = _shortened(safe.replace("/", "_"), PART)
    return safe if safe == name else f"{safe}-{_digest(name)}"


def safe_class(name: str) -> str:
    """Return the name of a class as a part of a file name; names without separators or control characters stay."""
    safe = _shortened(re.sub(r"[/\\\x00-\x1f\x7f]", "_", printable(name)), PART)
    return safe if safe == name else f"{safe}-{_digest(name)}"


def _shortened(text: str, limit: int) -> str:
    return text.encode()[:limit].decode(errors="ignore")


def _digest(name: str) -> str:
    return hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=4).hexdigest()


class PredictionFolder:
    """Predictions of one model.

    Args:
        root: The folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, kind: str, image: str, ending: str) -> Path:
        """Return the path of a file of an image: ``<root>/<kind>/<image><ending>``."""
        return self.root / kind / f"{safe_name(image)}{ending}"

    def prepare(self, about: Json, resume: bool) -> None:
        """Write the description of the run; remove partial files and entries of failed images of earlier runs.

        Args:
            about: Model and settings, as JSON.
            resume: Keep finished images; otherwise all earlier predictions are removed.

        Raises:
            ConfigError: The finished predictions are of another model, or were made with other settings.
        """
        file = self.root / ABOUT
        if file.is_file():
            if resume:
                _refuse_to_mix(self.root, _about(file), about)
            for part in self.root.rglob(".*.part"):
                part.unlink(missing_ok=True)
            for marker in self._markers():
                entry = _read(marker)
                if entry is not None and (not resume or "failed" in entry):
                    self._remove(marker, entry)
        with atomic_write(file) as part:
            part.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")

    def finished(self, files: Mapping[str, Path]) -> set[str]:
        """Return the finished images: predicted from a file of the same content, with all output files present."""
        return {image for image, file in files.items() if self._is_finished(image, file)}

    def finish(self, image: str, entry: Json) -> None:
        """Write the JSON of an image; call it after all its other files are written."""
        with atomic_write(self.path(IMAGES, image, ".json")) as part:
            part.write_text(json.dumps(entry, indent=1) + "\n", encoding="utf-8")

    def entries(self) -> Iterator[Json]:
        """Yield the JSON of every predicted or failed image, in the order of their paths."""
        for marker in self._markers():
            entry = _read(marker)
            if entry is not None:
                yield entry

    def write_tables(self, tasks: Json) -> int:
        """Write ``predictions.csv``, ``boxes.json`` and ``failed.csv`` from the JSON files.

        No cell of text is a formula to a spreadsheet (see ``mtmedformer.storage.safe_text.cell``).

        Args:
            tasks: Kind and classes of each task, in the order of the columns.

        Returns:
            Number of failed images.
        """
        columns: dict[str, None] = {}
        for entry in self.entries():
            columns |= dict.fromkeys(entry.get("row", {}))
        with atomic_write(self.root / "predictions.csv") as part, part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([cell(column) for column in columns])
            writer.writerows([_cell(e["row"].get(c, "")) for c in columns] for e in self.entries() if "row" in e)
        with atomic_write(self.root / "boxes.json") as part:
            self._write_coco(part, tasks)
        failed = [entry for entry in self.entries() if "failed" in entry]
        with atomic_write(self.root / "failed.csv") as part, part.open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["image", "reason", "detail", "note"])
            rows.writerows([cell(e["image"]), e["failed"], cell(printable(e.get("detail", ""))), NOTE] for e in failed)
        return len(failed)

    def _write_coco(self, part: Path, tasks: Json) -> None:
        """Write all boxes in COCO format, one image at a time; a box also has a ``score`` and a ``task``."""
        classes = [(name, c) for name, task in tasks.items() if task["kind"] == "detection" for c in task["classes"]]
        category = {key: number for number, key in enumerate(classes, start=1)}
        with part.open("w", encoding="utf-8") as file:
            head = {
                "info": {"description": f"MTMedFormer predictions, {NOTE}"},
                "categories": [{"id": n, "name": c, "supercategory": task} for (task, c), n in category.items()],
            }
            file.write(json.dumps(head)[:-1] + ', "images": [')
            for number, entry in enumerate(self._predicted(), start=1):
                height, width = entry["size"]
                image = {"id": number, "file_name": entry["image"], "width": width, "height": height}
                file.write(("\n" if number == 1 else ",\n") + json.dumps(image))
            file.write('], "annotations": [')
            count = 0
            for number, entry in enumerate(self._predicted(), start=1):
                for task, boxes in entry["boxes"].items():
                    for box in boxes:
                        count += 1
                        ids = {"id": count, "image_id": number, "category_id": category[task, box["class"]]}
                        file.write(("\n" if count == 1 else ",\n") + json.dumps(ids | _coco(box) | {"task": task}))
            file.write("]}\n")

    def _predicted(self) -> Iterator[Json]:
        return (entry for entry in self.entries() if "row" in entry)

    def _is_finished(self, image: str, file: Path) -> bool:
        entry = _read(self.path(IMAGES, image, ".json"))
        if entry is None or "failed" in entry or entry["image"] != image:
            return False
        if not all((self.root / name).is_file() for name in entry["files"]):
            return False
        known = entry["input"]
        try:
            now = file.stat()
        except OSError:  # it is gone, or not readable any more: predicting it again gives the reason
            return False
        if known is None:
            return False
        if (known["bytes"], known["modified"]) == (now.st_size, now.st_mtime_ns):
            return True
        return bool(known["bytes"] == now.st_size and known["sha256"] == _readable_digest(file))

    def _markers(self) -> list[Path]:
        return sorted((self.root / IMAGES).rglob("*.json"))

    def _remove(self, marker: Path, entry: Json) -> None:
        root = os.path.realpath(self.root)
        for name in entry.get("files", []):
            file = Path(os.path.realpath(self.root / name))
            if file.is_relative_to(root) and file.is_file():  # the JSON may come from elsewhere
                file.unlink()
        marker.unlink(missing_ok=True)


def _cell(value: Any) -> Any:
    """Return a value of a row; probabilities and areas are numbers as text and stay as they are."""
    return value if not isinstance(value, str) or _NUMBER.fullmatch(value) else cell(value)


def _readable_digest(file: Path) -> str:
    try:
        return file_digest(file)
    except OSError:
        return ""


def _coco(box: Json) -> Json:
    x0, y0, x1, y1 = box["xyxy"]
    sides = [round(x1 - x0, 2), round(y1 - y0, 2)]
    return {
        "bbox": [x0, y0, *sides],
        "area": round(sides[0] * sides[1], 2),
        "iscrowd": 0,
        "score": box["score"],
        "category": box["class"],
    }


def _read(marker: Path) -> Json | None:
    """Return the JSON of an image; ``None`` where it is missing or damaged, so that the image is predicted again."""
    try:
        entry = json.loads(marker.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    needed = {"image", "files"} if isinstance(entry, dict) and "failed" in entry else {"image", *_FINISHED}
    return entry if isinstance(entry, dict) and needed <= entry.keys() else None


def _about(file: Path) -> Json:
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: cannot be read ({type(error).__name__}); choose another --output") from error
    return about if isinstance(about, dict) else {}


def _refuse_to_mix(root: Path, there: Json, about: Json) -> None:
    """Refuse to mix predictions of two models or with different settings in one folder."""
    if there.get("model") != about["model"]:
        raise ConfigError(
            f"--output={root} holds predictions of model {there.get('model')}; this is model {about['model']}. "
            "Choose another folder"
        )
    now = json.loads(json.dumps(about))  # as read back from a file
    differing = [key for key in now["settings"] if now["settings"][key] != there.get("settings", {}).get(key)]
    if differing or now["tasks"] != there.get("tasks"):
        what = ", ".join(differing) or "tasks"
        raise ConfigError(
            f"--output={root} holds predictions with other settings ({what} differ); choose another folder, or use the "
            f"settings in {root / ABOUT}"
        )
