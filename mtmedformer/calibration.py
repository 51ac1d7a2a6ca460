"""Probabilities that mean what they say, and thresholds that were asked for, kept with the weights they are fit to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from scipy.interpolate import CubicHermiteSpline
from scipy.optimize import minimize_scalar

from mtmedformer.metrics.calibration import CalibrationMetrics, Reliability, reliability
from mtmedformer.metrics.curves import Floats
from mtmedformer.metrics.temperature import LOG_TEMPERATURES

__all__ = [
    "CalibrationMetrics",
    "Reliability",
    "TaskCalibration",
    "fit_temperature",
    "plain",
    "reliability",
    "restored",
    "tempered",
]

PRIOR = 0.5
"""Standard deviation of log temperature before any image is seen: a temperature beyond 1/e or e takes many of them."""


@dataclass(frozen=True)
class TaskCalibration:
    """What validation said of one task, for the weights it is stored with.

    Attributes:
        images: Labelled validation images behind it.
        temperature: What logits are divided by; ``None`` where scores are left as they are (boxes).
        nll_raw: Negative log-likelihood a decision before scaling, in nats; ``None`` where there is no temperature.
        nll: The same after scaling.
        thresholds: By class and operating point the least (calibrated) probability or box score that counts as found.
    """

    images: int
    temperature: float | None = None
    nll_raw: float | None = None
    nll: float | None = None
    thresholds: dict[str, dict[str, float]] = field(default_factory=dict)


def plain(calibration: Mapping[str, TaskCalibration]) -> dict[str, Any]:
    """Return the calibration of every task as dicts of strings and numbers, for a checkpoint or JSON."""
    return {task: asdict(one) for task, one in calibration.items()}


def restored(stored: Mapping[str, Any]) -> dict[str, TaskCalibration]:
    """Return the calibration that ``plain`` made dicts of."""
    return {task: TaskCalibration(**one) for task, one in stored.items()}


def fit_temperature(curve: Floats, decisions: float, images: int, prior: float | None = PRIOR) -> tuple[float, float]:
    r"""Return the temperature that makes the truth likeliest, and the negative log-likelihood a decision at it.

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
