"""Predictions from samples of the posterior: their mean, and the disagreement of the samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from federation.bayes.posterior import Posterior
from federation.bayes.uncertainty import Uncertainty, box_probabilities, uncertainty
from federation.exchange.schema import State
from mtmedformer.batch import Batch, DetectionTarget, Target, Task
from mtmedformer.metrics.calibration import decisions, some_places
from mtmedformer.metrics.matching import hits
from mtmedformer.module import MultiTaskModule

BOX_SCORE = 0.05
"""Least score of a box of the mean model that counts in the choice of the scale."""

HIT = 0.3
"""Least intersection over union of a hit, as in FROC."""

Predictions = dict[str, Any]


@dataclass(frozen=True)
class Sampled:
    """Predictions of a batch from posterior samples.

    Attributes:
        predictions: In the formats of ``TaskHead.predict``, probabilities and scores averaged over the samples. Boxes
            are those of the mean model, with ``entropy`` and ``mutual_information`` (N,) beside their scores.
        uncertainties: Entropy and mutual information by sampled task, in nats: (B,) of exclusive classes, (B, K) of
            others, (B, H, W) of exclusive masks, (B, K, H, W) of others; those of boxes are in the predictions.
    """

    predictions: Predictions
    uncertainties: dict[str, Uncertainty]


class SampledModel:
    """Predict with the mean of samples, each task at its own scale; tasks of scale 0 use the mean model alone.

    The weights of the samples are kept: ``samples`` copies of the model per distinct scale above 0.

    Args:
        module: The model; before and after each call it holds the posterior's mean.
        posterior: The posterior.
        scales: Scale by task.
        samples: Samples per prediction.
        seed: Seed of the samples.
        blocks: Blocks that are sampled; ``None`` samples all.
    """

    def __init__(
        self,
        module: MultiTaskModule,
        posterior: Posterior,
        scales: Mapping[str, float],
        samples: int = 8,
        seed: int = 0,
        blocks: Sequence[str] | None = None,
    ) -> None:
        self.module, self.posterior = module, posterior
        self.scales, self.tasks = dict(scales), module.tasks
        device = module.device
        self._states: dict[float, list[State]] = {
            scale: [
                {key: value.to(device) for key, value in posterior.sample(seed + draw, scale, blocks).items()}
                for draw in range(samples)
            ]
            for scale in sorted(set(scales.values()))
            if scale
        }
        self._mean = {key: value.to(device) for key, value in posterior.mean.items()}

    def __call__(self, predict: Callable[[Tensor], Predictions], image: Tensor) -> Sampled:
        """Predict a batch.

        Args:
            predict: Computes the module's predictions of images with its current weights.
            image: float (B, C, H, W) in [0, 1].
        """
        predictions = dict(predict(image))
        uncertainties: dict[str, Uncertainty] = {}
        try:
            for scale, states in self._states.items():
                drawn = []
                for state in states:
                    self.module.load_state_dict(state)
                    drawn.append(predict(image))
                for key in [key for key in predictions if self.scales.get(key.removeprefix("raw/")) == scale]:
                    task = self.tasks[key.removeprefix("raw/")]
                    predictions[key], spread = averaged(task, predictions[key], [sample[key] for sample in drawn])
                    if spread is not None and key == task.name:
                        uncertainties[key] = spread
        finally:
            self.module.load_state_dict(self._mean)
        return Sampled(predictions, uncertainties)


def averaged(task: Task, plain: Any, drawn: Sequence[Any]) -> tuple[Any, Uncertainty | None]:
    """Return the mean of a task's sampled predictions, and their uncertainty.

    The uncertainty is ``None`` for boxes, whose mean contains it, and for numbers, which have no entropy.

    Args:
        task: The task.
        plain: Prediction of the mean model.
        drawn: Prediction of each sample.
    """
    if task.kind == "detection":
        return [_averaged_boxes(one, [sample[i] for sample in drawn]) for i, one in enumerate(plain)], None
    samples = torch.stack([sample.float() for sample in drawn])
    if not task.probabilistic:
        return samples.mean(0), None
    if task.multi_label or len(task.classes) == 1:
        averages = uncertainty(samples)
        return averages.mean, averages
    if task.kind == "segmentation":
        samples = torch.cat([(1 - samples.sum(2, keepdim=True)).clamp_min(0), samples], dim=2)
    averages = uncertainty(samples, classes=2)
    return (averages.mean[:, 1:] if task.kind == "segmentation" else averages.mean), averages


def _averaged_boxes(plain: Mapping[str, Tensor], drawn: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    averages = uncertainty(
        box_probabilities(plain["boxes"], plain["labels"], [(s["boxes"], s["labels"], s["scores"]) for s in drawn])
    )
    order = averages.mean.argsort(descending=True, stable=True)
    return {
        "boxes": plain["boxes"][order],
        "scores": averages.mean[order],
        "labels": plain["labels"][order],
        "entropy": averages.entropy[order],
        "mutual_information": averages.mutual_information[order],
    }


class TruthLikelihood:
    """Compute the probability that a state gives to the true labels, by task, on a site's labelled validation images.

    Classes and masks count per decision (``mtmedformer.metrics.calibration.decisions``; of a mask the pixels that a
    temperature is fitted to), boxes of the mean model by whether they hit a lesion.

    Args:
        module: The model into which states are loaded.
        batches: The site's labelled images.
        mean: The posterior's mean.
    """

    def __init__(self, module: MultiTaskModule, batches: Sequence[Batch], mean: State) -> None:
        self.module, self.batches, self.tasks = module, batches, module.tasks
        self._boxes: list[Predictions] = []
        boxes = [name for name, task in self.tasks.items() if task.kind == "detection"]
        if boxes:
            self._load(mean)
            for batch in batches:
                predictions = self._predict(batch)
                self._boxes.append({name: predictions[name] for name in boxes})

    def __call__(self, state: State) -> dict[str, Tensor]:
        """Return one probability per label, by task that has any label."""
        parts: dict[str, list[Tensor]] = {}
        self._load(state)
        for i, batch in enumerate(self.batches):
            predictions = self._predict(batch)
            for name, task in self.tasks.items():
                target = batch.targets[name]
                if isinstance(target, DetectionTarget):
                    values = _box_likelihood(self._boxes[i][name], predictions[name], target)
                elif task.probabilistic:
                    values = some_places(decisions(task, predictions[name], target)[2].cpu()).flatten()
                else:
                    continue  # a number: no likelihood, so it is predicted by the mean model
                parts.setdefault(name, []).append(values[~values.isnan()])
        joined = {name: torch.cat(values) for name, values in parts.items()}
        return {name: values for name, values in joined.items() if len(values)}

    def _load(self, state: State) -> None:
        self.module.load_state_dict(state)

    @torch.no_grad()
    def _predict(self, batch: Batch) -> Predictions:
        return self.module.predict_whole(batch.image)


def _box_likelihood(plain: Sequence[Any], drawn: Sequence[Any], target: Target) -> Tensor:
    assert isinstance(target, DetectionTarget)
    parts = [torch.zeros(0)]
    for i in target.present.nonzero().flatten().tolist():
        seen = plain[i]["scores"] >= BOX_SCORE
        boxes, labels = plain[i]["boxes"][seen], plain[i]["labels"][seen]
        score = box_probabilities(boxes, labels, [(drawn[i]["boxes"], drawn[i]["labels"], drawn[i]["scores"])])[0].cpu()
        same = labels[:, None] == target.labels[i][None]
        hit = torch.from_numpy(hits(boxes.double().cpu().numpy(), target.boxes[i].double().cpu().numpy(), "iou", HIT))
        true = (hit & same.cpu()).any(1)
        parts.append(torch.where(true, score, 1 - score))
    return torch.cat(parts)
