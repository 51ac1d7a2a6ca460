"""Lines over the rounds of a federation, one a site."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mtmedformer.plots.style import COLOURS, FAINT, INK, STYLE

MOST_LINES = 10
"""Sites that get a colour of their own; of more, those with the lowest last value do."""

Line = dict[int, float]
"""Value by round."""

Panel = tuple[str, dict[str, Line], Line]
"""Title of a panel, a line a site, and the line of all together (possibly empty)."""


def curves(panels: Sequence[Panel], whole_name: str, low: float | None = None) -> Figure:
    """Draw lines by site, panel by panel, two in a row, with one legend for all."""
    sites = sorted({site for _, lines, _ in panels for site in lines})
    chosen = _chosen(sites, panels[0][1])
    rows = math.ceil(len(panels) / 2)
    with mpl.rc_context(STYLE):
        drawn = Figure(figsize=(9.2, 2.5 * rows + 0.45), layout="constrained")
        axes = list(drawn.subplots(rows, 2, squeeze=False).flat)
        for axis, (title, lines, whole) in zip(axes, panels, strict=False):
            for site in sites:
                _draw(axis, lines.get(site, {}), chosen.get(site, FAINT), site if site in chosen else None)
            _draw(axis, whole, INK, whole_name, width=2.4)
            axis.set_title(title)
            axis.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
            if low is not None:
                axis.set_ylim(bottom=low)
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        axes[len(panels) - 1].set_xlabel("round")
        named = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        drawn.legend(named.values(), named.keys(), loc="outside upper left", ncols=6, fontsize=9)
    return drawn


def _chosen(sites: Sequence[str], lines: dict[str, Line]) -> dict[str, str]:
    """Return a colour for each site that gets one."""
    if len(sites) > MOST_LINES:
        last = {site: lines[site][max(lines[site])] for site in sites if lines.get(site)}
        sites = sorted(sorted(last, key=lambda site: last[site])[:MOST_LINES])
    return dict(zip(sites, COLOURS, strict=False))


def _draw(axis: Axes, line: Line, colour: str, label: str | None, width: float = 1.5) -> None:
    if line:
        rounds = sorted(line)
        marker = "o" if len(rounds) < 16 else ""
        known = [line[r] for r in rounds]
        axis.plot(
            [r + 1 for r in rounds], known, color=colour, lw=width, label=label, marker=marker, ms=3.5,
            zorder=1 if label is None else 2,
        )  # fmt: skip


def by_site(
    history: list[dict[str, Any]], read: Callable[[dict[str, Any]], Mapping[str, float | None]]
) -> dict[str, Line]:
    """Return a line for each site of which anything is known."""
    lines: dict[str, Line] = {}
    for entry in history:
        for site, value in read(entry).items():
            if value is not None:
                lines.setdefault(site, {})[entry["round"]] = value
    return lines


def line_of(values: Iterable[tuple[int, float | None]]) -> Line:
    """Return a line of what is known."""
    return {r: value for r, value in values if value is not None}
