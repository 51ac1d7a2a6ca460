"""Boxes that lie on one another: every colour is seen, and a single box is drawn whole."""

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from mtmedformer.plots.boxes import DrawnBox, placed

RED, BLUE, GREEN = "#ff0000", "#0000ff", "#00ff00"


def seen(boxes: list[DrawnBox]) -> dict[str, int]:
    """Return the number of pixels of each colour after the boxes were drawn."""
    figure = Figure(figsize=(2, 2), dpi=100)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, 100), ylim=(100, 0))
    axis.set_axis_off()
    for box in placed(boxes):
        box.outline(axis, 2.0, antialiased=False)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    colours = {box.colour for box in boxes}
    return {c: int((pixels == np.rint(np.array(to_rgb(c)) * 255)).all(axis=2).sum()) for c in colours}


def test_two_and_three_classes_on_one_box_are_all_visible():
    box = (20.0, 20.0, 80.0, 70.0)
    alone = seen([DrawnBox(box, RED)])[RED]
    for colours in ((RED, BLUE), (RED, BLUE, GREEN)):
        found = seen([DrawnBox(box, colour) for colour in colours])
        for colour in colours:
            assert found[colour] > 0.6 * alone / len(colours), f"{colour} is hidden: {found}"
    near = seen([DrawnBox(box, RED), DrawnBox((20.0, 20.0, 81.0, 70.0), BLUE)])
    assert min(near.values()) > 0.3 * alone


def test_boxes_apart_and_boxes_of_one_class_are_drawn_whole():
    apart = placed([DrawnBox((0, 0, 10, 10), RED), DrawnBox((50, 50, 60, 60), BLUE), DrawnBox((0, 0, 10, 10), RED)])
    assert [box.together for box in apart] == [1, 1, 1]
    assert placed([]) == []
