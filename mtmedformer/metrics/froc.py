"""Free-response ROC: the sensitivity for lesions at a given number of false positives per image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mtmedformer.metrics.curves import Floats, ratio


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
    agree where a rate times the number of images is a whole number). A lesion is found at a rate if the false alarms
    that score no less than it are few enough, so only those need counting.

    Args:
        findings: Lesions and false alarms.
        weights: (R, n) how often each image counts.
        rates: False positives per image, over all n images.

    Returns:
        (R, number of rates).
    """
    order = np.argsort(-findings.alarm_score, kind="stable")
    alarms = np.cumsum(weights[:, findings.alarm_image[order]], axis=1)
    alarms = np.concatenate([np.zeros((len(weights), 1)), alarms], axis=1)
    not_below = np.searchsorted(-findings.alarm_score[order], -findings.lesion_score, side="right")
    false_positives = np.where(np.isfinite(findings.lesion_score), alarms[:, not_below], np.inf)
    lesions, images = weights[:, findings.lesion_image], weights.sum(axis=1)
    found = [(lesions * (false_positives <= (rate * images)[:, None] + 1e-9)).sum(axis=1) for rate in rates]
    return ratio(np.stack(found, axis=1), lesions.sum(axis=1)[:, None])
