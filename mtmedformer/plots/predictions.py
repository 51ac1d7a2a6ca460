"""Predictions drawn on the whole original image, in its own orientation: neither mirrored nor cropped."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke

from mtmedformer.batch import Meta, Task
from mtmedformer.geometry import Bytes, Floats, Frame, compose, invert, warp
from mtmedformer.inference.results import NOTE, ImageResult
from mtmedformer.plots.boxes import DrawnBox, placed
from mtmedformer.plots.style import class_colours, legend_columns

LONGEST = 1400
"""Maximum side in pixels of the image in a picture; larger originals are reduced."""

LINE, MARGIN, TITLE = 0.21, 0.12, 0.28
"""Inches: height of a line of text, margin, height of the title."""

WARNING = "#b4281e"
"""Colour of the warning about an unfamiliar image."""

Classes = Mapping[tuple[str, str], str]


def preview_of(pixels: Floats) -> Floats:
    """Reduce an original image (H, W) or (H, W, 3) to at most `LONGEST` pixels per side by area averaging."""
    height, width = _preview_size((pixels.shape[0], pixels.shape[1]))
    reduced: Floats = pixels
    if (height, width) != pixels.shape[:2]:
        reduced = np.asarray(cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA), np.float32)
    return reduced


def preview_from_input(image: Floats, meta: Meta) -> Floats:
    """Map the network input (h, w) or (h, w, 3) back to the original image, in the size that ``preview_of`` gives."""
    size = _preview_size(meta.original_size)
    shrunk = (meta.original_size[1] / size[1], 0.0, 0.0, 0.0, meta.original_size[0] / size[0], 0.0)
    preview: Floats = warp(image, Frame(compose(invert(meta.to_original), shrunk), size))
    return preview.clip(0, 1)


def prediction_figure(
    preview: Floats,
    result: ImageResult,
    tasks: Mapping[str, Task],
    score_thresholds: Mapping[tuple[str, str], float],
    footer: str = "",
) -> Figure:
    """Draw an image beside the same image with its predictions; probabilities and a legend below.

    Args:
        preview: float (h, w) or (h, w, 3) in [0, 1]: the whole original image, reduced or not.
        result: Predictions in original pixels.
        tasks: The tasks to draw.
        score_thresholds: Minimum score of a drawn box, by task and class.
        footer: Small print after the note that every output carries.

    Returns:
        A figure without a window; it does not have to be closed.
    """
    colours = class_colours(tasks.values())
    height, width = preview.shape[:2]
    side = 4.4 if height < 1.25 * width else 3.5
    warning = textwrap.wrap(_warning(result), int(26 * side))
    lines = warning + [
        part for line in _summary_lines(result, tasks, score_thresholds) for part in textwrap.wrap(line, int(26 * side))
    ]
    high = side * height / width
    names = [c if task == c else f"{task}: {c}" for task, c in colours]
    columns = min(3, legend_columns(names, 2 * side, 8.5))
    rows = len(lines) + -(-len(colours) // columns)
    whole = (2 * side + 3 * MARGIN, high + TITLE + LINE * (rows + 1) + 3 * MARGIN)
    figure = Figure(figsize=whole, facecolor="white")
    scale = width / max(1, result.meta.original_size[1])
    for number, title in enumerate((image_caption(result.meta, spacing=True), "prediction")):
        left = MARGIN + number * (side + MARGIN)
        axis = figure.add_axes((left / whole[0], 1 - (TITLE + high) / whole[1], side / whole[0], high / whole[1]))
        axis.imshow(preview, cmap="gray", vmin=0, vmax=1, extent=(0, width, height, 0))
        axis.set_title(title, fontsize=9, loc="left", pad=4, color="#333333")
        axis.set_axis_off()
        if number:
            _draw(axis, result, colours, score_thresholds, scale)
    top = whole[1] - TITLE - high - MARGIN
    for number, line in enumerate(lines):
        _write(figure, whole, top - LINE * number, line, 9, WARNING if number < len(warning) else "#111111")
    top -= 0.04
    handles = [Patch(color=colour, label=name) for name, colour in zip(names, colours.values(), strict=True)]
    if handles:
        figure.legend(
            handles=handles,
            loc="upper left",
            bbox_to_anchor=(MARGIN / whole[0], (top - LINE * len(lines)) / whole[1]),
            ncols=columns,
            fontsize=8.5,
            frameon=False,
            handlelength=1.1,
            borderaxespad=0,
            borderpad=0,
        )
    _write(figure, whole, MARGIN + LINE * 0.7, " · ".join(filter(None, (NOTE.capitalize(), footer))), 7.5, "#777777")
    return figure


def _write(figure: Figure, whole: tuple[float, float], y: float, text: str, size: float, colour: str) -> None:
    figure.text(MARGIN / whole[0], y / whole[1], text, fontsize=size, color=colour, va="top")


def _preview_size(original: tuple[int, int]) -> tuple[int, int]:
    scale = min(1.0, LONGEST / max(1, *original))
    return max(1, round(original[0] * scale)), max(1, round(original[1] * scale))


def image_caption(meta: Meta, spacing: bool = False) -> str:
    """Return laterality, view and size of an image as a caption; pixel spacing on request, where it is known."""
    height, width = meta.original_size
    parts = [meta.laterality, meta.view, f"{width} × {height} px"]
    parts += [f"{meta.spacing[1]:.3g} mm per pixel"] if spacing and meta.spacing else []
    return " · ".join(str(part) for part in parts if part)


def _summary_lines(
    result: ImageResult, tasks: Mapping[str, Task], score_thresholds: Mapping[tuple[str, str], float]
) -> list[str]:
    """Return one line per task: probabilities, numbers of boxes, areas."""
    lines = []
    for name, task in tasks.items():
        if task.kind == "classification":
            ranked = sorted(result.classes[name].items(), key=lambda item: -item[1])
            shown = ", ".join(f"{c} {p:.2f}" for c, p in ranked[:5])
            lines.append(f"{name}: {shown}" + (f" and {len(ranked) - 5} more" if len(ranked) > 5 else ""))
        elif task.kind == "regression":
            lines.append(f"{name}: {result.values[name]}")
        elif task.kind == "detection":
            counts = {
                c: sum(b.name == c and b.score >= score_thresholds[name, c] for b in result.boxes[name])
                for c in task.classes
            }
            lines.append(f"{name}: " + (", ".join(f"{n} {c}" for c, n in counts.items() if n) or "none"))
        else:
            areas = [f"{c} {_area(mask, result.meta)}" for c, mask in result.masks[name].items()]
            lines.append((f"{name}: " if areas != [name] else "") + ", ".join(areas))
    return lines


def _warning(result: ImageResult) -> str:
    if result.familiarity is None or not result.familiarity.unfamiliar:
        return ""
    return f"WARNING: unlike the training images: {'; '.join(result.familiarity.reasons)}"


def _area(mask: Bytes, meta: Meta) -> str:
    pixels = int(mask.sum())
    if not pixels:
        return "none"
    if meta.spacing is None:
        return f"{100 * pixels / mask.size:.2g} % of the image"
    return f"{pixels * meta.spacing[0] * meta.spacing[1] / 100:.3g} cm²"


def _draw(
    axis: Axes, result: ImageResult, colours: Classes, score_thresholds: Mapping[tuple[str, str], float], scale: float
) -> None:
    width, height = axis.get_xlim()[1], axis.get_ylim()[0]
    size = (round(height), round(width))
    for name, masks in result.masks.items():
        for c, mask in masks.items():
            _draw_mask(axis, mask, size, colours[name, c])
    drawn = [
        DrawnBox([v * scale for v in box.xyxy], colours[name, box.name], f"{box.score:.2f}")
        for name, boxes in result.boxes.items()
        for box in reversed(boxes)  # best score on top
        if box.score >= score_thresholds[name, box.name]
    ]
    for box in placed(drawn):
        _draw_box(axis, box)
    axis.set_xlim(0, width)
    axis.set_ylim(height, 0)


def _draw_mask(axis: Axes, mask: Bytes, size: tuple[int, int], colour: str) -> None:
    if not mask.any():
        return
    cover = cv2.resize(mask * np.uint8(255), size[::-1], interpolation=cv2.INTER_AREA)
    inside = cover >= 128
    rgba = np.zeros((*size, 4), np.uint8)
    rgba[inside, :3] = [int(colour[k : k + 2], 16) for k in (1, 3, 5)]
    rgba[inside, 3] = 64
    axis.imshow(rgba, extent=(0, size[1], size[0], 0), interpolation="nearest")
    outlines, _ = cv2.findContours(inside.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    for outline in outlines:
        ring = np.concatenate([outline[:, 0], outline[:1, 0]]) + 0.5
        axis.plot(ring[:, 0], ring[:, 1], color=colour, linewidth=1.1, solid_joinstyle="round")


def _draw_box(axis: Axes, box: DrawnBox) -> None:
    if not box.place:
        axis.add_patch(
            Rectangle(
                (box.xyxy[0], box.xyxy[1]), box.xyxy[2] - box.xyxy[0], box.xyxy[3] - box.xyxy[1],
                fill=False, edgecolor="black", linewidth=2.6, alpha=0.6,
            )
        )  # fmt: skip
    box.outline(axis, 1.4)
    top = box.xyxy[1] > 0.05 * axis.get_ylim()[0]  # no space above: write inside
    axis.annotate(
        box.text,
        (box.xyxy[0], box.xyxy[1]),
        xytext=(22 * box.place, 2 if top else -2),
        textcoords="offset points",
        va="bottom" if top else "top",
        fontsize=7.5,
        color="white" if box.together == 1 else box.colour,
        path_effects=[withStroke(linewidth=2, foreground="black")],
    )
