"""How well a finding is predicted from view, site, side, a group or the format alone, without the pixels.

A model may use these shortcuts. In the RSNA pneumonia set, for example, the view alone (a bedside film or not) gives
an AUC of 0.71.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from datamodules.audit.image_statistics import ImageStatistics
from datamodules.loading.samplers import strata
from datamodules.records import BoxTruth, ClassTruth, ValueTruth
from mtmedformer.batch import Task

FOLDS = 5


@dataclass(frozen=True)
class Shortcut:
    """How well one property of an image predicts one finding.

    Attributes:
        task: Name of the task.
        finding: The class, or ``any`` for a box of any class.
        source: The property: ``view``, ``site``, ``laterality``, ``image size``, ``pixel spacing`` or a group column.
        auc: Area under the ROC curve of the finding's rate in *other* patients with the same property. Values below
            0.5, to which rates of other patients are biased, are given as 0.5.
        images: Number of images labelled for it.
        positives: Number of images with the finding.
        warning: Whether the AUC exceeds 0.5 by more than 0.15 and by more than two standard errors.
    """

    task: str
    finding: str
    source: str
    auc: float
    images: int
    positives: int
    warning: bool


def find_shortcuts(images: Sequence[ImageStatistics], tasks: dict[str, Task], least: int = 10) -> list[Shortcut]:
    """Measure how well each property predicts each finding in other patients.

    Args:
        images: Their statistics.
        tasks: The tasks by name; masks and numbers are left out.
        least: Findings with fewer positives or negatives than this are left out.

    Returns:
        The strongest first.
    """
    sources = {
        "view": [str(f.view) for f in images],
        "site": [f.record.site for f in images],
        "laterality": [str(f.laterality) for f in images],
        "image size": [f"{f.size[1]}x{f.size[0]}" for f in images],
        "pixel spacing": ["None" if f.spacing is None else f"{f.spacing[0]:.4g}" for f in images],
    }
    for column in dict.fromkeys(name for f in images for name in f.record.groups):
        values = [f.record.groups.get(column, "None") for f in images]
        pairs = set(zip(values, sources["site"], strict=True))
        if column not in sources and not len(pairs) == len(set(values)) == len(set(sources["site"])):
            sources[column] = values  # a column with the groups of the sites adds nothing
    fold = np.array([_fold(f.record.patient) for f in images])
    shortcuts = []
    for task, finding, truth in _findings(images, tasks):
        known = ~np.isnan(truth)
        positives, labelled = int(truth[known].sum()), int(known.sum())
        if min(positives, labelled - positives) < least:
            continue
        error = 0.5 / math.sqrt(min(positives, labelled - positives))
        for source, values in sources.items():
            chosen = [v for v, k in zip(values, known, strict=True) if k]
            if len(set(chosen)) < 2:
                continue
            auc = max(0.5, _auc(_rates(chosen, truth[known], fold[known]), truth[known]))
            shortcuts.append(
                Shortcut(task, finding, source, round(auc, 3), labelled, positives, auc - 0.5 > max(0.15, 2 * error))
            )
    return sorted(shortcuts, key=lambda s: (-s.auc, s.task, s.finding, s.source))


def _findings(images: Sequence[ImageStatistics], tasks: dict[str, Task]) -> list[tuple[str, str, NDArray[np.float64]]]:
    """Return task, finding and 1, 0 or NaN (unknown) per image, for each finding."""
    findings = []
    for name, task in tasks.items():
        truths = [f.record.truth.get(name) for f in images]
        if task.kind == "classification":
            for k, label in enumerate(task.classes):
                values = [t.values[k] if isinstance(t, ClassTruth) else math.nan for t in truths]
                findings.append((name, label, np.array(values)))
        elif task.ordinal:
            grades = np.array([t.value if isinstance(t, ValueTruth) else math.nan for t in truths])
            for k, label in enumerate(task.classes):
                findings.append((name, label, np.where(np.isnan(grades), math.nan, grades == k)))
        elif task.kind == "detection":
            strata_of = [strata(f.record, {name: task}) for f in images]
            some = [
                float(w == (f"{name}=+",)) if isinstance(t, BoxTruth) else math.nan
                for t, w in zip(truths, strata_of, strict=True)
            ]
            findings.append((name, "any", np.array(some)))
    return findings


def _fold(patient: str) -> int:
    return int.from_bytes(hashlib.blake2b(patient.encode(), digest_size=4).digest(), "big") % FOLDS


def _rates(values: Sequence[str], truth: NDArray[np.float64], fold: NDArray[np.int_]) -> NDArray[np.float64]:
    """Return for each image the rate of the finding among images of other patients with the same value.

    Each rate is averaged with the overall rate, weighted as two images, so that rare values are close to it.
    """
    scores = np.empty(len(values))
    for k in range(FOLDS):
        mine = fold == k
        if not mine.any():
            continue
        overall = float(truth[~mine].mean()) if (~mine).any() else 0.5
        count: Counter[str] = Counter()
        hits: Counter[str] = Counter()
        for value, hit, in_fold in zip(values, truth, mine, strict=True):
            if not in_fold:
                count[value] += 1
                hits[value] += int(hit)
        for i in np.flatnonzero(mine).tolist():
            value = values[i]
            scores[i] = (hits[value] + 2 * overall) / (count[value] + 2) - overall
    return scores


def _auc(scores: NDArray[np.float64], truth: NDArray[np.float64]) -> float:
    ranks = stats.rankdata(scores)
    positives = int(truth.sum())
    return float((ranks[truth > 0].sum() - positives * (positives + 1) / 2) / (positives * (len(truth) - positives)))
