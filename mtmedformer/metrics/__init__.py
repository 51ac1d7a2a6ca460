"""Metrics of each kind of task over images with labels, with patient-level intervals and values per subgroup."""

from mtmedformer.metrics.base import TaskMetrics
from mtmedformer.metrics.classification import ClassificationMetrics
from mtmedformer.metrics.detection import DetectionMetrics
from mtmedformer.metrics.regression import OrdinalMetrics, RegressionMetrics
from mtmedformer.metrics.segmentation import SegmentationMetrics

__all__ = [
    "ClassificationMetrics",
    "DetectionMetrics",
    "OrdinalMetrics",
    "RegressionMetrics",
    "SegmentationMetrics",
    "TaskMetrics",
]
