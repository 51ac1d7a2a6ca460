"""Bars of who gained: the difference of a value at each site, with its sign."""

from __future__ import annotations

import math
from collections.abc import Mapping

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mtmedformer.plots.style import FAINT, INK, STYLE

GAINED, LOST = "#2f7d53", "#c2536b"

WIDTH, PANELS = 9.2, 3
"""Width of the figure in inches, and panels per row."""


def gain_figure(gains: Mapping[str, Mapping[str, float]], label: str, higher_is_better: bool = True) -> Figure | None:
    """Draw one bar per site and panel: green to a site that gained, red to one that lost.

    Args:
        gains: Differences by title of the panel and site; NaN where a site has no value.
        label: Text of the horizontal axis.
        higher_is_better: Whether a positive difference is a gain.

    Returns:
        The figure; ``None`` where there is no difference to draw.
    """
    known = {title: {s: v for s, v in values.items() if math.isfinite(v)} for title, values in gains.items()}
    known = {title: values for title, values in known.items() if values}
    if not known:
        return None
    sites = sorted({site for values in known.values() for site in values})
    columns = min(PANELS, len(known))
    rows = -(-len(known) // columns)
    limit = max(abs(value) for values in known.values() for value in values.values()) or 0.01
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, rows * (1.0 + 0.3 * len(sites))), layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False, sharey=True, sharex=True).flat)
        for axis, (title, values) in zip(axes, known.items(), strict=False):
            for y, site in enumerate(sites):
                value = values.get(site)
                if value is None:
                    continue
                axis.barh(y, value, height=0.62, color=GAINED if (value > 0) == higher_is_better else LOST)
                place = (3 if value >= 0 else -3, 0)
                side = "left" if value >= 0 else "right"
                axis.annotate(
                    signed(value), (value, y), place, textcoords="offset points", ha=side, va="center", fontsize=8.5
                )
            axis.axvline(0, color=INK, linewidth=1)
            axis.set_title(title)
            axis.set_xlim(-1.45 * limit, 1.45 * limit)
            axis.xaxis.set_major_locator(MaxNLocator(3))
            axis.grid(visible=False, axis="y")
        for axis in axes[len(known) :]:
            axis.set_axis_off()
        axes[0].set_yticks(range(len(sites)), sites)
        axes[0].set_ylim(len(sites) - 0.5, -0.5)
        figure.supxlabel(label, fontsize=9.5, color=FAINT)
    return figure


def signed(value: float) -> str:
    """Return a difference with its sign and three digits: ``+0.034``, ``−0.120``, ``0.000``."""
    text = f"{value:+.3f}"
    return text.replace("-", "−") if float(text) else "0.000"
