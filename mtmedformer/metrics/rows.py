"""Files with the results of every image by metric, to compare two models per patient without identifying patients.

A file holds, for every task, the tables of its metric and the keyed hashes of image and patient. Two runs with the same
salt have the same hashes for the same images, so that they can be paired.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mtmedformer.batch import Task
from mtmedformer.errors import DataError
from mtmedformer.metrics.base import Evaluate, TaskMetrics
from mtmedformer.metrics.calibration import CalibrationMetrics
from mtmedformer.metrics.classification import ClassificationMetrics
from mtmedformer.metrics.detection import DetectionMetrics
from mtmedformer.metrics.referral import ReferralMetrics
from mtmedformer.metrics.regression import OrdinalMetrics, RegressionMetrics
from mtmedformer.metrics.segmentation import SegmentationMetrics
from mtmedformer.storage.atomic_write import atomic_write

KINDS = (
    CalibrationMetrics,
    ClassificationMetrics,
    DetectionMetrics,
    OrdinalMetrics,
    ReferralMetrics,
    RegressionMetrics,
    SegmentationMetrics,
)
"""Kinds of metric that a file may name; those of other packages are found once they have been imported."""

COLUMNS = ("image", "patient", "site", "view")


@dataclass(frozen=True)
class TaskRows:
    """The labelled images of one task, and the metric that scores them.

    Attributes:
        metric: Filled with the images.
        rows: (n,) row of each image in the metric's tables.
        images: (n,) keyed hash of each image.
        patients: (n,) keyed hash of each image's patient and site.
        sites: (n,) site of each image.
    """

    metric: TaskMetrics
    rows: NDArray[np.int64]
    images: NDArray[np.str_]
    patients: NDArray[np.str_]
    sites: NDArray[np.str_]

    def evaluate(self, chosen: NDArray[np.int64] | None = None) -> Evaluate:
        """Return the function that evaluates the chosen images with weights; see ``TaskMetrics.prepare``.

        Args:
            chosen: Places of the images in ``rows``; ``None`` takes all.
        """
        return self.metric.prepare(self.rows if chosen is None else self.rows[chosen])


def save_rows(metrics: Mapping[str, TaskMetrics], file: Path, salt: str) -> None:
    """Write the rows of every task atomically. In distributed runs the metrics have to be synced.

    Args:
        metrics: Metrics by task name.
        file: The ``.npz`` to write.
        salt: Key of the hashes; without it a known patient cannot be found in the file.
    """
    arrays: dict[str, NDArray[Any]] = {}
    about: dict[str, Any] = {}
    for task, metric in metrics.items():
        known = metric.table("images").numpy().tobytes().decode().splitlines()
        lines = [json.loads(line) for line in known]
        rows = metric.seen().rows
        people = [lines[row] for row in rows]
        columns = {
            "image": [keyed(identity, salt) for identity, *_ in people],
            "patient": [keyed(f"{site}\x00{patient}", salt) for _, patient, site, *_ in people],
            "site": [site for _, _, site, *_ in people],
            "view": [view or "" for _, _, _, view, *_ in people],
        }
        arrays |= {f"{task}|{name}": np.array(values, dtype=np.str_) for name, values in columns.items()}
        arrays |= {f"{task}|row": rows, f"{task}|registered": np.array(len(lines))}
        arrays |= {f"{task}|table|{n}": metric.table(n).numpy() for n in metric.no_rows if n != "images"}
        about[task] = {"class_path": _path(type(metric)), "init_args": _arguments(metric)}
    arrays["about"] = np.array(json.dumps(about))
    with atomic_write(file) as part, part.open("wb") as out:
        np.savez_compressed(out, **arrays)  # type: ignore[arg-type]


def load_rows(files: Sequence[Path]) -> dict[str, TaskRows]:
    """Read rows back by task; several files (the sites' own models, each at its own site) become one table.

    Nothing in a file can run code: classes are looked up among the metrics that are there.

    Raises:
        DataError: When a file is not one of rows, or names a metric that is unknown here.
    """
    parts: dict[str, list[dict[str, NDArray[Any]]]] = {}
    made: dict[str, TaskMetrics] = {}
    for file in files:
        try:
            with np.load(file, allow_pickle=False) as held:
                arrays = {key: held[key] for key in held.files}
            about = json.loads(str(arrays.pop("about")))
            for task, kind in about.items():
                made.setdefault(task, _made(kind, file))
                own = {key.split("|", 1)[1]: value for key, value in arrays.items() if key.split("|")[0] == task}
                parts.setdefault(task, []).append(own)
        except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
            raise DataError(f"{file}: not a file of rows ({type(error).__name__}: {error}); run the cell again") from (
                error
            )
    return {task: _joined(metric, parts[task]) for task, metric in made.items()}


def _joined(metric: TaskMetrics, parts: Sequence[dict[str, NDArray[Any]]]) -> TaskRows:
    for name in metric.no_rows:
        if name != "images":
            setattr(metric, name, [torch.from_numpy(part[f"table|{name}"]) for part in parts])
    starts = np.cumsum([0, *(int(part["registered"]) for part in parts)])
    columns = {name: np.concatenate([part[name] for part in parts]) for name in COLUMNS}
    return TaskRows(
        metric=metric,
        rows=np.concatenate([part["row"] + start for part, start in zip(parts, starts, strict=False)]),
        images=columns["image"],
        patients=columns["patient"],
        sites=columns["site"],
    )


def keyed(text: str, salt: str) -> str:
    """Return a keyed hash of text: 24 hexadecimal digits."""
    return hashlib.blake2b(text.encode(), key=salt.encode()[:64], digest_size=12).hexdigest()


def _arguments(metric: TaskMetrics) -> dict[str, Any]:
    """Return the constructor arguments of a metric, which are attributes of the same names."""
    arguments = {name: getattr(metric, name) for name in inspect.signature(type(metric)).parameters}
    return {name: asdict(value) if isinstance(value, Task) else value for name, value in arguments.items()}


def _made(kind: dict[str, Any], file: Path) -> TaskMetrics:
    """Build the empty metric that a file names."""
    values = dict(kind["init_args"])
    if isinstance(values.get("task"), dict):
        values["task"] = Task(**{**values["task"], "classes": tuple(values["task"]["classes"])})
    return _class(kind["class_path"], file)(**values)


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _class(path: str, file: Path) -> type[TaskMetrics]:
    classes, pending = {}, [TaskMetrics]
    while pending:
        kind = pending.pop()
        classes[_path(kind)] = kind
        pending += kind.__subclasses__()
    if path not in classes:
        raise DataError(f"{file}: scored by {path}, a class that is not imported; import it, or run the cell again")
    return classes[path]
