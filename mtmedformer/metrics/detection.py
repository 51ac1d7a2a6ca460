"""Metrics of detection: COCO's, RSNA's and free-response ROC."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from mtmedformer.batch import DetectionTarget, Meta
from mtmedformer.metrics import coco
from mtmedformer.metrics.base import Evaluate, Floats, TaskMetrics
from mtmedformer.metrics.curves import nan_mean, weighted_mean
from mtmedformer.metrics.froc import Findings, sensitivities
from mtmedformer.metrics.matching import box_iou, hits, match

RSNA_THRESHOLDS = np.linspace(0.4, 0.75, 8)
"""IoU thresholds 0.40, 0.45 … 0.75 of the RSNA pneumonia detection challenge (Kaggle, 2018)."""

THRESHOLDS = np.concatenate([RSNA_THRESHOLDS, coco.THRESHOLDS])
RSNA, COCO = slice(len(RSNA_THRESHOLDS)), slice(len(RSNA_THRESHOLDS), None)


class DetectionMetrics(TaskMetrics):
    """Score boxes against the true boxes of the same class.

    Per class, and overall as the mean over classes that have true boxes:

    - ``map``, ``map50``, ``map75``: COCO's average precision over IoU 0.50:0.95, at 0.50 and at 0.75 (torchmetrics with
      faster-coco-eval and pycocotools' own thresholds, so that it equals pycocotools).
    - ``rsna_map``: the Kaggle RSNA metric, TP / (TP + FP + FN) per image, mean over IoU 0.40:0.75, of boxes that score
      at least ``score_threshold``. An image without true boxes counts (as 0) only if a box is predicted in it.
    - ``froc``: mean sensitivity at ``fp_rates`` false positives per image (over all labelled images, with or without
      lesions). Only overall: ``sensitivity_at_<rate>fp`` for each of the rates.

    Args:
        classes: Class names in label order.
        hit: When a box finds a lesion for FROC: ``iou``, they overlap by at least ``iou``; ``centre``, the box's
            centre lies in the lesion's box. ``map`` and ``rsna_map`` have their own rules.
        iou: Least overlap of the rule ``iou``. Lenient by default: readers' outlines of one lesion differ.
        score_threshold: Score from which a box is submitted to ``rsna_map``. Choose it on validation images.
        fp_rates: False positives per image at which FROC reads the sensitivity.
    """

    primary = "map50"
    counts: list[Tensor]
    found: list[Tensor]
    true: list[Tensor]

    def __init__(
        self,
        classes: Sequence[str],
        hit: Literal["iou", "centre"] = "iou",
        iou: float = 0.3,
        score_threshold: float = 0.5,
        fp_rates: Sequence[float] = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0),
    ) -> None:
        super().__init__(classes)
        self.hit = hit
        self.iou = iou
        self.score_threshold = score_threshold
        self.fp_rates = tuple(fp_rates)
        self.add_rows("counts", torch.zeros(0, 2, dtype=torch.int64))
        self.add_rows("found", torch.zeros(0, 6))
        self.add_rows("true", torch.zeros(0, 5))

    def update(self, predictions: Sequence[dict[str, Tensor]], target: DetectionTarget, meta: Sequence[Meta]) -> None:
        """Keep boxes, scores and labels of the labelled images."""
        for i in self.register(meta, target.present):
            p, boxes, labels = predictions[i], target.boxes[i], target.labels[i]
            predicted = torch.cat(
                [p["boxes"].float(), p["scores"].float()[:, None], p["labels"].float()[:, None]], dim=1
            )
            predicted = predicted.detach().cpu()
            # COCO's evaluation ignores a box with swapped corners: give it no area instead
            predicted[:, 2:4] = torch.maximum(predicted[:, 2:4], predicted[:, :2])
            self.found.append(predicted)
            self.true.append(torch.cat([boxes.float(), labels.float()[:, None]], dim=1).cpu())
            self.counts.append(torch.tensor([[len(predicted), len(boxes)]]))

    @override
    def overall(self, rows: NDArray[np.int64]) -> dict[str, float]:
        """Return every metric, with COCO's from torchmetrics."""
        values = super().overall(rows)
        predicted, true = self._split(rows)
        official = coco.official_average_precisions(
            [(f[:, :4], f[:, 4], f[:, 5].astype(np.int64)) for f in predicted],
            [(t[:, :4], t[:, 4].astype(np.int64)) for t in true],
            len(self.classes),
        )
        per_class = [_average(precision[None]) for precision in official]
        for name in per_class[0]:
            column = [float(one[name][0]) for one in per_class]
            values[name] = float(nan_mean(np.array(column)))
            values |= {f"{name}/{label}": value for label, value in zip(self.classes, column, strict=True)}
        return values

    @override
    def prepare(self, rows: NDArray[np.int64]) -> Evaluate:
        predicted, true = self._split(rows)
        evaluators = [
            self._one_class([f[f[:, 5] == k] for f in predicted], [t[t[:, 4] == k] for t in true])
            for k in range(len(self.classes))
        ]

        def evaluate(weights: Floats) -> dict[str, Floats]:
            per_class = [one(weights) for one in evaluators]
            overall = {name: nan_mean(np.stack([one[name] for one in per_class])) for name in per_class[0]}
            named = {
                f"{name}/{label}": value
                for label, one in zip(self.classes, per_class, strict=True)
                for name, value in one.items()
                if not name.startswith("sensitivity_at_")
            }
            return overall | named

        return evaluate

    def findings(self, rows: NDArray[np.int64]) -> list[Findings]:
        """Return the lesions and false alarms of each class, as FROC counts them.

        Args:
            rows: Rows of the states to use, an image each.
        """
        predicted, true = self._split(rows)
        return [
            self._findings([f[f[:, 5] == k] for f in predicted], [t[t[:, 4] == k] for t in true])
            for k in range(len(self.classes))
        ]

    @override
    def positives(self, rows: NDArray[np.int64]) -> dict[str, int]:
        lesions = np.concatenate([np.zeros(0), *(true[:, 4] for true in self._split(rows)[1])])
        return {name: int((lesions == k).sum()) for k, name in enumerate(self.classes)}

    def _split(self, rows: NDArray[np.int64]) -> tuple[list[Floats], list[Floats]]:
        counts = self.table("counts").numpy()
        tables = (self.table("found").numpy(), self.table("true").numpy())
        ends = counts.cumsum(axis=0)
        predicted, true = (
            [table[ends[r, i] - counts[r, i] : ends[r, i]].astype(np.float64) for r in rows]
            for i, table in enumerate(tables)
        )
        return [f[np.argsort(-f[:, 4], kind="stable")] for f in predicted], true

    def _one_class(self, predicted: list[Floats], true: list[Floats]) -> Evaluate:
        """Match the predictions of one class: per image predictions (N, 6) by falling score, true (M, 5)."""
        tp = [match(box_iou(f[:, :4], t[:, :4]), THRESHOLDS) for f, t in zip(predicted, true, strict=True)]
        submitted = [m[f[:, 4] >= self.score_threshold][:, RSNA] for m, f in zip(tp, predicted, strict=True)]
        kaggle = np.array([rsna_score(m, len(t)) for m, t in zip(submitted, true, strict=True)], dtype=np.float64)
        positive = np.array([len(t) for t in true], dtype=np.float64)
        ranked = _rank(predicted, [m[:, COCO] for m in tp], positive)
        findings = self._findings(predicted, true)

        def evaluate(weights: Floats) -> dict[str, Floats]:
            lesions = weights @ positive
            values = _average(coco.average_precisions(ranked, weights))
            values["rsna_map"] = np.where(lesions > 0, weighted_mean(kaggle, weights), np.nan)
            found_at = sensitivities(findings, weights, self.fp_rates)
            values["froc"] = found_at.mean(axis=1)
            return values | {f"sensitivity_at_{x:g}fp": found_at[:, i] for i, x in enumerate(self.fp_rates)}

        return evaluate

    def _findings(self, predicted: list[Floats], true: list[Floats]) -> Findings:
        lesion_scores, alarm_scores = [np.zeros(0)], [np.zeros(0)]
        for f, t in zip(predicted, true, strict=True):
            hit = hits(f[:, :4], t[:, :4], self.hit, self.iou)
            lesion_scores.append(np.where(hit, f[:, 4:5], -np.inf).max(axis=0, initial=-np.inf))
            alarm_scores.append(f[~hit.any(axis=1), 4])
        return Findings(
            lesion_image=_image_of(lesion_scores),
            lesion_score=np.concatenate(lesion_scores),
            alarm_image=_image_of(alarm_scores),
            alarm_score=np.concatenate(alarm_scores),
        )


def _image_of(parts: list[Floats]) -> NDArray[np.int64]:
    """Number the images whose parts, after a leading empty one, are joined."""
    return np.repeat(np.arange(len(parts) - 1), [len(part) for part in parts[1:]])


def _rank(predicted: list[Floats], tp: list[NDArray[np.bool_]], true: Floats) -> coco.Ranked:
    top = [np.zeros(0), *(f[: coco.MAX_DETECTIONS, 4] for f in predicted)]
    hit = np.concatenate([np.zeros((0, len(coco.THRESHOLDS)), dtype=bool), *(m[: coco.MAX_DETECTIONS] for m in tp)])
    order = np.argsort(-np.concatenate(top), kind="stable")
    return coco.Ranked(_image_of(top)[order], hit[order], true)


def _average(precisions: Floats) -> dict[str, Floats]:
    """Name the averages over (R, T) IoU thresholds."""
    at50, at75 = (int(np.flatnonzero(np.isclose(coco.THRESHOLDS, t))[0]) for t in (0.5, 0.75))
    return {"map": precisions.mean(axis=1), "map50": precisions[:, at50], "map75": precisions[:, at75]}


def rsna_score(hit: NDArray[np.bool_], true: int) -> float:
    """Return the RSNA challenge's score of one image, the mean of TP / (TP + FP + FN) over the IoU thresholds.

    Args:
        hit: (N, T) whether each submitted box is a true positive at each threshold.
        true: Number of true boxes.

    Returns:
        In [0, 1]; 0 where there are boxes but no true ones; NaN (the image is skipped) where there is neither.
    """
    if not true and not len(hit):
        return float("nan")
    tp = hit.sum(axis=0)
    return float((tp / (len(hit) + true - tp)).mean())
