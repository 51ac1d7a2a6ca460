"""MTMedFormer: one transformer that classifies, detects and segments in the same medical image."""

from mtmedformer.encoder import SharedEncoder
from mtmedformer.errors import ConfigError, DataError, UserError
from mtmedformer.heads import ClassificationHead, DetectionHead, QueryHead, SegmentationHead
from mtmedformer.losses.hybrid import HybridLoss
from mtmedformer.module import MultiTaskModule
from mtmedformer.schedule import WarmupCosine

__version__ = "0.1.0"

__all__ = [
    "ClassificationHead",
    "ConfigError",
    "DataError",
    "DetectionHead",
    "HybridLoss",
    "MultiTaskModule",
    "QueryHead",
    "SegmentationHead",
    "SharedEncoder",
    "UserError",
    "WarmupCosine",
]
