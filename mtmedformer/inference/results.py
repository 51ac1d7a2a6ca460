"""The result of one image, in pixels of the original file: probabilities, numbers, boxes, masks and uncertainty."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtmedformer.batch import Meta, Task
from mtmedformer.calibration import TaskCalibration
from mtmedformer.encoders.familiarity import Assessment
from mtmedformer.errors import DataError
from mtmedformer.geometry import Bytes, boxes_in_original, mask_in_original
from mtmedformer.metrics.base import entropy
from mtmedformer.metrics.regression import median_grade

NOTE = "research use only"
"""Stands on everything that is written of a prediction."""

ABOUT = "about_predictions.json"
"""File in a folder of predictions that names the model and its settings; such a folder is never read as input."""

UNCERTAINTY = "uncertainty"
"""Key under which predictions may carry ``{task: {measure: numbers}}`` beside the tasks' own entries.

The numbers are one per image (B,), or one per pixel of the input (B, H, W), whose mean inside the image is taken."""


@dataclass(frozen=True)
class FoundBox:
    """One box.

    Attributes:
        name: Its class.
        score: In [0, 1].
        xyxy: ``(x0, y0, x1, y1)`` in pixels of the original image (see `mtmedformer.batch`), clipped to it.
    """

    name: str
    score: float
    xyxy: tuple[float, float, float, float]


@dataclass(frozen=True)
class FoundValue:
    """One number or grade.

    Attributes:
        value: The number in its unit, or the index of the grade.
        unit: Unit of the number; empty for none.
        low: Lower end of the interval; ``None`` without a calibration.
        high: Upper end of the interval, likewise.
        grade: Name of the grade; ``None`` for a number.
    """

    value: float
    unit: str = ""
    low: float | None = None
    high: float | None = None
    grade: str | None = None

    def __str__(self) -> str:
        if self.grade is not None:
            return self.grade
        ends = "" if self.low is None or self.high is None else f" ({self.low:.4g} to {self.high:.4g})"
        return f"{self.value:.4g}{ends}{f' {self.unit}' if self.unit else ''}"


@dataclass(frozen=True)
class ImageResult:
    """All predictions for one image.

    Attributes:
        meta: What is known of the image.
        classes: Probability of each class by classification task, and of each grade by regression task with grades.
        boxes: Boxes by detection task, the best first.
        masks: uint8 (H, W) of 0 and 1 for each class, by segmentation task.
        uncertainty: By task, numbers that are larger the less sure the model is (see `entropies`).
        values: Number or grade by regression task.
        familiarity: How familiar the image is to the model; ``None`` where that was not fitted.
    """

    meta: Meta
    classes: dict[str, dict[str, float]] = field(default_factory=dict)
    boxes: dict[str, list[FoundBox]] = field(default_factory=dict)
    masks: dict[str, dict[str, Bytes]] = field(default_factory=dict)
    uncertainty: dict[str, dict[str, float]] = field(default_factory=dict)
    values: dict[str, FoundValue] = field(default_factory=dict)
    familiarity: Assessment | None = None


def image_result(
    predictions: Mapping[str, Any],
    i: int,
    meta: Meta,
    tasks: Mapping[str, Task],
    score: float = 0.05,
    calibration: Mapping[str, TaskCalibration] | None = None,
) -> ImageResult:
    """Return the predictions of image ``i`` of a batch in pixels of its original file.

    Args:
        predictions: By task, in the formats of ``TaskHead.predict``; may carry more measures of uncertainty under
            `UNCERTAINTY`.
        i: Number of the image in the batch.
        meta: What is known of it.
        tasks: The tasks to take.
        score: Boxes below this score are left out.
        calibration: Calibration by task, for the intervals of numbers.

    Raises:
        DataError: An output is NaN or infinite.
    """
    check_finite(predictions, i, tasks)
    result = ImageResult(meta, uncertainty=entropies(predictions, i, meta, tasks))
    for name, task in tasks.items():
        if task.kind == "classification":
            result.classes[name] = dict(zip(task.classes, predictions[name][i].float().tolist(), strict=True))
        elif task.kind == "regression":
            result.values[name] = _value(predictions[name][i], task, (calibration or {}).get(name))
            if task.classes:
                result.classes[name] = dict(zip(task.classes, predictions[name][i].float().tolist(), strict=True))
        elif task.kind == "detection":
            result.boxes[name] = _boxes(predictions[name][i], meta, task, score)
        else:
            channels = predictions[name][i].float().cpu().numpy()
            result.masks[name] = {
                c: mask_in_original(channel, meta) for c, channel in zip(task.classes, channels, strict=True)
            }
    for name, measures in predictions.get(UNCERTAINTY, {}).items():
        if name in tasks:
            one = {key: _of_image(values[i], meta) for key, values in measures.items()}
            result.uncertainty.setdefault(name, {}).update(one)
    return result


def check_finite(predictions: Mapping[str, Any], i: int, tasks: Mapping[str, Task]) -> None:
    """Check that all predictions of image ``i`` are finite numbers.

    Raises:
        DataError: One is NaN or infinite.
    """
    for name, task in tasks.items():
        one = predictions[name][i]
        values = (one["boxes"], one["scores"]) if task.kind == "detection" else (one,)
        if not all(bool(value.isfinite().all()) for value in values):
            raise DataError(
                f"the model's output for {name} is NaN or infinite in an image; check its weights, or predict with "
                "--trainer.precision=32-true"
            )


def entropies(
    predictions: Mapping[str, Any], i: int, meta: Meta, tasks: Mapping[str, Task]
) -> dict[str, dict[str, float]]:
    """Return ``{task: {"entropy": nats}}`` of image ``i``, for tasks of classes, of grades and of masks.

    The entropy of one class out of several is at most ``log K``. Where several may hold at once it is the mean of the
    classes' own entropies, and of a mask the mean over its pixels, both at most ``log 2``; pixels of the input that lie
    outside the image do not count.
    """
    entropy_of: dict[str, dict[str, float]] = {}
    for name, task in tasks.items():
        if task.kind == "classification" or task.ordinal:
            p = predictions[name][i].double().cpu()
            value = entropy(p, 0) if task.exclusive else entropy(p).mean()
        elif task.kind == "segmentation":
            p = predictions[name][i].float().cpu()
            value = entropy(p)[:, inside_original(meta, (p.shape[-2], p.shape[-1]))].mean()
        else:
            continue
        entropy_of[name] = {"entropy": max(0.0, float(value))}
    return entropy_of


def _of_image(measured: Tensor | float, meta: Meta) -> float:
    """Return a measure of an image: the number, or the mean of (H, W) over the pixels inside the original image."""
    values = torch.as_tensor(measured)
    if values.ndim == 2:
        values = values.float().cpu()[inside_original(meta, (values.shape[-2], values.shape[-1]))].mean()
    return float(values)


def inside_original(meta: Meta, size: tuple[int, int]) -> Tensor:
    """Return bool (h, w): which pixels of the input have their centre in the original image; all where none has."""
    a, b, c, d, e, f = meta.to_original
    x, y = np.arange(size[1]) + 0.5, (np.arange(size[0]) + 0.5)[:, None]
    column, row = a * x + b * y + c, d * x + e * y + f
    height, width = meta.original_size
    inside = (column >= 0) & (column <= width) & (row >= 0) & (row <= height)
    return torch.from_numpy(inside if inside.any() else ~inside)


def _value(predicted: Tensor, task: Task, calibration: TaskCalibration | None) -> FoundValue:
    if task.classes:
        index = int(median_grade(predicted[None].cpu()))
        return FoundValue(float(index), grade=task.classes[index])
    value, margin = float(predicted[0]), None if calibration is None else calibration.margin
    if margin is None:
        return FoundValue(value, task.unit)
    low, high = task.range or (-math.inf, math.inf)
    return FoundValue(value, task.unit, max(low, value - margin), min(high, value + margin))


def _boxes(predicted: Mapping[str, Tensor], meta: Meta, task: Task, score: float) -> list[FoundBox]:
    kept = predicted["scores"] >= score
    xyxy = boxes_in_original(predicted["boxes"][kept].float().cpu().numpy(), meta).tolist()
    rest = zip(xyxy, predicted["scores"][kept].tolist(), predicted["labels"][kept].tolist(), strict=True)
    there = [one for one in rest if one[0][2] > one[0][0] and one[0][3] > one[0][1]]  # not in the margin beside it
    boxes = [FoundBox(task.classes[int(k)], float(s), (b[0], b[1], b[2], b[3])) for b, s, k in there]
    return sorted(boxes, key=lambda box: -box.score)
