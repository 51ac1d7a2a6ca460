"""Heads for the tasks of a data set: one default head for each kind of task."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mtmedformer.batch import Kind, Task
from mtmedformer.errors import ConfigError
from mtmedformer.heads.base import TaskHead
from mtmedformer.heads.classification import ClassificationHead
from mtmedformer.heads.detection import DetectionHead
from mtmedformer.heads.regression import OrdinalHead, RegressionHead
from mtmedformer.heads.segmentation import SegmentationHead

DEFAULT_HEADS: dict[Kind, Callable[[Task], TaskHead]] = {
    "classification": lambda task: ClassificationHead(task.classes, multi_label=task.multi_label),
    "detection": lambda task: DetectionHead(task.classes),
    "segmentation": lambda task: SegmentationHead(task.classes, multi_label=task.multi_label),
    "regression": lambda task: OrdinalHead(task.classes) if task.classes else RegressionHead(_range(task), task.unit),
}
"""The default head of each kind of task, without layers."""


def heads_for(tasks: Mapping[str, Task]) -> dict[str, TaskHead]:
    """Return the default head of every task by name, without layers.

    Args:
        tasks: Tasks of a data set by name.
    """
    return {name: DEFAULT_HEADS[task.kind](task) for name, task in tasks.items()}


def _range(task: Task) -> tuple[float, float]:
    """Return the range of the number of a task.

    Raises:
        ConfigError: The data have no two different numbers, and no range is configured.
    """
    if task.range is None or task.range[0] == task.range[1]:
        found = "no number" if task.range is None else f"no other number than {task.range[0]:g}"
        raise ConfigError(
            f"model.heads is auto, but the data have {found} for {task.name!r}; label some images, give the range of "
            "the task in the data, or leave it out with data.init_args.tasks"
        )
    return task.range
