"""Task heads: one file per kind of answer; each decodes the shared pyramid and knows no other head."""

from mtmedformer.heads.base import TaskHead
from mtmedformer.heads.classification import ClassificationHead
from mtmedformer.heads.detection import DetectionHead
from mtmedformer.heads.detr import DETRHead
from mtmedformer.heads.segmentation import SegmentationHead

__all__ = ["ClassificationHead", "DETRHead", "DetectionHead", "SegmentationHead", "TaskHead"]
