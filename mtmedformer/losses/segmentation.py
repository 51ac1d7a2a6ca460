"""Losses of masks: means over annotated pixels, or over (image, class) pairs with annotated pixels.

Every term takes the logits of labelled images at mask resolution, ``target`` (whether the pixel is of the class) and
``valid`` (whether that is known), both bool (N, K, H, W). With as many logit channels as classes, each class is its own
sigmoid; with one more, channel 0 is the background of a softmax.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
import torch.nn.functional as F
from monai.losses.dice import DiceLoss
from monai.losses.tversky import TverskyLoss
from scipy.ndimage import distance_transform_edt
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss
from typing_extensions import override

from mtmedformer.losses.classification import exclusive_cross_entropy, masked_mean
from mtmedformer.storage.constructor_arguments import RecordsArguments


class MaskLoss(RecordsArguments, nn.Module, ABC):
    """A loss of mask logits against masks that may be known in part.

    Args:
        weight: Factor of this term in the task's loss.
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    @abstractmethod
    def forward(self, logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        """Return the mean loss over the valid pixels, zero where there are none.

        Args:
            logits: float32 (N, K, H, W) for sigmoids or (N, K + 1, H, W) for a softmax with background first.
            target: bool (N, K, H, W), True where the pixel is of the class.
            valid: bool (N, K, H, W), True where ``target`` is known.
        """


class MaskCrossEntropy(MaskLoss):
    """Cross-entropy per pixel: binary for sigmoids, categorical for a softmax; mean over annotated pixels.

    In a softmax a pixel known only not to be some class costs minus the log of what is left for the others.

    Args:
        weight: Factor of this term in the task's loss.
        pos_weight: Factor of the pixels of each class, one a class, or ``None`` for 1; background always weighs 1.
    """

    pos_weight: Tensor | None

    def __init__(self, weight: float = 1.0, pos_weight: list[float] | None = None) -> None:
        super().__init__(weight)
        values = None if pos_weight is None else torch.tensor(pos_weight, dtype=torch.float32)
        self.register_buffer("pos_weight", values, persistent=False)

    @override
    def forward(self, logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        if is_exclusive(logits, target):
            weights = None if self.pos_weight is None else F.pad(self.pos_weight, (1, 0), value=1.0)
            return exclusive_cross_entropy(logits, possible_channels(target, valid), weights)
        pos_weight = None if self.pos_weight is None else self.pos_weight.view(-1, 1, 1)
        loss = F.binary_cross_entropy_with_logits(logits, target.float(), pos_weight=pos_weight, reduction="none")
        return masked_mean(loss, valid)


class MaskFocal(MaskLoss):
    """Focal loss per pixel (torchvision's for sigmoids, its softmax twin otherwise); mean over annotated pixels.

    Args:
        weight: Factor of this term in the task's loss.
        gamma: Focusing exponent; 0 is cross-entropy.
        alpha: Weight of foreground against ``1 - alpha`` for background (sigmoids only); -1 for none.

    Reference:
        Lin et al., Focal loss for dense object detection, ICCV 2017, equation 5.
    """

    def __init__(self, weight: float = 1.0, gamma: float = 2.0, alpha: float = 0.25) -> None:
        super().__init__(weight)
        self.gamma = gamma
        self.alpha = alpha

    @override
    def forward(self, logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        if is_exclusive(logits, target):
            return exclusive_cross_entropy(logits, possible_channels(target, valid), gamma=self.gamma)
        return masked_mean(sigmoid_focal_loss(logits, target.float(), self.alpha, self.gamma), valid)


class Dice(MaskLoss):
    """Soft Dice loss (MONAI) of each class, background left out.

    By default a mean over images and classes, each (image, class) pair separately, so that a small lesion counts as
    much as a large one. An annotated empty mask costs ``1 - smooth / (sum of probabilities + smooth)``: nothing where
    nothing is predicted, and it has a gradient. Pairs without an annotated pixel do not count.

    Args:
        weight: Factor of this term in the task's loss.
        smooth: Added to numerator and denominator, in pixels.
        batch: Pool the pixels of the batch for each class before dividing (steadier where most masks are empty).
    """

    def __init__(self, weight: float = 1.0, smooth: float = 1.0, batch: bool = False) -> None:
        super().__init__(weight)
        self.batch = batch
        self._loss = DiceLoss(smooth_nr=smooth, smooth_dr=smooth, batch=batch, reduction="none")

    @override
    def forward(self, logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        return _overlap_mean(self._loss, logits, target, valid, self.batch)


class Tversky(MaskLoss):
    r"""Tversky loss (MONAI), with ``gamma`` the focal Tversky loss $(1 - \text{TI})^\gamma$; background left out.

    Averages as ``Dice`` does; ``alpha = beta = 0.5`` is Dice with half the smoothing.

    Args:
        weight: Factor of this term in the task's loss.
        alpha: Weight of false positives.
        beta: Weight of false negatives; above ``alpha`` favours recall.
        gamma: Exponent; below 1 (Abraham and Khan: 0.75) keeps nearly solved images in play.
        smooth: Added to numerator and denominator, in pixels.
        batch: Pool the pixels of the batch for each class before dividing.

    Reference:
        Salehi et al., MLMI 2017; Abraham and Khan, A novel focal Tversky loss, ISBI 2019.
    """

    def __init__(
        self,
        weight: float = 1.0,
        alpha: float = 0.3,
        beta: float = 0.7,
        gamma: float = 1.0,
        smooth: float = 1.0,
        batch: bool = False,
    ) -> None:
        super().__init__(weight)
        self.batch = batch
        self.gamma = gamma
        self._loss = TverskyLoss(
            alpha=alpha, beta=beta, smooth_nr=smooth, smooth_dr=smooth, batch=batch, reduction="none"
        )

    @override
    def forward(self, logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        return _overlap_mean(self._loss, logits, target, valid, self.batch, self.gamma)


class Lovasz(MaskLoss):
    """Lovász extension of the Jaccard loss: hinge for sigmoids, of probabilities for a softmax; background left out.

    A mean over annotated (image, class) pairs, each over its annotated pixels.

    Args:
        weight: Factor of this term in the task's loss.

    Reference:
        Berman et al., The Lovász-Softmax loss, CVPR 2018, algorithm 1.
    """

    @override
    def forward(self, logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        if is_exclusive(logits, target):
            errors = (target.float() - probabilities(logits, target.shape[1])).abs()
        else:
            errors = F.relu(1 - logits * (2.0 * target - 1))
        pairs = valid.flatten(2).any(2).nonzero().tolist()
        losses = [_lovasz_extension(errors[n, k][valid[n, k]], target[n, k][valid[n, k]]) for n, k in pairs]
        return torch.stack(losses).mean() if losses else errors[valid].sum()


class Boundary(MaskLoss):
    """Boundary loss: probability times signed distance to the true outline, mean over annotated pixels.

    Negative for a good mask. Distances are in pixels, zero for an empty or full mask, and computed on the CPU (slow).
    Pixels that are not annotated count as background for the distance of the others. Add it to a region loss.

    Args:
        weight: Factor of this term in the task's loss (the paper starts at 0.01).

    Reference:
        Kervadec et al., Boundary loss for highly unbalanced segmentation, MIDL 2019.
    """

    def __init__(self, weight: float = 0.01) -> None:
        super().__init__(weight)

    @override
    def forward(self, logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        distance = [_signed_distance(mask) for mask in (target & valid).flatten(0, 1).cpu().numpy()]
        maps = torch.from_numpy(np.array(distance, dtype=np.float32)).to(logits.device).view(target.shape)
        return masked_mean(probabilities(logits, target.shape[1]) * maps, valid)


def is_exclusive(logits: Tensor, target: Tensor) -> bool:
    """Return whether the logits have a background channel, hence are meant for a softmax."""
    return logits.shape[1] == target.shape[1] + 1


def probabilities(logits: Tensor, num_classes: int) -> Tensor:
    """Turn logits (N, K, H, W) or (N, K + 1, H, W) into the K classes' probabilities, background dropped."""
    return logits.sigmoid() if logits.shape[1] == num_classes else logits.softmax(1)[:, 1:]


def possible_channels(target: Tensor, valid: Tensor) -> Tensor:
    """Return which channels, background first, each pixel may be of: bool (N, K + 1, H, W)."""
    return torch.cat([~target.any(1, keepdim=True), target | ~valid], dim=1)


def _overlap_mean(
    loss: nn.Module, logits: Tensor, target: Tensor, valid: Tensor, batch: bool, gamma: float = 1.0
) -> Tensor:
    counted = valid.flatten(2).any(2)
    if batch:
        counted = counted.any(0)
    p = probabilities(logits, target.shape[1]) * valid
    values = loss(p, (target & valid).float()).view(counted.shape)
    if gamma != 1:
        values = values.clamp_min(1e-6) ** gamma
    return masked_mean(values, counted)


def _lovasz_extension(errors: Tensor, target: Tensor) -> Tensor:
    errors, order = errors.sort(descending=True)
    truth = target[order].float()
    jaccard = 1 - (truth.sum() - truth.cumsum(0)) / (truth.sum() + (1 - truth).cumsum(0))
    return errors @ jaccard.diff(prepend=jaccard.new_zeros(1))


def _signed_distance(mask: np.ndarray) -> np.ndarray:
    if not mask.any() or mask.all():
        return np.zeros(mask.shape)
    outside = np.asarray(distance_transform_edt(~mask))
    return np.where(mask, 1 - np.asarray(distance_transform_edt(mask)), outside)
