"""Losses: the terms of each kind of task, and the hybrid of all tasks."""

from mtmedformer.losses.classification import Asymmetric, BinaryCrossEntropy, BinaryFocal, ClassLoss, CrossEntropy
from mtmedformer.losses.detection import BoxLoss, CIoU, DIoU, GIoU
from mtmedformer.losses.segmentation import Boundary, Dice, Lovasz, MaskCrossEntropy, MaskFocal, MaskLoss, Tversky

__all__ = [
    "Asymmetric",
    "BinaryCrossEntropy",
    "BinaryFocal",
    "Boundary",
    "BoxLoss",
    "CIoU",
    "ClassLoss",
    "CrossEntropy",
    "DIoU",
    "Dice",
    "GIoU",
    "Lovasz",
    "MaskCrossEntropy",
    "MaskFocal",
    "MaskLoss",
    "Tversky",
]
