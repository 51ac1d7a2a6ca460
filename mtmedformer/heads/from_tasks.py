"""Heads for the tasks of a data set: one default head for each kind of task."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mtmedformer.batch import Kind, Task
from mtmedformer.heads.base import TaskHead
from mtmedformer.heads.classification import ClassificationHead
from mtmedformer.heads.detection import DetectionHead
from mtmedformer.heads.segmentation import SegmentationHead

DEFAULT_HEADS: dict[Kind, Callable[[Task], TaskHead]] = {
    "classification": lambda task: ClassificationHead(task.classes, multi_label=task.multi_label),
    "detection": lambda task: DetectionHead(task.classes),
    "segmentation": lambda task: SegmentationHead(task.classes, multi_label=task.multi_label),
}
"""The default head of each kind of task, without layers."""


def heads_for(tasks: Mapping[str, Task]) -> dict[str, TaskHead]:
    """Return the default head of every task by name, without layers.

    Args:
        tasks: Tasks of a data set by name.
    """
    return {name: DEFAULT_HEADS[task.kind](task) for name, task in tasks.items()}
