"""Pictures of a comparison: differences with their intervals, and every run at every site as a dot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

GOOD, BAD, EVEN = "#2f7d53", "#c2536b", "#8b929c"


def forest(told: Mapping[str, Any], metric: str, reference: str, style: Mapping[Any, Any], ink: str) -> Figure:
    """Draw the difference of every variant from the reference, with its interval: on average and at the worst site.

    Args:
        told: One metric of a comparison.
        metric: Its name.
        reference: Name of the reference.
        style: Settings of matplotlib.
        ink: Colour of text.
    """
    higher = told["higher_is_better"]
    differences = told["differences"]
    names = sorted(differences, key=lambda n: _finite(differences[n]["mean"]["value"]) * (1 if higher else -1))
    with mpl.rc_context(dict(style)):
        figure = Figure(figsize=(9.2, 1.3 + 0.34 * len(names)), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        for ax, of in zip(axes, ("mean", "worst"), strict=True):
            for y, name in enumerate(names):
                _interval(ax, y, differences[name][of])
            ax.axvline(0, color=ink, linewidth=1)
            ax.set_title("On average" if of == "mean" else "At the worst site")
            ax.set_xlabel(f"{metric}, difference from {reference}")
            ax.xaxis.set_major_locator(MaxNLocator(4))
            ax.grid(visible=False, axis="y")
            ax.margins(y=0.5 / max(1, len(names)))
        axes[0].set_yticks(range(len(names)), names)
        marks = [
            Line2D([], [], color=colour, marker="o", linestyle="-", label=label)
            for label, colour in (("better", GOOD), ("worse", BAD), ("no difference shown", EVEN))
        ]
        figure.legend(handles=marks, loc="outside lower center", ncols=3)
    return figure


def dots(told: Mapping[str, Any], metric: str, colours: Sequence[str], style: Mapping[Any, Any], ink: str) -> Figure:
    """Draw a dot for every run at every site, a row a variant, and the mean as a bar.

    Args:
        told: One metric of a comparison.
        metric: Its name.
        colours: One a site, repeated where there are more sites.
        style: Settings of matplotlib.
        ink: Colour of text and of the mean.
    """
    values, higher = told["values"], told["higher_is_better"]
    names = sorted(values, key=lambda n: _finite(values[n]["mean"]["value"]) * (1 if higher else -1))
    sites = sorted({site for value in values.values() for site in value["by_site"]})
    with mpl.rc_context(dict(style)):
        figure = Figure(figsize=(9.2, 1.4 + 0.42 * len(names)), layout="constrained")
        ax = figure.add_subplot()
        for y, name in enumerate(names):
            for s, site in enumerate(sites):
                found = [run[site] for run in values[name]["by_run_and_site"].values() if site in run]
                place = y + 0.5 * ((s + 0.5) / len(sites) - 0.5)
                ax.plot(found, [place] * len(found), "o", markersize=3.6, alpha=0.8, color=colours[s % len(colours)])
            mean = values[name]["mean"]["value"]
            ax.plot([mean, mean], [y - 0.34, y + 0.34], color=ink, linewidth=1.6)
        ax.set_yticks(range(len(names)), names)
        ax.set_xlabel(f"{metric}: a dot a run and site, the bar their mean")
        ax.grid(visible=False, axis="y")
        marks = [
            Line2D([], [], color=colours[s % len(colours)], marker="o", linestyle="", label=site)
            for s, site in enumerate(sites)
        ]
        if len(sites) > 1:
            figure.legend(handles=marks, loc="outside lower center", ncols=min(6, len(sites)))
    return figure


def _interval(ax: Any, y: int, told: Mapping[str, Any]) -> None:
    colour = {"better": GOOD, "worse": BAD}.get(told["verdict"], EVEN)
    if np.isfinite(told["low"]):
        ax.plot([told["low"], told["high"]], [y, y], color=colour, linewidth=2, solid_capstyle="round")
    if np.isfinite(told["value"]):
        ax.plot([told["value"]], [y], "o", color=colour, markersize=5.5)


def _finite(value: float) -> float:
    return value if np.isfinite(value) else -np.inf
