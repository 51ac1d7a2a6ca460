"""Curves over the rounds of a federation, one line per site."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from federation.server.history import RoundRecord
from mtmedformer.plots.style import COLOURS, FAINT, INK, STYLE, legend_columns

MAX_COLOURED = 10
"""Sites with a colour of their own; of more sites, those with the lowest last value have one."""

WIDTH = 9.2
"""Width of the figure in inches."""

Line = Mapping[int, float]
"""Value by round."""


@dataclass(frozen=True)
class Panel:
    """One plot.

    Attributes:
        title: Its title.
        sites: Line by site.
        overall: Line of all sites together, possibly empty.
    """

    title: str
    sites: Mapping[str, Line]
    overall: Line = field(default_factory=dict)


def round_figure(panels: Sequence[Panel], overall_name: str, low: float | None = None) -> Figure:
    """Draw panels, two per row, with one legend.

    Args:
        panels: The panels; lines of the first one decide which sites get a colour.
        overall_name: Name of the line of all sites together.
        low: Lower limit of the values.
    """
    sites = sorted({site for panel in panels for site in panel.sites})
    colours = _site_colours(sites, panels[0].sites)
    rows = math.ceil(len(panels) / 2)
    with mpl.rc_context(STYLE):
        drawn = Figure(figsize=(WIDTH, 2.5 * rows + 0.45), layout="constrained")
        axes = list(drawn.subplots(rows, 2, squeeze=False).flat)
        for axis, panel in zip(axes, panels, strict=False):
            for site in sites:
                _draw(axis, panel.sites.get(site, {}), colours.get(site, FAINT), site if site in colours else None)
            _draw(axis, panel.overall, INK, overall_name, width=2.4)
            axis.set_title(panel.title)
            axis.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
            if low is not None:
                axis.set_ylim(bottom=low)
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        axes[len(panels) - 1].set_xlabel("round")
        named = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        columns = legend_columns(named, WIDTH)
        drawn.set_figheight(2.5 * rows + 0.45 + 0.22 * (-(-len(named) // columns) - 1))
        drawn.legend(named.values(), named.keys(), loc="outside upper left", ncols=columns, fontsize=9)
    return drawn


def _site_colours(sites: Sequence[str], lines: Mapping[str, Line]) -> dict[str, str]:
    """Return a colour for each site that gets one."""
    if len(sites) > MAX_COLOURED:
        last = {site: lines[site][max(lines[site])] for site in sites if lines.get(site)}
        sites = sorted(sorted(last, key=lambda site: last[site])[:MAX_COLOURED])
    return dict(zip(sites, COLOURS, strict=False))


def _draw(axis: Axes, line: Line, colour: str, label: str | None, width: float = 1.5) -> None:
    if line:
        rounds = sorted(line)
        axis.plot(
            [number + 1 for number in rounds],
            [line[number] for number in rounds],
            color=colour,
            lw=width,
            label=label,
            marker="o" if len(rounds) < 16 else "",
            ms=3.5,
            zorder=1 if label is None else 2,
        )


def lines_by_site(
    history: Sequence[RoundRecord], read: Callable[[RoundRecord], Mapping[str, float | None]]
) -> dict[str, dict[int, float]]:
    """Return a line for each site with a value in at least one round.

    Args:
        history: The rounds.
        read: Returns the value of each site in a round.
    """
    lines: dict[str, dict[int, float]] = {}
    for entry in history:
        for site, value in read(entry).items():
            if value is not None and not math.isnan(value):
                lines.setdefault(site, {})[entry.round] = value
    return lines
