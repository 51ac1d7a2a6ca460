"""Predictions of an ensemble: the mean over its members, and how far they disagree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor

from mtmedformer.batch import Task
from mtmedformer.calibration import combined_calibration
from mtmedformer.inference.box_fusion import fuse_boxes
from mtmedformer.inference.results import UNCERTAINTY
from mtmedformer.metrics.base import entropy
from mtmedformer.protocols import PredictingModule, PredictionStrategy

if TYPE_CHECKING:
    from mtmedformer.network import MultiTaskNetwork

DISAGREEMENT = "disagreement"
"""Name of the uncertainty of an ensemble; see `combined`."""

BOX_SCORE = 0.05
"""Least score of a fused box that counts in the disagreement of an image."""


class EnsemblePredictor:
    """Averages the predictions of another predictor over the members of an ensemble.

    Args:
        inner: Predicts with one member.
        members: The members besides the module that is given to ``predict``.
    """

    def __init__(self, inner: PredictionStrategy, members: Sequence[MultiTaskNetwork]) -> None:
        self.inner, self.members = inner, tuple(members)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that change predictions."""
        return dict(self.inner.settings) | {"members": [one.digest() for one in self.members]}

    def predict(self, module: PredictingModule, image: Tensor, raw: bool = False) -> dict[str, Any]:
        """Return the mean predictions by task; see ``mtmedformer.protocols.PredictionStrategy``.

        ``raw/<task>`` is there if any member is calibrated; the others count in it as they are.
        """
        dtype = module.dtype if isinstance(module, L.LightningModule) else image.dtype
        for member in self.members:
            if member.device != image.device or member.dtype != dtype:
                member.to(device=image.device, dtype=torch.float32 if isinstance(dtype, str) else dtype)
        seen = [self.inner.predict(one, image, raw) for one in (module, *self.members)]
        predictions, disagreement = combined(module.tasks, seen)
        for name, task in module.tasks.items():
            if any(f"raw/{name}" in one for one in seen):
                uncalibrated = [{name: one.get(f"raw/{name}", one[name])} for one in seen]
                predictions[f"raw/{name}"] = combined({name: task}, uncalibrated)[0][name]
        return predictions | {UNCERTAINTY: {name: {DISAGREEMENT: value} for name, value in disagreement.items()}}


def join(first: MultiTaskNetwork, members: Sequence[MultiTaskNetwork]) -> None:
    """Make a network the first member of an ensemble, so that its ``predict_whole`` averages over all members.

    Args:
        first: The network.
        members: The others, in evaluation mode, with the same tasks and classes.
    """
    first.members = tuple(members)
    first.predictor = EnsemblePredictor(first.predictor, first.members)
    first.calibration = combined_calibration([first.calibration, *(one.calibration for one in first.members)])


def combined(tasks: Mapping[str, Task], seen: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the mean predictions of several models by task, and their disagreement.

    Probabilities are averaged, of masks per pixel; boxes are fused (`fuse_boxes`). The disagreement is the mutual
    information of prediction and member in nats: the entropy of the mean minus the mean entropy of the members, 0 where
    all members agree. It has one value per image for classes (the mean over classes of a multi-label task) and boxes
    (the mean over fused boxes with a score of at least 0.05, 0 without one), and one per pixel for masks. Of numbers it
    is the standard deviation over the members, in their unit.

    Args:
        tasks: The tasks by name.
        seen: Predictions of each model by task, in the formats of ``TaskHead.predict``.

    Returns:
        Predictions by task in the same formats; disagreement by task: (B,), of masks (B, H, W).
    """
    predictions: dict[str, Any] = {}
    disagreement: dict[str, Tensor] = {}
    for name, task in tasks.items():
        if task.kind == "detection":
            fused = [fuse_boxes([one[name][i] for one in seen]) for i in range(len(seen[0][name]))]
            predictions[name] = [boxes for boxes, _ in fused]
            disagreement[name] = torch.stack([_of_boxes(boxes["scores"], scores) for boxes, scores in fused])
        else:
            values = torch.stack([one[name].float() for one in seen])
            predictions[name] = values.mean(0)
            spread = values.std(0, correction=0)[:, 0] if not task.probabilistic else None
            disagreement[name] = _mutual_information(task, values) if spread is None else spread
    return predictions, disagreement


def _mutual_information(task: Task, values: Tensor) -> Tensor:
    """Return the mutual information of probabilities (members, B, K, …) over the members: (B, …)."""
    if task.multi_label or len(task.classes) == 1:
        gain = entropy(values.mean(0)) - entropy(values).mean(0)
        return gain.clamp_min(0).mean(1)
    if task.kind == "segmentation":  # the rest of the probability is background
        values = torch.cat([(1 - values.sum(2, keepdim=True)).clamp_min(0), values], dim=2)
    return (entropy(values.mean(0), 1) - entropy(values, 2).mean(0)).clamp_min(0)


def _of_boxes(total: Tensor, scores: Tensor) -> Tensor:
    """Return the mean disagreement about the boxes of an image.

    Args:
        total: Scores (N,) of the fused boxes.
        scores: Their scores (N, members) in each member.
    """
    shown = scores[total >= BOX_SCORE]
    gain = entropy(shown.mean(1)) - entropy(shown).mean(1)
    return gain.clamp_min(0).mean() if len(shown) else total.new_zeros(())
