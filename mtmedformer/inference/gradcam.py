"""Heat maps of a head: the attention of a classifier, and Grad-CAM for a class of any explainable head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mtmedformer.errors import ConfigError
from mtmedformer.heads.base import TaskHead
from mtmedformer.heads.capabilities import AttentionPooling, Explainable
from mtmedformer.heads.layers import enlarge

if TYPE_CHECKING:
    from mtmedformer.network import MultiTaskNetwork


def attention_map(head: TaskHead, outputs: Any, size: tuple[int, int]) -> Tensor | None:
    """Return the attention of a head per pixel; it is the same for all classes.

    If the head also uses the maximum of each channel (``ClassificationHead.peak``), the map does not show the
    contribution of the maxima; Grad-CAM does.

    Args:
        head: Any head.
        outputs: Its outputs for B images.
        size: ``(H, W)`` of the network's input.

    Returns:
        float32 (B, H, W) in [0, 1], the largest value of each image 1; ``None`` for a head without attention.
    """
    return _relative(head.attention_map(outputs, size)) if isinstance(head, AttentionPooling) else None


def grad_cam(module: MultiTaskNetwork, image: Tensor, task: str, label: int) -> Tensor:
    r"""Compute the evidence for a class per pixel.

    Gradient times activation, summed over the channels of every level $A^l$ of the pyramid,
    $\mathrm{ReLU}(\sum_l \sum_c \partial s / \partial A^l_c \odot A^l_c)$, each level's share spread over the pixels
    of its cells. The score $s$ is ``Explainable.class_score``. This is HiResCAM. Grad-CAM itself averages the gradient
    over the image first, which suits heads that average features; on phantoms, with the heads of this project, its
    maximum lay in a lesion no more often than by chance.

    It works within ``torch.inference_mode``; only the head has a backward pass, and no weight gets a gradient.

    Args:
        module: The model.
        image: float (B, C, H, W) in [0, 1]: whole images, even if the module predicts in windows.
        task: Name of the head.
        label: Number of the class.

    Returns:
        float32 (B, H, W) in [0, 1], the largest value of each image 1; all 0 without evidence for the class.

    Raises:
        ConfigError: The model has no such task, or its head is not ``Explainable``.

    Reference:
        Draelos and Carin, Use HiResCAM instead of Grad-CAM for faithful explanations of convolutional neural networks,
        arXiv 2011.08891, equation 4; Selvaraju et al., Grad-CAM, ICCV 2017.
    """
    if task not in module.heads:
        raise ConfigError(f"Grad-CAM of {task!r}: the model has no such head; it has {', '.join(module.heads)}")
    head, size = module.heads[task], (int(image.shape[-2]), int(image.shape[-1]))
    if not isinstance(head, Explainable):
        raise ConfigError(
            f"Grad-CAM of {task!r}: {type(head).__name__} has no class score; implement its method class_score "
            "(see mtmedformer.heads.capabilities.Explainable)"
        )
    with torch.inference_mode(False):
        with torch.no_grad():
            levels = [level.detach() for level in module.encoder(image.clone())]
        with torch.enable_grad():
            pyramid = [level.requires_grad_() for level in levels]
            score = head.class_score(head(pyramid, size), label).sum()
            gradients = torch.autograd.grad(score, pyramid, allow_unused=True)
        total = image.new_zeros((len(image), *size), dtype=torch.float32)
        for level, gradient, stride in zip(pyramid, gradients, module.encoder.strides, strict=True):
            if gradient is not None:
                share = (gradient.float() * level.detach().float()).sum(1, keepdim=True) / stride**2
                total = total + enlarge(share, stride, size)[:, 0]
        return _relative(total.relu())


def _relative(values: Tensor) -> Tensor:
    """Divide each map (B, H, W) by its maximum; a map of zeros stays one."""
    return values / values.flatten(1).amax(1).clamp_min(1e-12)[:, None, None]
