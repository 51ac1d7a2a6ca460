"""Legends are whole: with nine sites of long names every entry lies inside the figure, and gains have their sign."""

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from callbacks.reports.round_curves import Panel, round_figure
from mtmedformer.batch import Batch, DetectionTarget, Meta, Task
from mtmedformer.plots.gains import GAINED, LOST, gain_figure, signed
from mtmedformer.plots.overlays import overlay_figure

SITES = [f"university_hospital_of_the_north_{n}" for n in range(9)]


def outside(figure: Figure) -> list[str]:
    """Return the texts of the legends that are not wholly inside the figure."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    width, height = canvas.get_width_height()
    boxes = [(text.get_text(), text.get_window_extent()) for legend in figure.legends for text in legend.get_texts()]
    assert boxes
    return [name for name, b in boxes if b.x0 < 0 or b.y0 < 0 or b.x1 > width or b.y1 > height]


@pytest.mark.parametrize("names", [SITES, [f"s{n}" for n in range(9)]])
def test_curves_of_nine_sites_have_a_whole_legend_and_room(names):
    lines = {site: {0: 0.1 * n, 1: 0.1 * n} for n, site in enumerate(names)}
    figure = round_figure([Panel("score", lines, {0: 0.5, 1: 0.6})] * 3, "all sites together")
    assert outside(figure) == []
    assert len(figure.legends[0].get_texts()) == 10
    assert min(axis.get_position().height for axis in figure.axes[:3]) > 0.2


def test_overlays_of_many_classes_have_a_whole_legend():
    task = Task("lesions", "detection", tuple(f"a_rather_long_name_of_a_finding_{n}" for n in range(12)))
    target = DetectionTarget([torch.zeros(0, 4)], [torch.zeros(0, dtype=torch.int64)], torch.tensor([True]))
    batch = Batch(torch.zeros(1, 1, 32, 32), {"lesions": target}, [Meta("x", "p")])
    nothing = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}
    assert outside(overlay_figure([batch], [{"lesions": [nothing]}], {"lesions": task})) == []


def test_gains_are_drawn_with_their_sign_and_side():
    figure = gain_figure({"dice": {"north": 0.05, "south": -0.02, "east": float("nan")}}, "merged minus own")
    bars = {round(bar.get_width(), 3): bar.get_facecolor() for bar in figure.axes[0].patches}
    assert set(bars) == {0.05, -0.02}
    texts = {text.get_text() for text in figure.axes[0].texts}
    assert texts == {"+0.050", "−0.020"}
    assert not np.allclose(bars[0.05], bars[-0.02])
    loss = gain_figure({"nll": {"north": 0.05}}, "nll", higher_is_better=False)
    assert np.allclose(loss.axes[0].patches[0].get_facecolor(), bars[-0.02]), "a higher loss is no gain"
    assert gain_figure({"dice": {"north": float("nan")}}, "x") is None
    assert (signed(0.0), signed(-0.00001), GAINED != LOST) == ("0.000", "0.000", True)
