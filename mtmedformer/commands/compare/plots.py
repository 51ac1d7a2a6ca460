"""Plots of a comparison: differences with their intervals, and every run at every site as a dot."""

from __future__ import annotations

import math

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from mtmedformer.commands.compare.comparison import Difference, MetricComparison
from mtmedformer.commands.compare.results import SUMMARIES
from mtmedformer.plots.gains import gain_figure
from mtmedformer.plots.style import COLOURS, INK, STYLE, legend_columns

BETTER, WORSE, EVEN = "#2f7d53", "#c2536b", "#8b929c"


def forest(metric: MetricComparison, name: str, reference: str) -> Figure:
    """Draw the difference of every variant from the reference with its interval: of the mean and at the worst site.

    Args:
        metric: One metric of a comparison.
        name: Its name.
        reference: Name of the reference.
    """
    differences, sign = metric.differences, 1 if metric.higher_is_better else -1
    names = sorted(differences, key=lambda n: _finite(differences[n]["mean"].value) * sign)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 1.3 + 0.34 * len(names)), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        for ax, of in zip(axes, SUMMARIES, strict=True):
            for y, variant in enumerate(names):
                _interval(ax, y, differences[variant][of])
            ax.axvline(0, color=INK, linewidth=1)
            ax.set_title("Mean" if of == "mean" else "Worst site")
            ax.set_xlabel(f"{name}, difference from {reference}")
            ax.xaxis.set_major_locator(MaxNLocator(4))
            ax.grid(visible=False, axis="y")
            ax.margins(y=0.5 / max(1, len(names)))
        axes[0].set_yticks(range(len(names)), names)
        marks = [
            Line2D([], [], color=colour, marker="o", linestyle="-", label=label)
            for label, colour in (("better", BETTER), ("worse", WORSE), ("no difference shown", EVEN))
        ]
        figure.legend(handles=marks, loc="outside lower center", ncols=3)
    return figure


def dots(metric: MetricComparison, name: str) -> Figure:
    """Draw one dot per run and site, one row per variant, and the mean as a bar.

    Args:
        metric: One metric of a comparison.
        name: Its name.
    """
    values, sign = metric.values, 1 if metric.higher_is_better else -1
    names = sorted(values, key=lambda n: _finite(values[n].mean.value) * sign)
    sites = sorted({site for value in values.values() for site in value.by_site})
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(sites))]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 1.4 + 0.42 * len(names)), layout="constrained")
        ax = figure.add_subplot()
        for y, variant in enumerate(names):
            runs = values[variant].by_run_and_site.values()
            for s, (site, colour) in enumerate(zip(sites, colours, strict=True)):
                points = [run[site] for run in runs if site in run]
                height = y + 0.5 * ((s + 0.5) / len(sites) - 0.5)
                ax.plot(points, [height] * len(points), "o", markersize=3.6, alpha=0.8, color=colour)
            mean = values[variant].mean.value
            ax.plot([mean, mean], [y - 0.34, y + 0.34], color=INK, linewidth=1.6)
        ax.set_yticks(range(len(names)), names)
        ax.set_xlabel(f"{name}: one dot per run and site, the bar is the mean")
        ax.grid(visible=False, axis="y")
        marks = [
            Line2D([], [], color=colour, marker="o", linestyle="", label=site)
            for site, colour in zip(sites, colours, strict=True)
        ]
        if len(sites) > 1:
            columns = min(legend_columns(sites, 9.2, 9.5), len(sites))
            figure.set_figheight(1.4 + 0.42 * len(names) + 0.24 * (-(-len(sites) // columns) - 1))
            figure.legend(handles=marks, loc="outside lower center", ncols=columns)
    return figure


def site_gains(metric: MetricComparison, name: str, reference: str) -> Figure | None:
    """Draw the difference of every variant from the reference at every site; ``None`` for a single site.

    Args:
        metric: One metric of a comparison.
        name: Its name.
        reference: Name of the reference.
    """
    own = metric.values[reference].by_site if reference in metric.values else {}
    if len(own) < 2:
        return None
    gains = {
        variant: {site: value.by_site.get(site, math.nan) - own[site] for site in own}
        for variant, value in metric.values.items()
        if variant != reference
    }
    return gain_figure(gains, f"{name}, difference from {reference}", metric.higher_is_better)


def _interval(ax: Axes, y: int, difference: Difference) -> None:
    colour = {"better": BETTER, "worse": WORSE}.get(difference.verdict, EVEN)
    if math.isfinite(difference.low):
        ax.plot([difference.low, difference.high], [y, y], color=colour, linewidth=2, solid_capstyle="round")
    if math.isfinite(difference.value):
        ax.plot([difference.value], [y], "o", color=colour, markersize=5.5)


def _finite(value: float) -> float:
    return value if math.isfinite(value) else -math.inf
