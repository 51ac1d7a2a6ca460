"""Colours and matplotlib settings shared by every picture and report."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from torch import Tensor

from mtmedformer.batch import Task

COLOURS = ("#3d8fd6", "#e08a2c", "#3fa372", "#d9567a", "#9372d0", "#b39b2e", "#2ba3a8", "#a8745a", "#7f8c9b", "#c97fb7")
"""Colours of classes, sites and variants: readable as lines on white and on dark pages and as outlines on grey images.
"""

HEAT = "inferno"
"""matplotlib colour map of heat maps."""

INK, FAINT = "#20242a", "#8b929c"
"""Text and grid of a plot. On an HTML page ``INK`` is replaced by the text colour of the light or dark theme."""

STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "font.family": "sans-serif",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": mpl.cycler(color=COLOURS),  # type: ignore[attr-defined]
    "axes.edgecolor": FAINT,
    "grid.color": FAINT,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.7,
    "text.color": INK,
    "text.parse_math": False,  # names with dollar signs are not formulas
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "mtmedformer",
}
"""matplotlib settings for plots of a report: ``with mpl.rc_context(STYLE): figure = Figure(...)``."""


def class_colours(tasks: Iterable[Task]) -> dict[tuple[str, str], str]:
    """Return one colour per ``(task, class)`` that is drawn as a mask or a box, the same in overlays and in reports."""
    drawn = [(task.name, c) for task in tasks if task.kind in ("detection", "segmentation") for c in task.classes]
    return {key: COLOURS[i % len(COLOURS)] for i, key in enumerate(drawn)}


def picture_of(image: Tensor) -> npt.NDArray[np.float32]:
    """Return an image (C, H, W) as matplotlib draws it: (H, W, 3) of 3 channels in [0, 1], else their mean (H, W)."""
    shown = image.float().clamp(0, 1).cpu()
    picture: npt.NDArray[np.float32] = (shown.permute(1, 2, 0) if len(shown) == 3 else shown.mean(dim=0)).numpy()
    return picture


def legend_columns(labels: Iterable[str], width: float, size: float = 9.0) -> int:
    """Return the number of columns of a legend that is as wide as a figure at most.

    Args:
        labels: Texts of the legend.
        width: Width of the figure in inches.
        size: Size of the text in points.
    """
    longest = max((len(label) for label in labels), default=1)
    each = (longest * 0.62 + 4.5) * size / 72  # a character is about 0.62 times its size wide; handle and gaps
    return max(1, int((width - 0.3) // each))
