"""Scores and labels of cases (an exam, a breast): pooled from those of their images, and the metrics by case."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from mtmedformer.batch import ClassificationTarget, Meta, RegressionTarget, Task
from mtmedformer.metrics.base import Evaluate, TaskMetrics

Floats = NDArray[np.float64]
Pooling = Literal["max", "mean", "noisy_or"]


@dataclass(frozen=True)
class CaseRule:
    """How the images of a case become one score and one label.

    Attributes:
        pooling: ``max``: the image with the highest score decides. ``mean``: all images count equally. ``noisy_or``:
            ``1 - (1 - p1)(1 - p2)…``, the probability of at least one finding if the images err independently.
        negative: Names of the classes without a finding, in lower case.
    """

    pooling: Pooling = "max"
    negative: frozenset[str] = frozenset()

    def scores(self, task: Task, scores: Floats, cases: NDArray[np.int64]) -> Floats:
        """Return the pooled scores of a classification, or the mean numbers or probabilities of a regression.

        Classes that may hold at once are pooled one by one. Of exclusive classes, those with a finding are pooled so,
        and the negative classes share what is left of 1, in proportion to their means; without a negative class the
        pooled scores are divided by their sum. ``mean`` needs neither.

        Args:
            task: The task.
            scores: (n, K) probabilities of the images, or (n, 1) numbers.
            cases: (n,) number of each image's case, from 0.

        Returns:
            The same of the cases.
        """
        members = [scores[cases == case] for case in range(int(cases.max(initial=-1)) + 1)]
        mean = np.array([rows.mean(axis=0) for rows in members]).reshape(-1, scores.shape[1])
        if self.pooling == "mean" or task.kind == "regression":
            return mean
        pool = np.max if self.pooling == "max" else _noisy_or
        pooled: Floats = np.array([pool(rows, axis=0) for rows in members]).reshape(-1, scores.shape[1])
        if not task.exclusive:
            return pooled
        negative = self._negative(task)
        if negative.any() and not negative.all():
            found = pooled[:, ~negative]
            found = found / np.maximum(found.sum(axis=1, keepdims=True), 1.0)
            share = mean[:, negative] / np.maximum(mean[:, negative].sum(axis=1, keepdims=True), 1e-12)
            pooled[:, ~negative] = found
            pooled[:, negative] = share * (1 - found.sum(axis=1, keepdims=True))
            return pooled
        shared: Floats = pooled / np.maximum(pooled.sum(axis=1, keepdims=True), 1e-12)
        return shared

    def labels(self, task: Task, labels: Floats, cases: NDArray[np.int64]) -> Floats:
        """Return the labels of the cases.

        A class holds in a case if it does in any image. It is absent if it is known to be absent in every image. Else
        it is unknown: a missing label is not a negative one. Of exclusive classes, a class with a finding in one image
        outweighs negative classes, also unknown ones, in the others; where images name different classes otherwise, the
        label is unknown. The number of a case is the mean over its images, its grade the one that all images have; both
        are unknown if they are in any image.

        Args:
            task: The task.
            labels: (n, K) of 1, 0 and NaN (unknown); (n, 1) of a regression.
            cases: (n,) number of each image's case, from 0.

        Returns:
            The same of the cases.
        """
        negative = self._negative(task)
        finding = ~negative if negative.any() else np.zeros_like(negative)
        result = np.full((int(cases.max(initial=-1)) + 1, labels.shape[1]), np.nan)
        for case in range(len(result)):
            rows = labels[cases == case]
            present, known = (rows == 1).any(axis=0), not np.isnan(rows).any()
            if task.kind == "regression":
                result[case] = rows.mean(axis=0) if not task.ordinal or len(np.unique(rows)) == 1 else np.nan
            elif not task.exclusive:
                result[case] = np.where(present, 1.0, np.where((rows == 0).all(axis=0), 0.0, np.nan))
            elif (present & finding).any() or known:
                decided = present & finding if (present & finding).any() else present
                result[case] = decided if decided.sum() == 1 else np.nan
        return result

    def _negative(self, task: Task) -> NDArray[np.bool_]:
        return np.array([plain_name(name) in self.negative for name in task.classes], bool)


@runtime_checkable
class CasedData(Protocol):
    """A data module whose images may belong to cases; without it there are no results by case.

    Attributes:
        case: Names of the fields that name a case; empty where there are no cases.
        case_rule: How the scores and labels of a case's images become one.
        case_batches: Whether batches hold whole cases.
    """

    case: Sequence[str]
    case_batches: bool
    case_rule: CaseRule


def plain_name(name: str) -> str:
    """Return a name of a class in lower case, with blanks in place of ``_`` and ``-``."""
    return " ".join(name.lower().replace("_", " ").replace("-", " ").split())


def case_keys(meta: Sequence[Meta]) -> list[str]:
    """Return the case of each image; an image without one is a case of its own."""
    return [one.case or hashlib.blake2b(f"{one.site}\x00{one.id}".encode(), digest_size=8).hexdigest() for one in meta]


class CaseMetrics(TaskMetrics):
    """Metrics by case: scores of all images of a case are pooled, and its label follows from those of the images.

    Images without a label count in the scores and, as unknown, in the labels.

    Args:
        task: The classification or regression.
        rule: How scores and labels are pooled.
        metric: Fresh metric of the task, filled with the cases by `pooled`.
    """

    primary = ""
    scores: list[Tensor]
    labels: list[Tensor]
    cases: list[Tensor]

    def __init__(self, task: Task, rule: CaseRule, metric: TaskMetrics) -> None:
        super().__init__(task.classes)
        self.task, self.rule, self.metric = task, rule, metric
        self.add_rows("scores", torch.zeros(0, len(task.classes) or 1, dtype=torch.float64))
        columns = 1 if task.kind == "regression" else len(task.classes)
        self.add_rows("labels", torch.zeros(0, columns, dtype=torch.float64))
        self.add_rows("cases", torch.zeros(0, dtype=torch.int64))

    def update(
        self, predictions: Tensor, target: ClassificationTarget | RegressionTarget, meta: Sequence[Meta]
    ) -> None:
        """Keep the predictions (B, K) of all images, and their labels where they are known."""
        self.register(meta, torch.ones(len(meta), dtype=torch.bool))
        labels = target.values[:, None] if isinstance(target, RegressionTarget) else target.labels
        known = labels.double().masked_fill(~target.present[:, None], torch.nan)
        self.scores.append(predictions.detach().double().cpu())
        self.labels.append(known.cpu())
        self.cases.append(torch.tensor([int(key, 16) - 2**63 for key in case_keys(meta)], dtype=torch.int64))

    def pooled(self, rows: NDArray[np.int64] | None = None) -> TaskMetrics:
        """Return the metric of the task, filled with the cases as its images, in the order of their keys."""
        rows = self.seen().rows if rows is None else rows
        lines = [json.loads(line) for line in bytes(self.table("images").numpy()).decode().splitlines()]
        keys = self.table("cases").numpy()[rows]
        known, cases = np.unique(keys, return_inverse=True)
        labels = self.rule.labels(self.task, self.table("labels").numpy()[rows], cases)
        scores = self.rule.scores(self.task, self.table("scores").numpy()[rows], cases)
        first = [int(rows[np.flatnonzero(cases == case)[0]]) for case in range(len(known))]
        meta = [
            Meta(id=str(key), patient=lines[row][1], site=lines[row][2], groups=lines[row][4])
            for key, row in zip(known, first, strict=True)
        ]
        known_labels = torch.from_numpy(~np.isnan(labels).all(axis=1)).reshape(-1)
        truth = torch.from_numpy(labels).float()
        target: ClassificationTarget | RegressionTarget = ClassificationTarget(truth, known_labels)
        if self.task.kind == "regression":
            target = RegressionTarget(truth[:, 0], known_labels)
        self.metric.reset()
        self.metric.update(torch.from_numpy(scores).float(), target, meta)
        return self.metric

    @override
    def prepare(self, rows: NDArray[np.int64]) -> Evaluate:
        """Return the function that evaluates the cases; a case has the weight of its first image."""
        pooled = self.pooled(rows)
        _, cases = np.unique(self.table("cases").numpy()[rows], return_inverse=True)
        labelled = np.flatnonzero(
            ~np.isnan(self.rule.labels(self.task, self.table("labels").numpy()[rows], cases)).all(axis=1)
        )
        first = np.array([np.flatnonzero(cases == case)[0] for case in labelled], np.int64)
        evaluate = pooled.prepare(np.arange(len(labelled)))
        return lambda weights: evaluate(weights[:, first])

    @override
    def report(self, replicates: int = 1000, seed: int = 0, level: float = 0.95) -> dict[str, float]:
        """Return every metric over the cases, as ``TaskMetrics.report`` does over images.

        ``n_cases`` are the labelled cases, ``n_unlabelled`` those without a label.
        """
        with self.gathered():
            images = self.seen()
            cases = len(np.unique(self.table("cases").numpy()[images.rows]))
            pooled = self.pooled(images.rows)
        values = pooled.report(replicates, seed, level)
        counts = {"n_cases": values.pop("n_images"), "n_patients": values.pop("n_patients")}
        counts |= {"n_unlabelled": cases - counts["n_cases"], "n_images": float(len(images))}
        return counts | {name.replace("n_images/", "n_cases/"): value for name, value in values.items()}


def pooled_results(task: Task, rule: CaseRule, classes: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the pooled probabilities of one case from those of its images, by class."""
    scores = np.array([[one[name] for name in task.classes] for one in classes])
    pooled: list[Any] = rule.scores(task, scores, np.zeros(len(scores), np.int64))[0].tolist()
    return dict(zip(task.classes, pooled, strict=True))


def _noisy_or(rows: Floats, axis: int) -> Floats:
    pooled: Floats = 1 - np.prod(1 - rows, axis=axis)
    return pooled
