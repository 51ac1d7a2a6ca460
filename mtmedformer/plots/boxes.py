"""Boxes in pictures: where several lie on one another, their colours alternate along one outline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from mtmedformer.metrics.matching import box_iou

SAME, DASH = 0.75, 3.0
"""Overlap (IoU) from which two boxes are drawn as one outline; length of a dash as a multiple of the line's width."""

XYXY = Sequence[float]


@dataclass(frozen=True)
class DrawnBox:
    """A box and how it is drawn.

    Attributes:
        xyxy: Corners in the coordinates of the axis.
        colour: Colour of its class.
        text: Text beside it, possibly empty.
        place: Number of the earlier boxes that lie on it.
        together: Number of boxes that lie on one another, itself included.
    """

    xyxy: XYXY
    colour: str
    text: str = ""
    place: int = 0
    together: int = 1

    def outline(self, axis: Axes, linewidth: float, **options: Any) -> None:
        """Draw the outline: whole, or every n-th dash of it where n boxes lie on one another.

        Args:
            axis: Where it is drawn.
            linewidth: Width of the line in points.
            **options: Passed to ``Rectangle``.
        """
        x0, y0, x1, y1 = self.xyxy
        dashes = (self.place * DASH, (DASH, (self.together - 1) * DASH)) if self.together > 1 else "-"
        patch = Rectangle(
            (x0, y0),
            x1 - x0,
            y1 - y0,
            fill=False,
            edgecolor=self.colour,
            linewidth=linewidth,
            linestyle=dashes,
            **options,
        )
        patch.set_capstyle("butt")
        axis.add_patch(patch)


def placed(boxes: Sequence[DrawnBox]) -> list[DrawnBox]:
    """Return the boxes with their places among those of another colour that lie on them.

    Args:
        boxes: In the order in which they are drawn.
    """
    if not boxes:
        return []
    xyxy = np.array([box.xyxy for box in boxes], float)
    groups: list[list[int]] = []
    for i, box in enumerate(boxes):
        same = (
            group
            for group in groups
            if all(boxes[k].colour != box.colour for k in group) and box_iou(xyxy[[i]], xyxy[group]).min() >= SAME
        )
        home = next(same, None)
        if home is None:
            groups.append([i])
        else:
            home.append(i)
    where = {i: (place, len(group)) for group in groups for place, i in enumerate(group)}
    return [DrawnBox(box.xyxy, box.colour, box.text, *where[i]) for i, box in enumerate(boxes)]
