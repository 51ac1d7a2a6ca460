"""Losses of image-level classes, each a mean over the known labels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from timm.loss.asymmetric_loss import AsymmetricLossMultiLabel
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss
from typing_extensions import override

from mtmedformer.errors import ConfigError, DataError
from mtmedformer.storage.constructor_arguments import RecordsArguments


class ClassLoss(RecordsArguments, nn.Module, ABC):
    """A loss of class logits against labels that may be unknown.

    Args:
        weight: Factor of this term in the task's loss.
        class_weights: One positive factor a class, or ``None`` for 1 each.
    """

    multi_label: ClassVar[bool]
    """Whether the term is for classes that may hold at once (sigmoids) or for exclusive ones (softmax)."""

    class_weights: Tensor | None

    def __init__(self, weight: float = 1.0, class_weights: list[float] | None = None) -> None:
        super().__init__()
        self.weight = weight
        values = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", values, persistent=False)

    @abstractmethod
    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss over known labels, zero where there is none.

        Args:
            logits: float32 (N, K), labelled images only.
            labels: float32 (N, K) of 0, 1 or NaN (unknown).
        """

    def check(self, num_classes: int, multi_label: bool) -> None:
        """Raise ``ConfigError`` where this term does not fit a task of ``num_classes`` classes."""
        name = type(self).__name__
        if self.multi_label != multi_label:
            raise ConfigError(
                f"loss term {name} is for multi_label: {str(self.multi_label).lower()}, but the head has multi_label: "
                f"{str(multi_label).lower()}; choose another term or change multi_label"
            )
        if self.class_weights is not None and len(self.class_weights) != num_classes:
            raise ConfigError(
                f"loss term {name} has {len(self.class_weights)} class weights for {num_classes} classes; give one each"
            )


class CrossEntropy(ClassLoss):
    r"""Cross-entropy of a softmax over exclusive classes, as ``torch.nn.CrossEntropyLoss`` where every label is known.

    A row that only excludes some classes (zeros beside NaN) costs $-\log$ of the probability left for the others.

    Args:
        weight: Factor of this term in the task's loss.
        class_weights: One positive factor a class; the mean is weighted by them, as in torch.
        label_smoothing: Share of the target spread evenly over the classes, in [0, 1).
        gamma: Above 0 makes it the softmax focal loss: each row weighs $(1 - p)^\gamma$.
    """

    multi_label = False

    def __init__(
        self,
        weight: float = 1.0,
        class_weights: list[float] | None = None,
        label_smoothing: float = 0.0,
        gamma: float = 0.0,
    ) -> None:
        super().__init__(weight, class_weights)
        self.label_smoothing = label_smoothing
        self.gamma = gamma

    @override
    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        possible = possible_classes(labels)
        return exclusive_cross_entropy(logits, possible, self.class_weights, self.label_smoothing, self.gamma)


class BinaryCrossEntropy(ClassLoss):
    """Binary cross-entropy of each class separately, mean over the known labels.

    Args:
        weight: Factor of this term in the task's loss.
        pos_weight: One factor a class for its positive labels (above 1 favours recall), as in torch.
        label_smoothing: Labels move this share of the way to 0.5, in [0, 1).
    """

    multi_label = True

    def __init__(
        self, weight: float = 1.0, pos_weight: list[float] | None = None, label_smoothing: float = 0.0
    ) -> None:
        super().__init__(weight, pos_weight)
        self.label_smoothing = label_smoothing

    @override
    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        known, labels = ~labels.isnan(), labels.nan_to_num()
        soft = labels * (1 - self.label_smoothing) + 0.5 * self.label_smoothing
        loss = F.binary_cross_entropy_with_logits(logits, soft, pos_weight=self.class_weights, reduction="none")
        return masked_mean(loss, known)


class BinaryFocal(ClassLoss):
    r"""Sigmoid focal loss (torchvision): binary cross-entropy times $(1 - p_t)^\gamma$, so that easy labels weigh less.

    Args:
        weight: Factor of this term in the task's loss.
        gamma: Focusing exponent; 0 is cross-entropy.
        alpha: Weight of positives against ``1 - alpha`` for negatives; -1 for none.

    Reference:
        Lin et al., Focal loss for dense object detection, ICCV 2017, equation 5.
    """

    multi_label = True

    def __init__(self, weight: float = 1.0, gamma: float = 2.0, alpha: float = -1.0) -> None:
        super().__init__(weight)
        self.gamma = gamma
        self.alpha = alpha

    @override
    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        loss = sigmoid_focal_loss(logits, labels.nan_to_num(), self.alpha, self.gamma)
        return masked_mean(loss, ~labels.isnan())


class Asymmetric(ClassLoss):
    """Asymmetric loss for many rare classes at once: negatives are focused harder and cut off below a margin (timm).

    Args:
        weight: Factor of this term in the task's loss.
        gamma_neg: Focusing exponent of negatives.
        gamma_pos: Focusing exponent of positives.
        clip: Probability below which a negative costs nothing.

    Reference:
        Ridnik et al., Asymmetric loss for multi-label classification, ICCV 2021.
    """

    multi_label = True

    def __init__(self, weight: float = 1.0, gamma_neg: float = 4.0, gamma_pos: float = 1.0, clip: float = 0.05) -> None:
        super().__init__(weight)
        self._loss = AsymmetricLossMultiLabel(gamma_neg, gamma_pos, clip, reduction="sum")

    @override
    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        known = ~labels.isnan()
        loss: Tensor = self._loss(logits[known], labels[known])
        return loss / known.sum().clamp_min(1)


def masked_mean(values: Tensor, known: Tensor) -> Tensor:
    """Return the mean of ``values`` where ``known``; zero, still connected to the graph, where none is."""
    return (values * known).sum() / known.sum().clamp_min(1)


def possible_classes(labels: Tensor) -> Tensor:
    """Return which classes each row of exclusive labels leaves possible.

    Args:
        labels: (N, K) of 0, 1 or NaN (unknown).

    Returns:
        bool (N, K): the class that is 1 where there is one, else every class that is not known to be 0.

    Raises:
        DataError: A row excludes every class.
    """
    positive = labels == 1
    possible = torch.where(positive.any(1, keepdim=True), positive, labels.isnan())
    if not possible.any(1).all():
        raise DataError(
            "an image of a single-label classification task has 0 for every class; exactly one class must be 1 "
            "(add a class such as 'normal', leave the label empty if it is unknown, or make the task multi-label)"
        )
    return possible


def exclusive_cross_entropy(
    logits: Tensor,
    possible: Tensor,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    gamma: float = 0.0,
) -> Tensor:
    r"""Return the mean of $-\log \sum_{c\ \text{possible}} p_c$ over the items whose possible classes are not all.

    Equals ``F.cross_entropy`` (weights and smoothing included) where one class is possible in each item.

    Args:
        logits: float (N, C, ...).
        possible: bool (N, C, ...), at least one class per item. Items where every class is possible do not count.
        class_weights: float (C,) or ``None``; an item weighs the mean of its possible classes.
        label_smoothing: Share of the target spread over all classes.
        gamma: Focusing exponent of the focal loss, 0 for none.

    Reference:
        Shi et al., Marginal loss and exclusion loss for partially supervised multi-organ segmentation,
        Medical Image Analysis 2021.
    """
    log_p = logits.log_softmax(1)
    loss = -log_p.masked_fill(~possible, -torch.inf).logsumexp(1)
    if gamma:
        loss = (-torch.expm1(-loss)).clamp_min(1e-6) ** gamma * loss
    weights = logits.new_ones(logits.shape[1]) if class_weights is None else class_weights
    weights = weights.view(-1, *[1] * (logits.ndim - 2))
    informative = ~possible.all(1)
    item = informative * (weights * possible).sum(1) / possible.sum(1).clamp_min(1)
    total = (1 - label_smoothing) * item * loss
    if label_smoothing:
        total = total - label_smoothing * informative * (weights * log_p).mean(1)
    return total.sum() / item.sum().clamp_min(1e-12)
