"""Find outputs that are NaN or infinite, so that they never pass for a finding or for its absence."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor


def marked(predictions: Any, outputs: Any) -> Any:
    """Return the predictions of a task with NaN in place of those whose outputs are not finite.

    Non-maximum suppression drops boxes whose score is NaN, and a sigmoid turns an infinite logit into a certainty: an
    image of which the network computed nothing would be one without a lesion. Instead such an image gets one box of
    NaN, or probabilities of NaN, which `mtmedformer.inference.results.image_result` refuses.

    Args:
        predictions: As from ``TaskHead.predict``, for B images: a tensor, or a list of boxes.
        outputs: The raw outputs they were made from: tensors (B, …), alone or in a dataclass or tuple.
    """
    bad = _not_finite(outputs, len(predictions))
    if bad is None or not bool(bad.any()):
        return predictions
    if isinstance(predictions, Tensor):
        broken = bad.view(-1, *[1] * (predictions.ndim - 1)).to(predictions.device)
        return predictions.masked_fill(broken, torch.nan)
    return [_nothing(one) if lost else one for one, lost in zip(predictions, bad.tolist(), strict=True)]


def _not_finite(outputs: Any, images: int) -> Tensor | None:
    """Return bool (B,): whether an image has an output that is not finite; ``None`` without tensors of B images."""
    if is_dataclass(outputs):
        parts = [getattr(outputs, one.name) for one in fields(outputs)]
    else:
        parts = list(outputs) if isinstance(outputs, list | tuple) else [outputs]
    tensors = [one for one in parts if isinstance(one, Tensor) and one.is_floating_point() and one.ndim > 1]
    flags = [~one.flatten(1).isfinite().all(1) for one in tensors if len(one) == images]
    return torch.stack(flags).any(0) if flags else None


def _nothing(boxes: dict[str, Tensor]) -> dict[str, Tensor]:
    unknown = {key: value.new_full((1, *value.shape[1:]), torch.nan) for key, value in boxes.items() if key != "labels"}
    return unknown | {"labels": boxes["labels"].new_zeros(1)}
