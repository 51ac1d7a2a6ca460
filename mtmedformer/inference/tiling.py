"""Prediction on images larger than those of the training: in overlapping windows, merged, and with mirrored images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torchvision.ops import box_iou

from mtmedformer.batch import Task
from mtmedformer.errors import ConfigError

Predict = Callable[[Tensor], dict[str, Any]]
"""Images (B, C, H, W) to predictions by task, in the formats of ``TaskHead.predict``."""

BoxPredictions = dict[str, Tensor]
"""Boxes of one image: ``boxes`` (N, 4) xyxy, ``scores`` (N,) sorted downwards, ``labels`` (N,)."""

BORDER = 2.0
"""A box that ends within so many pixels of a window's border is taken to be cut by it."""


@dataclass(frozen=True)
class Window:
    """A part of an image: rows ``y0`` to ``y1`` and columns ``x0`` to ``x1``, exclusive."""

    y0: int
    x0: int
    y1: int
    x1: int


@torch.no_grad()
def predict_tiled(
    predict: Predict,
    image: Tensor,
    tasks: dict[str, Task],
    tile: tuple[int, int],
    overlap: float = 0.25,
    sw_batch_size: int = 4,
    pool: Literal["max", "mean"] = "max",
    nms_iou: float = 0.5,
    flip_tta: bool = False,
) -> dict[str, Any]:
    """Predict an image in windows and merge the predictions.

    - Masks are averaged where windows overlap, with Gaussian weights that trust a window's middle most.
    - Boxes are moved to the image. Of a lesion in the overlap of two windows, a box cut by its window's border is
      dropped where another window holds all of it; then, across windows only, boxes that overlap a better box of their
      class are dropped. An object larger than the overlap may come out in pieces.
    - Numbers and probabilities of grades are averaged over windows.
    - Class probabilities are pooled over windows: ``max`` lets one window with a finding decide (then brought back to
      a sum of 1 for exclusive classes), ``mean`` measures how much of the image shows it.

    An image that fits into one window is predicted whole, exactly as without windows. Only ``sw_batch_size`` windows
    are in the model at a time, so that its memory does not depend on the image.

    Args:
        predict: The model: images (b, C, h, w) to predictions by task.
        image: float (B, C, H, W), or (C, H, W) for one image.
        tasks: The kind and classes of each prediction, by name.
        tile: ``(height, width)`` of a window in pixels; the image's own size where that is smaller.
        overlap: Least share of a window that its neighbour covers too, in [0, 1).
        sw_batch_size: Windows predicted at once.
        pool: How class probabilities of windows become the image's.
        nms_iou: Overlap from which boxes of one class in two windows, or in the image and its mirror, are one object.
        flip_tta: Average every window with the prediction of its mirror; a box in only one of them keeps half
            its score.

    Returns:
        Predictions by task as ``predict`` gives them, in pixels of ``image``; with a batch of 1 for a single image.

    Raises:
        ConfigError: When ``tile``, ``overlap`` or ``sw_batch_size`` cannot work.
    """
    if not 0 <= overlap < 1 or min(tile) < 1 or sw_batch_size < 1:
        raise ConfigError(
            f"tile={tile}, overlap={overlap}, sw_batch_size={sw_batch_size}: tiles need at least one pixel each way, "
            "an overlap of at least 0 and less than 1, and one window at a time or more"
        )
    image = image if image.ndim == 4 else image[None]
    if flip_tta:
        predict = _with_mirror(predict, tasks, nms_iou)
    windows = place_windows((image.shape[-2], image.shape[-1]), tile, overlap)
    if len(windows) == 1:
        return predict(image)
    stitched = {name: _STITCHERS[task.kind](image, windows, task, pool, nms_iou) for name, task in tasks.items()}
    for places, crops in _crops(image, windows, sw_batch_size):
        predictions = predict(crops)
        for name, stitch in stitched.items():
            for (b, w), prediction in zip(places, predictions[name], strict=True):
                stitch.add(b, w, prediction)
    return {name: stitch.result() for name, stitch in stitched.items()}


def place_windows(size: tuple[int, int], tile: tuple[int, int], overlap: float) -> list[Window]:
    """Cover an image evenly with the fewest windows that overlap by at least the given share.

    Args:
        size: ``(height, width)`` of the image.
        tile: ``(height, width)`` of a window, cut to the image.
        overlap: Least share of a window that its neighbour covers too, in [0, 1).
    """
    high, wide = min(tile[0], size[0]), min(tile[1], size[1])
    rows, columns = _starts(size[0], high, overlap), _starts(size[1], wide, overlap)
    return [Window(y, x, y + high, x + wide) for y in rows for x in columns]


def _starts(length: int, tile: int, overlap: float) -> list[int]:
    steps = math.ceil((length - tile) / max(1, math.floor(tile * (1 - overlap))))
    return [round(i * (length - tile) / steps) for i in range(steps + 1)] if steps else [0]


def _crops(image: Tensor, windows: list[Window], sw_batch_size: int) -> Iterator[tuple[list[tuple[int, int]], Tensor]]:
    """Yield the (image, window) numbers and the pixels of each batch of windows."""
    places = [(b, w) for b in range(len(image)) for w in range(len(windows))]
    for start in range(0, len(places), sw_batch_size):
        part = places[start : start + sw_batch_size]
        crops = [image[b, :, windows[w].y0 : windows[w].y1, windows[w].x0 : windows[w].x1] for b, w in part]
        yield part, torch.stack(crops)


class _MaskAverage:
    """Averages the masks (K, h, w) of windows with Gaussian weights."""

    def __init__(self, image: Tensor, windows: list[Window], task: Task, pool: str, nms_iou: float) -> None:
        self.windows = windows
        self.total = image.new_zeros(len(image), len(task.classes), *image.shape[-2:], dtype=torch.float32)
        self.gaussian = gaussian(windows[0].y1 - windows[0].y0, windows[0].x1 - windows[0].x0).to(image.device)
        self.weight = image.new_zeros(image.shape[-2:], dtype=torch.float32)
        for w in windows:
            self.weight[w.y0 : w.y1, w.x0 : w.x1] += self.gaussian

    def add(self, b: int, w: int, prediction: Tensor) -> None:
        window = self.windows[w]
        self.total[b, :, window.y0 : window.y1, window.x0 : window.x1] += prediction.float() * self.gaussian

    def result(self) -> Tensor:
        return self.total / self.weight


class _ClassPool:
    """Pools the class probabilities (K,) of windows."""

    def __init__(self, image: Tensor, windows: list[Window], task: Task, pool: str, nms_iou: float) -> None:
        self.pool = pool
        self.exclusive = not task.multi_label and len(task.classes) > 1
        self.seen: list[list[Tensor]] = [[] for _ in image]

    def add(self, b: int, w: int, prediction: Tensor) -> None:
        self.seen[b].append(prediction.float())

    def result(self) -> Tensor:
        seen = torch.stack([torch.stack(windows) for windows in self.seen])
        pooled = seen.mean(dim=1) if self.pool == "mean" else seen.amax(dim=1)
        return pooled / pooled.sum(dim=1, keepdim=True) if self.exclusive else pooled


class _WindowMean(_ClassPool):
    """Averages the numbers (1,), or the probabilities of grades (K,), of windows."""

    def result(self) -> Tensor:
        return torch.stack([torch.stack(windows) for windows in self.seen]).mean(dim=1)


class _BoxMerger:
    """Move the boxes of windows to the image and merge those of one object in several windows."""

    def __init__(self, image: Tensor, windows: list[Window], task: Task, pool: str, nms_iou: float) -> None:
        self.windows, self.nms_iou = windows, nms_iou
        self.size = (image.shape[-2], image.shape[-1])
        self.seen: list[list[tuple[int, BoxPredictions]]] = [[] for _ in image]

    def add(self, b: int, w: int, prediction: BoxPredictions) -> None:
        window = self.windows[w]
        offset = prediction["boxes"].new_tensor([window.x0, window.y0, window.x0, window.y0])
        self.seen[b].append((w, {**prediction, "boxes": prediction["boxes"] + offset}))

    def result(self) -> list[BoxPredictions]:
        return [merge_boxes(seen, self.windows, self.size, self.nms_iou) for seen in self.seen]


_STITCHERS: dict[str, type[_MaskAverage] | type[_ClassPool] | type[_BoxMerger]] = {
    "segmentation": _MaskAverage,
    "classification": _ClassPool,
    "detection": _BoxMerger,
    "regression": _WindowMean,
}


def gaussian(height: int, width: int, sigma: float = 0.125) -> Tensor:
    """Return weights (height, width) that fall from 1 in the middle to no less than 0.001 at the border.

    Args:
        height: Rows.
        width: Columns.
        sigma: Standard deviation as a share of the side, as in MONAI's sliding window.
    """
    rows, columns = (torch.exp(-0.5 * ((torch.arange(n) - (n - 1) / 2) / (sigma * n)) ** 2) for n in (height, width))
    return (rows[:, None] * columns).clamp(min=1e-3)


def merge_boxes(
    seen: list[tuple[int, BoxPredictions]], windows: list[Window], size: tuple[int, int], nms_iou: float
) -> BoxPredictions:
    """Merge the boxes of several windows into one list; see ``predict_tiled``.

    Args:
        seen: Number of a window and its boxes, in pixels of the image.
        windows: All windows of the image.
        size: ``(height, width)`` of the image.
        nms_iou: Overlap from which boxes of one class in two windows are one object.
    """
    device = seen[0][1]["boxes"].device  # many small steps, each waiting for the last: faster on the CPU
    predicted: BoxPredictions = {
        name: torch.cat([one[name] for _, one in seen]).cpu() for name in ("boxes", "scores", "labels")
    }
    origin = torch.cat([torch.full((len(one["labels"]),), w) for w, one in seen])
    holds = _margins(predicted["boxes"], windows, size) >= BORDER
    whole = holds.gather(1, origin[:, None]).squeeze(1) | ~holds.any(dim=1)
    order = predicted["scores"].argsort(descending=True, stable=True)
    order = order[whole[order]]
    predicted, origin = {name: value[order] for name, value in predicted.items()}, origin[order]
    duplicates = (origin[:, None] != origin) & (predicted["labels"][:, None] == predicted["labels"])
    duplicates &= box_iou(predicted["boxes"], predicted["boxes"]) > nms_iou
    kept = torch.ones(len(order), dtype=torch.bool)
    for i in duplicates.any(dim=1).nonzero().flatten().tolist():
        if kept[i]:
            kept[i + 1 :] &= ~duplicates[i, i + 1 :]
    return {name: value[kept].to(device) for name, value in predicted.items()}


def _margins(boxes: Tensor, windows: list[Window], size: tuple[int, int]) -> Tensor:
    """Return (N, windows): the distance of each box to the borders of each window, borders of the image excluded."""
    far = float("inf")
    edges = boxes.new_tensor(
        [
            [
                w.x0 if w.x0 > 0 else -far,
                w.y0 if w.y0 > 0 else -far,
                w.x1 if w.x1 < size[1] else far,
                w.y1 if w.y1 < size[0] else far,
            ]
            for w in windows
        ]
    )
    inside = torch.cat([boxes[:, None, :2] - edges[None, :, :2], edges[None, :, 2:] - boxes[:, None, 2:]], dim=2)
    return inside.amin(dim=2)


def _with_mirror(predict: Predict, tasks: dict[str, Task], nms_iou: float) -> Predict:
    def both(image: Tensor) -> dict[str, Any]:
        here, there = predict(image), predict(image.flip(-1))
        return {name: _average(task, here[name], there[name], image.shape[-1], nms_iou) for name, task in tasks.items()}

    return both


def _average(task: Task, here: Any, there: Any, width: int, nms_iou: float) -> Any:
    if task.kind == "detection":
        return [average_boxes(a, mirror_boxes(b, width), nms_iou) for a, b in zip(here, there, strict=True)]
    if task.kind == "segmentation":
        there = there.flip(-1)
    return (here + there) / 2


def mirror_boxes(predicted: BoxPredictions, width: int) -> BoxPredictions:
    """Mirror boxes left to right in an image of the given width in pixels."""
    x0, y0, x1, y1 = predicted["boxes"].unbind(dim=1)
    return {**predicted, "boxes": torch.stack([width - x1, y0, width - x0, y1], dim=1)}


def average_boxes(a: BoxPredictions, b: BoxPredictions, iou: float) -> BoxPredictions:
    """Average two sets of boxes of one image.

    Boxes of one class pair up one to one, the best overlaps first, if they overlap by more than ``iou``; a pair becomes
    the mean box with the mean score, and a box without a partner keeps half its score.
    """
    overlap = box_iou(a["boxes"], b["boxes"]) * (a["labels"][:, None] == b["labels"][None, :])
    pairs: list[tuple[int, int]] = []
    candidates = (overlap > iou).nonzero()
    for n in overlap[candidates[:, 0], candidates[:, 1]].argsort(descending=True, stable=True).tolist():
        i, j = candidates[n].tolist()
        if all(i != p and j != q for p, q in pairs):
            pairs.append((i, j))
    left = torch.tensor([i for i, _ in pairs], dtype=torch.int64, device=overlap.device)
    right = torch.tensor([j for _, j in pairs], dtype=torch.int64, device=overlap.device)
    parts = [
        {name: (a[name][left] + b[name][right]) / 2 for name in ("boxes", "scores")} | {"labels": a["labels"][left]}
    ]
    for one, paired in ((a, left), (b, right)):
        alone = torch.ones(len(one["labels"]), dtype=torch.bool, device=overlap.device).index_fill(0, paired, False)
        parts.append({name: value[alone] for name, value in one.items()})
        parts[-1]["scores"] = parts[-1]["scores"] / 2
    predicted = {name: torch.cat([part[name] for part in parts]) for name in ("boxes", "scores", "labels")}
    order = predicted["scores"].argsort(descending=True, stable=True)
    return {name: value[order] for name, value in predicted.items()}
