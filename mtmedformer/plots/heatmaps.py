"""Draws maps of the network's input (attention, Grad-CAM, uncertainty) over the whole original image, as it lies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from mtmedformer.batch import Meta
from mtmedformer.geometry import Floats
from mtmedformer.inference.results import NOTE
from mtmedformer.plots.predictions import preview_from_input

COLOURS = "inferno"
COLUMNS = 4
SIDE, MARGIN, TITLE, FOOT, BAR = 2.8, 0.12, 0.28, 0.3, 0.6
"""Inches: width of an image, border, line above, line below, room for a scale of colours."""


@dataclass(frozen=True)
class HeatMap:
    """A map to draw.

    Attributes:
        values: float (h, w) of the network's input.
        top: Value of the brightest colour; the darkest is 0.
        unit: What the values are, beside the scale; empty for shares of the strongest place.
    """

    values: Floats
    top: float = 1.0
    unit: str = ""


def maps_figure(image: Floats, maps: Mapping[str, HeatMap], meta: Meta, footer: str = "") -> Figure:
    """Draw an image, and beside it the image under each map, in the original frame; nothing is mirrored or cropped.

    A map's colour grows more opaque with its value, so that what it says nothing of stays visible.

    Args:
        image: float (h, w) in [0, 1]: the network's input.
        maps: Maps by the words above them.
        meta: Where the input lies in the original image.
        footer: Small print besides the note that every output carries.

    Returns:
        A figure of its own, for ``savefig``: no window, nothing to close.
    """
    preview = preview_from_input(image, meta)
    panels: list[tuple[str, HeatMap | None]] = [(_about(meta), None), *maps.items()]
    columns = min(COLUMNS, len(panels))
    cell = (SIDE + (BAR if any(one.unit for one in maps.values()) else 0) + MARGIN, _height(preview) + TITLE + MARGIN)
    whole = (columns * cell[0] + MARGIN, -(-len(panels) // columns) * cell[1] + FOOT)
    figure = Figure(figsize=whole, facecolor="white")
    for number, (title, one) in enumerate(panels):
        left, top = MARGIN + number % columns * cell[0], number // columns * cell[1]
        place = _Place(left / whole[0], 1 - (top + cell[1] - MARGIN) / whole[1], whole, _height(preview))
        _draw(figure, place, preview, title, one, meta)
    words = " · ".join(filter(None, (NOTE.capitalize(), footer)))
    figure.text(MARGIN / whole[0], 0.5 * FOOT / whole[1], words, fontsize=7.5, color="#777777", va="center")
    return figure


@dataclass(frozen=True)
class _Place:
    """Where a panel lies: lower left corner as shares of the figure, the figure's size and the panel's height."""

    left: float
    bottom: float
    whole: tuple[float, float]
    high: float

    def box(self, offset: float, width: float) -> tuple[float, float, float, float]:
        across, up = self.whole
        return self.left + offset / across, self.bottom, width / across, self.high / up


def _draw(figure: Figure, place: _Place, preview: Floats, title: str, one: HeatMap | None, meta: Meta) -> None:
    axis = figure.add_axes(place.box(0, SIDE))
    axis.imshow(preview, cmap="gray", vmin=0, vmax=1)
    axis.set_title(title, fontsize=9, loc="left", pad=4, color="#333333")
    axis.set_axis_off()
    if one is None:
        return
    shown, top = preview_from_input(np.ascontiguousarray(one.values, np.float32), meta), max(one.top, 1e-12)
    axis.imshow(shown, cmap=COLOURS, vmin=0, vmax=top, alpha=0.75 * np.sqrt(np.clip(shown / top, 0, 1)))
    if one.unit:
        bar = figure.add_axes(place.box(SIDE + 0.06, 0.12))
        figure.colorbar(ScalarMappable(Normalize(0, top), COLOURS), cax=bar)
        bar.set_title(one.unit, fontsize=7, pad=4)
        bar.tick_params(labelsize=7)


def _height(preview: Floats) -> float:
    return float(SIDE * preview.shape[0] / preview.shape[1])


def _about(meta: Meta) -> str:
    facts = (meta.laterality, meta.view, f"{meta.original_size[1]} × {meta.original_size[0]} px")
    return " · ".join(str(fact) for fact in facts if fact)
