"""Heat maps (attention, Grad-CAM, uncertainty) drawn over the whole original image."""

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
from mtmedformer.plots.predictions import image_caption, preview_from_input
from mtmedformer.plots.style import HEAT

COLUMNS = 4
SIDE, MARGIN, TITLE, FOOT, BAR = 2.8, 0.12, 0.28, 0.3, 0.6
"""Inches: width of an image, margin, height of the title, height of the footer, width of the colour bar."""


@dataclass(frozen=True)
class HeatMap:
    """One map to draw.

    Attributes:
        values: float (h, w) in pixels of the network input.
        top: Value of the brightest colour; the darkest is 0.
        unit: Unit above the colour bar; empty for values relative to the maximum, which have no colour bar.
    """

    values: Floats
    top: float = 1.0
    unit: str = ""


def maps_figure(image: Floats, maps: Mapping[str, HeatMap], meta: Meta, footer: str = "") -> Figure:
    """Draw an image, and beside it the image under each map, in original orientation, neither mirrored nor cropped.

    The opacity of a map grows with its value, so that the image stays visible where the map is low.

    Args:
        image: float (h, w) or (h, w, 3) in [0, 1]: the network input.
        maps: Maps by title.
        meta: Metadata of the image, with the transform from input to original pixels.
        footer: Small print after the note that every output carries.

    Returns:
        A figure without a window; it does not have to be closed.
    """
    preview = preview_from_input(image, meta)
    panels: list[tuple[str, HeatMap | None]] = [(image_caption(meta), None), *maps.items()]
    columns = min(COLUMNS, len(panels))
    cell = (SIDE + (BAR if any(one.unit for one in maps.values()) else 0) + MARGIN, _height(preview) + TITLE + MARGIN)
    whole = (columns * cell[0] + MARGIN, -(-len(panels) // columns) * cell[1] + FOOT)
    figure = Figure(figsize=whole, facecolor="white")
    for number, (title, one) in enumerate(panels):
        left, top = MARGIN + number % columns * cell[0], number // columns * cell[1]
        place = _Place(left / whole[0], 1 - (top + cell[1] - MARGIN) / whole[1], whole, _height(preview))
        _draw(figure, place, preview, title, one, meta)
    text = " · ".join(filter(None, (NOTE.capitalize(), footer)))
    figure.text(MARGIN / whole[0], 0.5 * FOOT / whole[1], text, fontsize=7.5, color="#777777", va="center")
    return figure


@dataclass(frozen=True)
class _Place:
    """Position of a panel: lower left corner in figure fractions, figure size and panel height in inches."""

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
    axis.imshow(shown, cmap=HEAT, vmin=0, vmax=top, alpha=0.75 * np.sqrt(np.clip(shown / top, 0, 1)))
    if one.unit:
        bar = figure.add_axes(place.box(SIDE + 0.06, 0.12))
        figure.colorbar(ScalarMappable(Normalize(0, top), HEAT), cax=bar)
        bar.set_title(one.unit, fontsize=7, pad=4)
        bar.tick_params(labelsize=7)


def _height(preview: Floats) -> float:
    return float(SIDE * preview.shape[0] / preview.shape[1])
