"""Metrics of numbers and of ordinal grades: error, explained variance, agreement."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from mtmedformer.batch import Meta, RegressionTarget
from mtmedformer.metrics.base import Evaluate, Floats, TaskMetrics
from mtmedformer.metrics.curves import nan_mean, ratio, weighted_mean


class RegressionMetrics(TaskMetrics):
    """Score predicted numbers, in the unit of the labels, against the known ones.

    - ``mae``: mean absolute error. ``rmse``: root of the mean squared error. ``bias``: mean of prediction minus truth.
    - ``r2``: coefficient of determination. 1 is perfect, 0 is as good as the mean of the truth, below 0 is worse; NaN
      where all images have one truth.
    - ``ccc``: Lin's concordance correlation coefficient, which a bias lowers and a correlation does not see. It is the
      main metric, because it is bounded: 1 is perfect agreement, 0 none; NaN where all images have one truth.
    - ``pearson``: correlation; NaN also where all predictions are equal.
    """

    primary = "ccc"
    predicted: list[Tensor]
    truth: list[Tensor]

    def __init__(self) -> None:
        super().__init__(())
        self.add_rows("predicted", torch.zeros(0, dtype=torch.float64))
        self.add_rows("truth", torch.zeros(0, dtype=torch.float64))

    def update(self, predictions: Tensor, target: RegressionTarget, meta: Sequence[Meta]) -> None:
        """Keep the predictions (B, 1) and labels of the labelled images."""
        rows = self.register(meta, target.present)
        if rows:
            self.predicted.append(predictions.detach()[rows, 0].double().cpu())
            self.truth.append(target.values[rows].double().cpu())

    def pairs(self, rows: NDArray[np.int64]) -> tuple[Floats, Floats]:
        """Return predictions and truth (n,) of some rows."""
        return self.table("predicted").numpy()[rows], self.table("truth").numpy()[rows]

    @override
    def prepare(self, rows: NDArray[np.int64]) -> Evaluate:
        predicted, truth = self.pairs(rows)
        error, constant = predicted - truth, _constant(truth)
        flat = _constant(predicted)

        def evaluate(weights: Floats) -> dict[str, Floats]:
            squares, bias = weighted_mean(error**2, weights), weighted_mean(error, weights)
            known = ~constant(weights)
            of_truth = np.where(known, _variance(truth, weights), 0.0)
            of_predicted = np.where(flat(weights), 0.0, _variance(predicted, weights))
            covariance = (of_truth + of_predicted + bias**2 - squares) / 2  # from Var(p - t)
            return {
                "mae": weighted_mean(np.abs(error), weights),
                "rmse": np.sqrt(squares),
                "bias": bias,
                "r2": 1 - ratio(squares, of_truth),
                "ccc": np.where(known, ratio(2 * covariance, of_truth + of_predicted + bias**2), np.nan),
                "pearson": ratio(covariance, np.sqrt(of_truth * of_predicted)),
            }

        return evaluate


class OrdinalMetrics(TaskMetrics):
    """Score the probabilities of grades by the predicted grade, the median of the distribution.

    - ``kappa``: Cohen's kappa with quadratic weights. 1 is perfect agreement, 0 is that of chance; NaN where all images
      have one grade.
    - ``mae``: mean distance of predicted and true grade, in grades. ``accuracy``: share of exact grades.
      ``within_one``: share of grades that are at most one off.
    - ``sensitivity/<grade>``: share of the images of a grade that get it; overall the mean over the grades.

    Args:
        classes: Names of the grades, the lowest first.
    """

    primary = "kappa"
    probabilities: list[Tensor]
    truth: list[Tensor]

    def __init__(self, classes: Sequence[str]) -> None:
        super().__init__(classes)
        self.add_rows("probabilities", torch.zeros(0, len(self.classes)))
        self.add_rows("truth", torch.zeros(0, dtype=torch.int64))

    def update(self, predictions: Tensor, target: RegressionTarget, meta: Sequence[Meta]) -> None:
        """Keep the probabilities (B, K) and grades of the labelled images."""
        rows = self.register(meta, target.present)
        if rows:
            self.probabilities.append(predictions.detach()[rows].float().cpu())
            self.truth.append(target.values[rows].long().cpu())

    def pairs(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return predicted and true grades (n,) of some rows."""
        return median_grade(self.table("probabilities")[rows]).numpy(), self.table("truth").numpy()[rows]

    @override
    def positives(self, rows: NDArray[np.int64]) -> dict[str, int]:
        truth = self.table("truth").numpy()[rows]
        return {name: int((truth == k).sum()) for k, name in enumerate(self.classes)}

    @override
    def prepare(self, rows: NDArray[np.int64]) -> Evaluate:
        predicted, truth = self.pairs(rows)
        distance = np.abs(predicted - truth).astype(np.float64)
        of_grade = np.eye(len(self.classes))

        def evaluate(weights: Floats) -> dict[str, Floats]:
            total = weights.sum(axis=1)
            counts = (
                np.stack([weights @ of_grade[predicted], weights @ of_grade[truth]]) / np.maximum(total, 1)[:, None]
            )
            grades = np.arange(len(self.classes), dtype=np.float64)
            means, squares = counts @ grades, counts @ grades**2
            by_chance = squares.sum(axis=0) - 2 * means.prod(axis=0)  # mean squared distance of two random images
            known = (counts[1] > 0).sum(axis=1) > 1
            recall = ratio((weights * (distance == 0)) @ of_grade[truth], weights @ of_grade[truth])
            return {
                "kappa": np.where(known, 1 - ratio(weighted_mean(distance**2, weights), by_chance), np.nan),
                "mae": weighted_mean(distance, weights),
                "accuracy": weighted_mean((distance == 0).astype(np.float64), weights),
                "within_one": weighted_mean((distance <= 1).astype(np.float64), weights),
                "sensitivity": nan_mean(recall.T),
                **{f"sensitivity/{name}": recall[:, k] for k, name in enumerate(self.classes)},
            }

        return evaluate


def median_grade(probabilities: Tensor) -> Tensor:
    """Return the median of each distribution over grades, int64 (B,), from probabilities (B, K)."""
    below = probabilities.double().cumsum(1)
    return (below < 0.5 * below[:, -1:] - 1e-6).sum(1).clamp_max(probabilities.shape[1] - 1)


def _variance(values: Floats, weights: Floats) -> Floats:
    """Return the variances of (n,) values with weights (R, n); NaN where all weights are 0."""
    centred = values - (values.mean() if len(values) else 0.0)  # large offsets would cancel
    return np.maximum(weighted_mean(centred**2, weights) - weighted_mean(centred, weights) ** 2, 0.0)


def _constant(values: Floats) -> Callable[[Floats], NDArray[np.bool_]]:
    """Return the function from weights (R, n) to whether all (n,) values that count are equal, bool (R,)."""
    distinct, place = np.unique(values, return_inverse=True)
    if len(distinct) < 2:
        return lambda weights: np.ones(len(weights), bool)

    order = np.argsort(place, kind="stable")
    starts = np.flatnonzero(np.diff(place[order], prepend=-1))
    return lambda weights: (np.add.reduceat(weights[:, order], starts, axis=1) > 0).sum(axis=1) < 2
