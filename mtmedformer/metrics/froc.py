"""Free-response ROC: how many lesions are found at a given number of false alarms per image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mtmedformer.metrics.curves import Floats, counts_above, operating_points, ratio


@dataclass(frozen=True)
class Findings:
    """Lesions and false alarms of one class.

    Attributes:
        lesion_image: (M,) image of each true box.
        lesion_score: (M,) highest score of a prediction that hits it, ``-inf`` where it is missed.
        alarm_image: (A,) image of each prediction that hits no true box. Further hits of a found lesion are neither
            lesions nor false alarms.
        alarm_score: (A,) their scores.
    """

    lesion_image: NDArray[np.int64]
    lesion_score: Floats
    alarm_image: NDArray[np.int64]
    alarm_score: Floats


def sensitivities(findings: Findings, weights: Floats, rates: Sequence[float]) -> Floats:
    """Return the sensitivity at each rate of false positives per image, NaN without lesions.

    It is the highest sensitivity at a threshold with no more than that many false positives per image: a step
    function, without interpolation between thresholds (MONAI interpolates and leaves out the lowest score; the two
    agree where a rate times the number of images is a whole number).

    Args:
        findings: Lesions and false alarms.
        weights: (R, n) how often each image counts.
        rates: False positives per image, over all n images.

    Returns:
        (R, number of rates).
    """
    found = np.flatnonzero(np.isfinite(findings.lesion_score))
    scores = np.concatenate([findings.lesion_score[found], findings.alarm_score])
    images = np.concatenate([findings.lesion_image[found], findings.alarm_image])
    order, ends = operating_points(scores)
    ranked, lesion = weights[:, images[order]], order < len(found)
    tp, fp = counts_above(ranked * lesion, ends), counts_above(ranked * ~lesion, ends)
    lesions = weights[:, findings.lesion_image].sum(axis=1)
    allowed = weights.sum(axis=1)
    best = [np.where(fp <= (rate * allowed)[:, None] + 1e-9, tp, 0).max(axis=1) for rate in rates]
    return ratio(np.stack(best, axis=1), lesions[:, None])
