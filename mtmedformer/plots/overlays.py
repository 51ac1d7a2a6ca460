"""Overlays of a batch: image, truth and prediction side by side, in pixels of the network input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from mtmedformer.batch import (
    IGNORE,
    Batch,
    ClassificationTarget,
    DetectionTarget,
    RegressionTarget,
    SegmentationTarget,
    Target,
    Task,
)
from mtmedformer.metrics.regression import median_grade
from mtmedformer.plots.boxes import DrawnBox, placed
from mtmedformer.plots.style import class_colours, legend_columns, picture_of


def overlay_figure(
    images: Sequence[Batch],
    predictions: Sequence[dict[str, Any]],
    tasks: dict[str, Task],
    score: float = 0.4,
    colours: Mapping[tuple[str, str], str] | None = None,
) -> Figure:
    """Draw one row per image: the image, its truth and the predictions.

    Args:
        images: Batches of one image each, on any device.
        predictions: Predictions by task for each image, in the formats of ``TaskHead.predict``.
        tasks: The tasks to draw.
        score: Boxes below this score are not drawn.
        colours: Colours by task and class; the default is those of ``class_colours``.

    Returns:
        A matplotlib figure; close it after use.
    """
    drawn = class_colours(tasks.values())
    colours = drawn if colours is None else {key: colours[key] for key in drawn}
    figure, axes = plt.subplots(
        len(images), 3, figsize=(9.6, 3.3 * len(images) + 0.5), squeeze=False, layout="constrained"
    )
    for axis, title in zip(axes[0], ("image", "truth", "prediction"), strict=True):
        axis.set_title(title, fontsize=11)
    for line, batch, predicted in zip(axes, images, predictions, strict=True):
        picture = picture_of(batch.image[0])
        for axis in line:
            axis.imshow(picture, cmap="gray", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
        meta = batch.meta[0] if batch.meta else None
        place = " · ".join(str(x) for x in (meta.site, meta.view, meta.laterality) if x) if meta else ""
        line[0].set_xlabel(place, fontsize=8)
        line[1].set_xlabel(_draw_truth(line[1], batch.targets, tasks, colours), fontsize=8)
        line[2].set_xlabel(_draw_prediction(line[2], predicted, tasks, colours, score), fontsize=8)
    handles = [Patch(color=colour, label=f"{task}: {c}" if task != c else c) for (task, c), colour in colours.items()]
    if handles:
        columns = min(legend_columns((str(handle.get_label()) for handle in handles), 9.6, 8), len(handles))
        figure.set_figheight(3.3 * len(images) + 0.3 + 0.2 * -(-len(handles) // columns))
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    return figure


def _draw_truth(
    axis: Axes, targets: dict[str, Target], tasks: dict[str, Task], colours: Mapping[tuple[str, str], str]
) -> str:
    lines, boxes = [], list[DrawnBox]()
    for name, task in tasks.items():
        target = targets[name]
        if not bool(target.present[0]):
            lines.append(f"{name}: not labelled")
        elif isinstance(target, ClassificationTarget):
            chosen = [c for c, v in zip(task.classes, target.labels[0].tolist(), strict=True) if v == 1]
            lines.append(f"{name}: {', '.join(chosen) or 'none'}")
        elif isinstance(target, RegressionTarget):
            lines.append(f"{name}: {_value_text(task, float(target.values[0]))}")
        elif isinstance(target, DetectionTarget):
            for box, label in zip(target.boxes[0].tolist(), target.labels[0].tolist(), strict=True):
                boxes.append(_drawn(box, colours[name, task.classes[label]]))
            if not len(target.boxes[0]):
                lines.append(f"{name}: none")
        elif isinstance(target, SegmentationTarget):
            for c, mask in zip(task.classes, target.masks[0], strict=True):
                _mask(axis, (mask == 1).cpu(), colours[name, c])
                if bool((mask == IGNORE).all()):
                    lines.append(f"{c}: not labelled")
    _draw_boxes(axis, boxes)
    return "\n".join(lines)


def _draw_prediction(
    axis: Axes,
    predictions: dict[str, Any],
    tasks: dict[str, Task],
    colours: Mapping[tuple[str, str], str],
    score: float,
) -> str:
    lines, drawn = [], list[DrawnBox]()
    for name, task in tasks.items():
        predicted = predictions[name]
        if task.kind == "classification":
            p = predicted[0].float().tolist()
            best = max(range(len(p)), key=p.__getitem__)
            shown = range(len(p)) if task.multi_label else [best]
            lines.append(f"{name}: " + ", ".join(f"{task.classes[k]} {p[k]:.2f}" for k in shown))
        elif task.kind == "regression":
            value = float(median_grade(predicted.cpu())[0]) if task.classes else float(predicted[0, 0])
            lines.append(f"{name}: {_value_text(task, value)}")
        elif task.kind == "detection":
            boxes = predicted[0]
            for box, s, label in zip(
                boxes["boxes"].tolist(), boxes["scores"].tolist(), boxes["labels"].tolist(), strict=True
            ):
                if s >= score:
                    drawn.append(_drawn(box, colours[name, task.classes[label]], f"{s:.2f}"))
        else:
            for c, p in zip(task.classes, predicted[0], strict=True):
                _mask(axis, (p >= 0.5).cpu(), colours[name, c])
    _draw_boxes(axis, drawn)
    return "\n".join(lines)


def _value_text(task: Task, value: float) -> str:
    return task.classes[int(value)] if task.classes else f"{value:.4g} {task.unit}".rstrip()


def _drawn(box: Sequence[float], colour: str, text: str = "") -> DrawnBox:
    return DrawnBox([v - 0.5 for v in box], colour, text)  # imshow puts pixel centres, not corners, on integers


def _draw_boxes(axis: Axes, boxes: Sequence[DrawnBox]) -> None:
    """Draw boxes; the texts of those that lie on one another are beside each other."""
    for box in placed(boxes):
        box.outline(axis, 1.5)
        if box.text:
            axis.annotate(
                box.text,
                (box.xyxy[0], box.xyxy[1]),
                xytext=(19 * box.place, 0),
                textcoords="offset points",
                color="black",
                fontsize=6,
                backgroundcolor=box.colour,
                va="bottom",
                annotation_clip=False,
            ).set_clip_on(True)


def _mask(axis: Axes, mask: Tensor, colour: str) -> None:
    if not bool(mask.any()):
        return
    rgba: npt.NDArray[np.float32] = np.zeros((*mask.shape, 4), dtype=np.float32)
    rgba[..., :3] = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    rgba[..., 3] = 0.28 * mask.numpy()
    axis.imshow(rgba)
    axis.contour(mask.to(torch.float32).numpy(), levels=[0.5], colors=[colour], linewidths=1)
