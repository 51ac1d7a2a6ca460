"""MTMedFormer: one transformer that classifies, detects and segments in the same medical image."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtmedformer.commands.load.predictor import Prediction, Predictor, load
    from mtmedformer.encoders.shared import SharedEncoder
    from mtmedformer.errors import ConfigError, DataError, UserError
    from mtmedformer.heads import ClassificationHead, DetectionHead, QueryHead, SegmentationHead
    from mtmedformer.losses.hybrid import HybridLoss
    from mtmedformer.module import MultiTaskModule
    from mtmedformer.optim import WarmupCosine

__version__ = "0.1.0"

__all__ = [
    "ClassificationHead",
    "ConfigError",
    "DataError",
    "DetectionHead",
    "HybridLoss",
    "MultiTaskModule",
    "Prediction",
    "Predictor",
    "QueryHead",
    "SegmentationHead",
    "SharedEncoder",
    "UserError",
    "WarmupCosine",
    "load",
]

_HOMES = {
    "mtmedformer.encoders.shared": ("SharedEncoder",),
    "mtmedformer.errors": ("ConfigError", "DataError", "UserError"),
    "mtmedformer.heads": ("ClassificationHead", "DetectionHead", "QueryHead", "SegmentationHead"),
    "mtmedformer.commands.load.predictor": ("Prediction", "Predictor", "load"),
    "mtmedformer.losses": ("HybridLoss",),
    "mtmedformer.module": ("MultiTaskModule",),
    "mtmedformer.optim": ("WarmupCosine",),
}


def __getattr__(name: str) -> Any:
    """Import a part when it is first named, so that data tools need not wait for torch, timm and MONAI."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'mtmedformer' has no attribute {name!r}")
