"""The metric of the RSNA pneumonia detection challenge (Kaggle, 2018), which is not COCO's mean average precision."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

THRESHOLDS = np.linspace(0.4, 0.75, 8)
"""IoU thresholds 0.40, 0.45 … 0.75."""


def rsna_score(hit: NDArray[np.bool_], true: int) -> float:
    """Return one image's mean of TP / (TP + FP + FN) over the IoU thresholds.

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
