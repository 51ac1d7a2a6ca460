"""Where a head looked: the classifier's own attention, and Grad-CAM for any class of any head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mtmedformer.errors import ConfigError
from mtmedformer.heads.base import TaskHead
from mtmedformer.heads.layers import enlarge

if TYPE_CHECKING:
    from mtmedformer.network import MultiTaskNetwork


def attention_map(head: TaskHead, outputs: Any, size: tuple[int, int]) -> Tensor | None:
    """Return where a head's attention pool took its evidence from, whatever the class; it comes with the prediction.

    Where the head also keeps each channel's maximum (``ClassificationHead.peak``) the map does not show what those
    contribute; Grad-CAM does.

    Args:
        head: Any head.
        outputs: What it returned for B images.
        size: ``(H, W)`` of the network's input.

    Returns:
        float32 (B, H, W) in [0, 1], the place of most attention 1; ``None`` where the head has no attention.
    """
    attention = getattr(outputs, "attention", None)
    stride = min(getattr(head, "strides", ()), default=0)
    if not isinstance(attention, Tensor) or not stride:
        return None
    return _relative(enlarge(attention[:, None].float(), stride, size)[:, 0])


def grad_cam(module: MultiTaskNetwork, image: Tensor, task: str, label: int) -> Tensor:
    r"""Return what speaks for a class, place by place.

    Gradient times activation, summed over the channels of every level $A^l$ of the pyramid,
    $\mathrm{ReLU}(\sum_l \sum_c \partial s / \partial A^l_c \odot A^l_c)$, each level's share spread over the pixels
    its cells cover. The score $s$ is ``TaskHead.class_score``. This is Grad-CAM place by place (HiResCAM): Grad-CAM
    itself averages the gradient over the image first, which suits heads that average features and none of these: on
    phantoms it met lesions no more often than chance.

    Works within ``torch.inference_mode``; only the head is gone through backwards, and no weight gets a gradient.

    Args:
        module: The model.
        image: float (B, C, H, W) in [0, 1], whole, whatever windows the module predicts with.
        task: Name of the head.
        label: Number of the class.

    Returns:
        float32 (B, H, W) in [0, 1], the strongest place 1; 0 throughout where nothing speaks for the class.

    Raises:
        ConfigError: The task is unknown to the model.

    Reference:
        Draelos and Carin, Use HiResCAM instead of Grad-CAM for faithful explanations of convolutional neural networks,
        arXiv 2011.08891, equation 4; Selvaraju et al., Grad-CAM, ICCV 2017.
    """
    if task not in module.heads:
        raise ConfigError(f"Grad-CAM of {task!r}: the model has no such head; it has {', '.join(module.heads)}")
    head, size = module.heads[task], (int(image.shape[-2]), int(image.shape[-1]))
    assert isinstance(head, TaskHead)
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
