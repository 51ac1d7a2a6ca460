"""Bootstrap over patients: how often each image counts in each resample, and the interval of what comes out."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def patient_weights(patients: NDArray[np.int64], replicates: int, seed: int) -> NDArray[np.int32]:
    """Draw patients with replacement, as many as there are, and return how often each image is in each resample.

    All images of a patient come and go together.

    Args:
        patients: (n,) patient of each image as a number from 0.
        replicates: Number of resamples R.
        seed: Seed of the draw.

    Returns:
        (R, n) counts; (0, n) with fewer than two patients, where resampling says nothing.
    """
    number = int(patients.max()) + 1 if len(patients) else 0
    if number < 2:
        return np.zeros((0, len(patients)), dtype=np.int32)
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(number, np.full(number, 1 / number), size=replicates).astype(np.int32)
    return draws[:, patients]


def interval(samples: NDArray[np.float64], level: float) -> tuple[float, float]:
    """Return the central percentile interval of the resampled values, NaN where none is known.

    Args:
        samples: (R,) value in each resample; NaN where it has no ground truth, which is left out.
        level: Probability mass of the interval, for example 0.95.
    """
    known = samples[~np.isnan(samples)]
    if not len(known):
        return float("nan"), float("nan")
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
