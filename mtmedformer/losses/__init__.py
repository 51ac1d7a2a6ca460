"""Losses: the terms of each kind of task, and the hybrid loss of all tasks."""

from mtmedformer.losses.classification import Asymmetric, BinaryCrossEntropy, BinaryFocal, ClassLoss, CrossEntropy
from mtmedformer.losses.detection import BoxLoss, CIoU, DIoU, GIoU
from mtmedformer.losses.gradient_aggregation import GradientAggregation
from mtmedformer.losses.hybrid import HybridLoss
from mtmedformer.losses.regression import (
    AbsoluteError,
    Coral,
    CumulativeLink,
    RegressionLoss,
    SmoothL1,
    SquaredError,
)
from mtmedformer.losses.segmentation import Boundary, Dice, Lovasz, MaskCrossEntropy, MaskFocal, MaskLoss, Tversky
from mtmedformer.losses.weighting import (
    DynamicWeightAverage,
    FAMOWeighting,
    FixedWeighting,
    RandomWeighting,
    UncertaintyWeighting,
    Weighting,
)

__all__ = [
    "AbsoluteError",
    "Asymmetric",
    "BinaryCrossEntropy",
    "BinaryFocal",
    "Boundary",
    "BoxLoss",
    "CIoU",
    "ClassLoss",
    "Coral",
    "CrossEntropy",
    "CumulativeLink",
    "DIoU",
    "Dice",
    "DynamicWeightAverage",
    "FAMOWeighting",
    "FixedWeighting",
    "GIoU",
    "GradientAggregation",
    "HybridLoss",
    "Lovasz",
    "MaskCrossEntropy",
    "MaskFocal",
    "MaskLoss",
    "RandomWeighting",
    "RegressionLoss",
    "SmoothL1",
    "SquaredError",
    "Tversky",
    "UncertaintyWeighting",
    "Weighting",
]
