"""Task heads: one file per kind of task; each decodes the shared pyramid independently of the others."""

from mtmedformer.heads.base import TaskHead
from mtmedformer.heads.cases import CaseHead
from mtmedformer.heads.classification import ClassificationHead
from mtmedformer.heads.detection import DetectionHead
from mtmedformer.heads.detr import DETRHead
from mtmedformer.heads.regression import OrdinalHead, RegressionHead
from mtmedformer.heads.segmentation import SegmentationHead

__all__ = [
    "CaseHead",
    "ClassificationHead",
    "DETRHead",
    "DetectionHead",
    "OrdinalHead",
    "RegressionHead",
    "SegmentationHead",
    "TaskHead",
]
