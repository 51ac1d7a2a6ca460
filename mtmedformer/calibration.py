"""Calibration of a trained model: a temperature or an interval per task, thresholds per class and operating point."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import CubicHermiteSpline
from scipy.optimize import minimize_scalar

from mtmedformer.errors import ConfigError
from mtmedformer.metrics.calibration import LOG_TEMPERATURES
from mtmedformer.metrics.curves import Floats, counts_above, operating_points
from mtmedformer.metrics.froc import Findings

PRIOR = 0.5
"""Standard deviation of log temperature before any image is seen: a temperature beyond 1/e or e takes many of them."""


@dataclass(frozen=True)
class TaskCalibration:
    """Temperature, thresholds or interval of one task, fitted on validation images.

    Attributes:
        images: Number of labelled validation images.
        temperature: Divisor of the logits; ``None`` where scores are not calibrated (boxes).
        nll_raw: Negative log-likelihood per decision before scaling, in nats; ``None`` without a temperature.
        nll: The same after scaling.
        thresholds: By class and operating point, the least (calibrated) probability or box score that is positive.
        margin: Half the width of the interval around a predicted number, in its unit; ``None`` where there is none.
        coverage: Share of images whose truth the interval holds; ``None`` without an interval.
    """

    images: int
    temperature: float | None = None
    nll_raw: float | None = None
    nll: float | None = None
    thresholds: dict[str, dict[str, float]] = field(default_factory=dict)
    margin: float | None = None
    coverage: float | None = None


def plain(calibration: Mapping[str, TaskCalibration]) -> dict[str, Any]:
    """Return the calibration of every task as dicts of strings and numbers, for a checkpoint or JSON."""
    return {task: asdict(one) for task, one in calibration.items()}


def restored(stored: Mapping[str, Any]) -> dict[str, TaskCalibration]:
    """Return the calibration from the dicts that ``plain`` made.

    Raises:
        ConfigError: They have another form, or a temperature or threshold is no usable number.
    """
    try:
        calibration = {str(task): TaskCalibration(**one) for task, one in stored.items()}
        temperatures = [one.temperature for one in calibration.values() if one.temperature is not None]
        thresholds = [t for one in calibration.values() for by in one.thresholds.values() for t in by.values()]
        margins = [one.margin for one in calibration.values() if one.margin is not None]
        usable = (
            all(0 <= m < math.inf for m in margins)
            and all(0 < t < math.inf for t in temperatures)
            and all(math.isfinite(t) for t in thresholds)
        )
    except (TypeError, AttributeError, ValueError) as error:
        raise ConfigError(f"its calibration has the format of another version ({error})") from error
    if not usable:
        raise ConfigError(
            "its calibration has a temperature, margin or threshold that is not a finite, positive number"
        )
    return calibration


def combined_calibration(members: Sequence[Mapping[str, TaskCalibration]]) -> dict[str, TaskCalibration]:
    """Return the calibration that is reported of an ensemble.

    Each member divides by its own temperature. A threshold is the mean of the members' thresholds; a class and
    operating point for which a member has none gets none. The same holds for the margin of a number.

    Args:
        members: Calibration by task of each member; the temperatures of the first one are kept.
    """
    first, *others = members
    calibration = {}
    for task, own in first.items() if others else ():
        rest = [one[task].thresholds if task in one else {} for one in others]
        thresholds: dict[str, dict[str, float]] = {}
        for label, points in own.thresholds.items():
            for point, value in points.items():
                values = [value, *(one[label][point] for one in rest if point in one.get(label, {}))]
                if len(values) == len(members):
                    thresholds.setdefault(label, {})[point] = sum(values) / len(values)
        margins = [own.margin, *(one[task].margin if task in one else None for one in others)]
        known = [margin for margin in margins if margin is not None]
        margin = sum(known) / len(known) if len(known) == len(members) else None
        calibration[task] = replace(own, thresholds=thresholds, margin=margin)
    return calibration if others else dict(first)


def fit_temperature(curve: Floats, decisions: float, images: int, prior: float | None = PRIOR) -> tuple[float, float]:
    r"""Return the temperature of maximum likelihood, and the negative log-likelihood per decision at it.

    Minimises $n\,\overline{\mathrm{nll}}(T) + (\log T)^2 / 2\sigma^2$ with $n$ the number of images: pixels of one
    image are no independent witnesses. The curve between the temperatures is a cubic through values and slopes.

    Args:
        curve: (41, 2) sums of ``likelihood_curve`` over images, processes or sites.
        decisions: Number of decisions behind it.
        images: Number of images behind it.
        prior: $\sigma$, which keeps a handful of images that happen to be right from sharpening without bound;
            ``None`` fits the likelihood alone.

    Reference:
        Guo et al., On calibration of modern neural networks, ICML 2017, section 4.2.
    """
    mean = CubicHermiteSpline(LOG_TEMPERATURES, curve[:, 0] / decisions, curve[:, 1] / decisions)

    def cost(x: float) -> float:
        return images * float(mean(x)) + (0.0 if prior is None else x**2 / (2 * prior**2))

    low, high = LOG_TEMPERATURES[[0, -1]]
    best = float(minimize_scalar(cost, bounds=(low, high), method="bounded", options={"xatol": 1e-7}).x)
    best = 0.0 if cost(best) >= cost(0.0) else best
    return float(np.exp(best)), float(mean(best))


def conformal_margin(errors: Floats, coverage: float) -> float | None:
    r"""Return the half width of an interval that holds the truth of a new image with at least this probability.

    It is the $\lceil (n + 1)\,\text{coverage} \rceil$-th smallest absolute error (split conformal prediction), which
    holds for images like those it was fitted on, whatever the errors' distribution.

    Args:
        errors: (n,) prediction minus truth.
        coverage: In (0, 1).

    Returns:
        The half width; ``None`` with fewer images than ``coverage`` needs (9 for 0.9, 19 for 0.95).

    Reference:
        Lei et al., Distribution-free predictive inference for regression, JASA 2018, algorithm 2.
    """
    rank = math.ceil((len(errors) + 1) * coverage - 1e-9)
    return None if rank > len(errors) else float(np.sort(np.abs(errors))[rank - 1])


def tempered(probabilities: Floats, temperature: float, exclusive: bool) -> Floats:
    """Return the probabilities that logits divided by a temperature would have given, float64.

    Args:
        probabilities: (N, K), before scaling.
        temperature: What the logits are divided by.
        exclusive: Whether each row sums to 1 (softmax).
    """
    p = probabilities.astype(np.float64)
    with np.errstate(divide="ignore"):
        if exclusive:
            logits = np.log(p) / temperature
            odds = np.exp(logits - logits.max(axis=1, keepdims=True))
            shared: Floats = odds / odds.sum(axis=1, keepdims=True)
            return shared
        scaled: Floats = 1 / (1 + np.exp((np.log1p(-p) - np.log(p)) / temperature))
    return scaled


VALUED = ("sensitivity", "specificity", "fp_per_image")
PLAIN = ("youden", "f1")


@dataclass(frozen=True)
class OperatingPoint:
    """A rule for a threshold: ``sensitivity=0.9``, ``specificity=0.95``, ``youden``, ``f1`` or ``fp_per_image=1``.

    Attributes:
        name: ``sensitivity``, ``specificity``, ``fp_per_image``, ``youden`` or ``f1``.
        value: The required value; ``None`` for ``youden`` and ``f1``, which are maximised.
    """

    name: str
    value: float | None = None

    @classmethod
    def parse(cls, text: str) -> OperatingPoint:
        """Read an operating point from the configuration.

        Raises:
            ConfigError: The text is no operating point, or its value is out of range.
        """
        name, _, value = text.replace(" ", "").partition("=")
        try:
            number = float(value) if value else None
        except ValueError:
            number = math.nan
        needs_value = name in VALUED
        if name not in (*VALUED, *PLAIN) or (number is None) == needs_value:
            raise ConfigError(
                f"operating_points: {text!r} is no operating point; choose from sensitivity=0.9, specificity=0.95, "
                "youden, f1, fp_per_image=1"
            )
        if number is not None and not (0 < number <= (math.inf if name == "fp_per_image" else 1)):
            limit = "above 0" if name == "fp_per_image" else "in (0, 1]"
            raise ConfigError(f"operating_points: the value of {text!r} must be {limit}")
        return cls(name, number)

    def __str__(self) -> str:
        return self.name if self.value is None else f"{self.name}={self.value:g}"


def class_threshold(scores: Floats, truth: NDArray[np.bool_], point: OperatingPoint) -> float | None:
    """Return the lowest score that counts as positive, halfway between two scores that occur.

    Of the thresholds that reach a stated sensitivity the highest is taken, of those that reach a stated specificity the
    lowest; of equal maxima (``youden``, ``f1``) the highest.

    Args:
        scores: (n,) probabilities of one class.
        truth: (n,) whether the class is there.
        point: The operating point.

    Returns:
        The threshold; ``None`` where both labels do not occur, or the point is one of boxes.
    """
    if truth.all() or not truth.any() or point.name == "fp_per_image":
        return None
    order, ends = operating_points(scores)
    weights = np.ones((1, len(scores)))[:, order]
    tp = counts_above(weights * truth[order], ends)[0]
    fp = counts_above(weights * ~truth[order], ends)[0]
    sensitivity, specificity = tp / tp[-1], 1 - fp / fp[-1]
    positions: dict[str, Callable[[], int]] = {
        "sensitivity": lambda: int(np.flatnonzero(sensitivity >= (point.value or 0) - 1e-9)[0]),
        "specificity": lambda: int(np.flatnonzero(specificity >= (point.value or 0) - 1e-9)[-1]),
        "youden": lambda: int(np.argmax(np.round(sensitivity + specificity, 9))),
        "f1": lambda: int(np.argmax(np.round(2 * tp / (tp + fp + tp[-1]), 9))),
    }
    return _between(scores[order][ends], positions[point.name]())


def box_threshold(findings: Findings, images: int, point: OperatingPoint) -> float | None:
    """Return the lowest score from which a box is reported.

    Args:
        findings: Lesions and false alarms of one class.
        images: Labelled images, with and without lesions.
        point: ``f1`` (the best), ``fp_per_image`` (the lowest threshold with no more) or ``sensitivity`` (the highest
            that reaches it); others are none of boxes.

    Returns:
        The threshold; ``None`` where it does not apply, no lesion is there, or no threshold reaches it.
    """
    lesions, alarms = findings.lesion_score, findings.alarm_score
    ranked = np.unique(np.concatenate([lesions[np.isfinite(lesions)], alarms]))[::-1]
    if not len(lesions) or not len(ranked) or point.name not in ("f1", "fp_per_image", "sensitivity"):
        return None
    tp = np.array([0, *(np.count_nonzero(lesions >= score) for score in ranked)])
    fp = np.array([0, *(np.count_nonzero(alarms >= score) for score in ranked)])
    if point.name == "f1":
        return _between(ranked, int(np.argmax(np.round(2 * tp / (tp + fp + len(lesions)), 9))))
    if point.name == "sensitivity":
        reached = np.flatnonzero(tp >= (point.value or 0) * len(lesions) - 1e-9)
        return _between(ranked, int(reached[0])) if len(reached) else None
    return _between(ranked, int(np.flatnonzero(fp <= (point.value or 0) * images + 1e-9)[-1]))


def _between(ranked: Floats, taken: int) -> float:
    """Return the threshold that takes so many of the distinct scores, highest first: rounding cannot move one over."""
    above = float(ranked[taken - 1]) if taken else 1.0 + 1e-6  # so that a score of 1 may be left out too
    below = float(ranked[taken]) if taken < len(ranked) else 0.0
    return (above + below) / 2


def class_performance(scores: Floats, truth: NDArray[np.bool_], threshold: float) -> dict[str, float]:
    """Return sensitivity and specificity of ``scores >= threshold``, NaN without images of that label."""
    positive = scores >= threshold
    return {
        "sensitivity": float(positive[truth].mean()) if truth.any() else math.nan,
        "specificity": float((~positive)[~truth].mean()) if not truth.all() else math.nan,
    }


def box_performance(findings: Findings, images: int, threshold: float) -> dict[str, float]:
    """Return the sensitivity for lesions and the false positives per image of boxes with at least this score."""
    lesions = findings.lesion_score
    return {
        "sensitivity": float((lesions >= threshold).mean()) if len(lesions) else math.nan,
        "fp_per_image": float((findings.alarm_score >= threshold).sum()) / images if images else math.nan,
    }
