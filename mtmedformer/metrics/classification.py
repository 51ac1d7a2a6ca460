"""Metrics of classification: ranking, decisions and calibration."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from mtmedformer.batch import ClassificationTarget, Meta
from mtmedformer.metrics.base import Evaluate, Floats, TaskMetrics
from mtmedformer.metrics.curves import (
    auroc,
    average_precision,
    counts_above,
    nan_mean,
    operating_points,
    ratio,
    sensitivity_at_specificity,
    weighted_mean,
)

SMALLEST = float(np.finfo(np.float32).eps)
"""Probabilities are kept this far from 0 and 1 in the log-likelihood, as scikit-learn does for float32."""


class ClassificationMetrics(TaskMetrics):
    """Score class probabilities against the known labels.

    Per class, one against the rest: ``auroc``, ``ap`` (average precision), ``sensitivity_at_specificity_90``, and at
    the decision ``sensitivity``, ``specificity``, ``balanced_accuracy`` (their mean), ``f1``, ``accuracy``; plus
    ``ece`` and ``nll`` per class for multi-label tasks. The decision is ``probability > threshold`` for multi-label
    tasks and the most probable class otherwise. A class without both labels (``f1``: without positives) is NaN and
    left out of the overall value, which is the mean over classes, except for single-label tasks:

    - where all images are of one class, every mean over classes is NaN: recognising the only class is no achievement;
    - ``balanced_accuracy`` is the mean sensitivity over classes (scikit-learn's);
    - ``accuracy``, ``nll`` and ``ece`` (of the most probable class) are those of the whole decision.

    ``ece`` is the expected calibration error with equally wide bins of the confidence (torchmetrics' l1 norm).

    Args:
        classes: Class names in channel order.
        multi_label: Whether several classes may hold at once. A task of one class always counts as multi-label.
        threshold: Probability above which a class of a multi-label task is predicted.
        specificity: Specificity at which the sensitivity is reported, in (0, 1).
        bins: Number of bins of the calibration error.
    """

    primary = "auroc"
    probabilities: list[Tensor]
    labels: list[Tensor]

    def __init__(
        self,
        classes: Sequence[str],
        multi_label: bool = False,
        threshold: float = 0.5,
        specificity: float = 0.9,
        bins: int = 15,
    ) -> None:
        super().__init__(classes)
        self.multi_label = multi_label or len(self.classes) == 1
        self.threshold = threshold
        self.specificity = specificity
        self.bins = bins
        empty = torch.zeros(0, len(self.classes))
        self.add_rows("probabilities", empty)
        self.add_rows("labels", empty)

    def update(self, predictions: Tensor, target: ClassificationTarget, meta: Sequence[Meta]) -> None:
        """Keep the probabilities (B, K) and labels of the labelled images."""
        rows = self.register(meta, target.present)
        if rows:
            self.probabilities.append(predictions.detach()[rows].float().cpu())
            self.labels.append(target.labels[rows].float().cpu())

    @override
    def prepare(self, rows: NDArray[np.int64]) -> Evaluate:
        probabilities = self.table("probabilities").numpy()[rows].astype(np.float64)
        labels = self.table("labels").numpy()[rows].astype(np.float64)
        if not self.multi_label:
            labels = np.where(np.isnan(labels).any(axis=1, keepdims=True), np.nan, labels)
        evaluators = [self._one_class(probabilities, labels, k) for k in range(len(self.classes))]
        whole = None if self.multi_label else self._decision(probabilities, labels)

        def evaluate(weights: Floats) -> dict[str, Floats]:
            per_class = [one(weights) for one in evaluators]
            overall = {name: nan_mean(np.stack([one[name] for one in per_class])) for name in per_class[0]}
            if whole is not None:
                several = (weights @ (labels == 1)).astype(bool).sum(axis=1) > 1
                overall = {name: np.where(several, value, np.nan) for name, value in overall.items()}
                overall |= {"balanced_accuracy": overall["sensitivity"], **whole(weights)}
            named = zip(self.classes, per_class, strict=True)
            return overall | {f"{name}/{label}": value for label, one in named for name, value in one.items()}

        return evaluate

    @override
    def positives(self, rows: NDArray[np.int64]) -> dict[str, int]:
        counts = (self.table("labels").numpy()[rows] == 1).sum(axis=0)
        return dict(zip(self.classes, counts.tolist(), strict=True))

    def _one_class(self, probabilities: Floats, labels: Floats, k: int) -> Evaluate:
        known = np.flatnonzero(~np.isnan(labels[:, k]))
        score, truth = probabilities[known, k], labels[known, k] == 1
        best = probabilities[known].argmax(axis=1)
        predicted = score > self.threshold if self.multi_label else best == k
        order, ends = operating_points(score)
        target = truth.astype(np.float64)
        likelihood = -np.log(np.clip(np.where(truth, score, 1 - score), SMALLEST, 1))
        calibrated = calibration(score, target, self.bins)

        def evaluate(weights: Floats) -> dict[str, Floats]:
            weights = weights[:, known]
            ranked = weights[:, order]
            tp_curve = counts_above(ranked * truth[order], ends)
            fp_curve = counts_above(ranked * ~truth[order], ends)
            tp, fp = weights @ (predicted & truth), weights @ (predicted & ~truth)
            positives, negatives = tp_curve[:, -1], fp_curve[:, -1]
            sensitivity, specificity = ratio(tp, positives), 1 - ratio(fp, negatives)
            f1 = ratio(2 * tp, tp + fp + positives)
            values = {
                "auroc": auroc(tp_curve, fp_curve),
                "ap": average_precision(tp_curve, fp_curve),
                "balanced_accuracy": (sensitivity + specificity) / 2,
                "f1": np.where(positives > 0, f1, np.nan),
                f"sensitivity_at_specificity_{100 * self.specificity:g}": sensitivity_at_specificity(
                    tp_curve, fp_curve, self.specificity
                ),
                "sensitivity": sensitivity,
                "specificity": specificity,
                "accuracy": weighted_mean((predicted == truth).astype(np.float64), weights),
            }
            if self.multi_label:
                values |= {"ece": calibrated(weights), "nll": weighted_mean(likelihood, weights)}
            return values

        return evaluate

    def _decision(self, probabilities: Floats, labels: Floats) -> Evaluate:
        known = np.flatnonzero(~np.isnan(labels).any(axis=1))
        probabilities, truth = probabilities[known], labels[known].argmax(axis=1)
        correct = (probabilities.argmax(axis=1) == truth).astype(np.float64)
        likelihood = -np.log(np.clip(probabilities[np.arange(len(truth)), truth], SMALLEST, 1))
        calibrated = calibration(probabilities.max(axis=1, initial=0), correct, self.bins)

        def evaluate(weights: Floats) -> dict[str, Floats]:
            weights = weights[:, known]
            return {
                "accuracy": weighted_mean(correct, weights),
                "ece": calibrated(weights),
                "nll": weighted_mean(likelihood, weights),
            }

        return evaluate


def calibration(confidence: Floats, correct: Floats, bins: int) -> Callable[[Floats], Floats]:
    """Return the expected calibration error as a function of weights (R, n): the gap per bin, weighted by its share.

    Args:
        confidence: (n,) in [0, 1].
        correct: (n,) 0 or 1.
        bins: Number of equally wide bins ``[a, b)``; a confidence of exactly 1 is a bin of its own, as in torchmetrics.
    """
    edges = np.linspace(0, 1, bins + 1, dtype=np.float32)
    member = np.eye(bins + 1)[np.digitize(confidence.astype(np.float32), edges) - 1]
    gaps = member * (correct - confidence)[:, None]

    def evaluate(weights: Floats) -> Floats:
        return ratio(np.abs(weights @ gaps).sum(axis=1), weights.sum(axis=1))

    return evaluate
