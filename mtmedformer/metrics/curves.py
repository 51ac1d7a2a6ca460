"""Ranking curves of weighted samples, many weightings at once.

Samples are sorted once; each weighting (a bootstrap resample, a subgroup) only changes how much a sample counts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def ratio(numerator: Floats, denominator: Floats) -> Floats:
    """Divide, with NaN where the denominator is zero."""
    known = denominator != 0
    return np.where(known, numerator / np.where(known, denominator, 1), np.nan)


def nan_mean(values: Floats) -> Floats:
    """Return the mean over the first axis of the values that are not NaN; NaN where there is none."""
    known = ~np.isnan(values)
    return ratio(np.where(known, values, 0).sum(axis=0), known.sum(axis=0).astype(np.float64))


def weighted_mean(values: Floats, weights: Floats) -> Floats:
    """Return the means of the (n,) values that are not NaN with weights (R, n); NaN where all weights are 0."""
    known = ~np.isnan(values)
    return ratio(weights[:, known] @ values[known], weights[:, known].sum(axis=1))


def operating_points(scores: Floats) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sort by falling score and return the order and the last place of each run of equal scores.

    Only the ends of runs are operating points: no threshold separates equal scores.

    Args:
        scores: (n,).

    Returns:
        order (n,) and ends (G,), G distinct scores.
    """
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True)) if len(ranked) else np.zeros(0, np.int64)
    return order, ends


def counts_above(weights: Floats, ends: NDArray[np.int64]) -> Floats:
    """Return the weight at or above each operating point, with a leading 0: (R, n) in ranked order to (R, G + 1)."""
    return np.concatenate([np.zeros((len(weights), 1)), np.cumsum(weights, axis=1)[:, ends]], axis=1)


def auroc(tp: Floats, fp: Floats) -> Floats:
    """Return the area under the ROC curve (trapezoids, so ties count half); NaN without both labels.

    Args:
        tp: (R, G + 1) positives at or above each operating point, falling threshold.
        fp: (R, G + 1) negatives, likewise.
    """
    area = (np.diff(fp) * (tp[:, 1:] + tp[:, :-1]) / 2).sum(axis=1)
    return ratio(area, tp[:, -1] * fp[:, -1])


def average_precision(tp: Floats, fp: Floats) -> Floats:
    """Return the sum of precision times gain in recall (scikit-learn's definition); NaN without both labels."""
    total = tp[:, 1:] + fp[:, 1:]
    precision = tp[:, 1:] / np.where(total > 0, total, 1)
    area = (np.diff(tp) * precision).sum(axis=1)
    return np.where(fp[:, -1] > 0, ratio(area, tp[:, -1]), np.nan)


def sensitivity_at_specificity(tp: Floats, fp: Floats, specificity: float) -> Floats:
    """Return the highest sensitivity of an operating point with at least this specificity; NaN without both labels."""
    allowed = fp <= (1 - specificity) * fp[:, -1:] + 1e-9
    best = np.where(allowed, tp, 0).max(axis=1)
    return np.where(fp[:, -1] > 0, ratio(best, tp[:, -1]), np.nan)
