"""Metrics of each kind of task over images with labels, with patient-level intervals and values per subgroup."""

from mtmedformer.metrics.classification import ClassificationMetrics
from mtmedformer.metrics.detection import DetectionMetrics
from mtmedformer.metrics.segmentation import SegmentationMetrics
from mtmedformer.metrics.task_metrics import TaskMetrics

__all__ = ["ClassificationMetrics", "DetectionMetrics", "SegmentationMetrics", "TaskMetrics"]
