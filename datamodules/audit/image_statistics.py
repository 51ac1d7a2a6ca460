"""Statistics of every usable image of a data set: size, grey values, boxes and masks, a thumbnail; no pixels kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from datamodules.audit.near_duplicates import thumbnail
from datamodules.cache.entries import CacheEntry
from datamodules.loading.dataset import CachedDataset, pixels_of
from datamodules.records import Record, Split
from mtmedformer.geometry import Floats, Ints, invert, map_boxes

BINS = 64
"""Bins of a grey-value histogram over [0, 1]."""


@dataclass(frozen=True)
class Structure:
    """One box, or one class's mask in one image.

    Attributes:
        task: Name of its task.
        label: Name of its class.
        size: Square root of its area in pixels of the original image.
        framed: Square root of its area in pixels of the network's input.
        spacing: Mean pixel spacing of the original image in mm, or ``None``.
    """

    task: str
    label: str
    size: float
    framed: float
    spacing: float | None


@dataclass(frozen=True)
class ImageStatistics:
    """What is measured of one image.

    Attributes:
        record: Its record with the usable labels.
        split: Its split.
        view: View from the record or the file's header.
        laterality: Side from the record or the file's header.
        size: ``(height, width)`` of the original image.
        content: ``(height, width)`` in original pixels of the part inside the frame (the breast, the whole film).
        spacing: ``(row, column)`` spacing in mm, or ``None``.
        histogram: Share of the framed pixels in each of ``BINS`` grey bins over [0, 1]; without padding.
        structures: Boxes and masks.
        thumbnail: uint8 (64, 64), for the search for near-duplicates.
    """

    record: Record
    split: Split
    view: str | None
    laterality: str | None
    size: tuple[int, int]
    content: tuple[float, float]
    spacing: tuple[float, float] | None
    histogram: NDArray[np.float64]
    structures: tuple[Structure, ...]
    thumbnail: NDArray[np.uint8]


def image_statistics(datasets: Mapping[str, CachedDataset], progress: bool = True) -> list[ImageStatistics]:
    """Measure every image of train, val and test.

    Args:
        datasets: The images by split, as ``MedicalDataModule.datasets`` has them once it is set up; each image is read
            from its cache entry. Other splits are left out.
        progress: Show a progress bar.

    Returns:
        One entry per image that is labelled for some task, split by split.

    Raises:
        DataError: A cache entry is gone and its image can no longer be decoded.
    """
    splits: tuple[Split, ...] = ("train", "val", "test")
    jobs = [(split, datasets[split], i) for split in splits if split in datasets for i in range(len(datasets[split]))]
    return [_measure(*job) for job in tqdm(jobs, "Measuring images", leave=False, unit="image", disable=not progress)]


def _measure(split: Split, dataset: CachedDataset, index: int) -> ImageStatistics:
    record = dataset.records[index]
    entry = dataset.cache.fetch(dataset.keys[index], record, dataset.preprocessing)
    pixels = pixels_of(entry)
    a, b, _, d, e, _ = entry.to_original
    scale = math.sqrt(abs(a * e - b * d))
    left, top, right, bottom = content_of(entry, pixels.shape)
    inside = pixels[top:bottom, left:right]
    counts = np.histogram(inside, BINS, (0, 1))[0]
    return ImageStatistics(
        record=record,
        split=split,
        view=record.view or entry.view,
        laterality=record.laterality or entry.laterality,
        size=entry.original_size,
        content=(inside.shape[0] * scale, inside.shape[1] * scale),
        spacing=entry.spacing,
        histogram=counts / counts.sum(),
        structures=tuple(_structures(dataset, record, entry, scale)),
        thumbnail=thumbnail(inside),
    )


def content_of(entry: CacheEntry, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Return the part of the frame that shows the original image: left, top, right, bottom; at least one pixel."""
    height, width = entry.original_size
    box = map_boxes(invert(entry.to_original), np.array([[0.0, 0.0, width, height]]))[0]
    left, top = (int(min(max(0, round(v)), n - 1)) for v, n in zip(box[:2], (shape[1], shape[0]), strict=True))
    right, bottom = (int(min(round(v), n)) for v, n in zip(box[2:], (shape[1], shape[0]), strict=True))
    return left, top, max(right, left + 1), max(bottom, top + 1)


def _structures(dataset: CachedDataset, record: Record, entry: CacheEntry, scale: float) -> list[Structure]:
    structures = []
    spacing = float(np.mean(entry.spacing)) if entry.spacing else None
    for name, task in dataset.tasks.items():
        if name not in record.truth:
            continue
        sizes: list[tuple[int, float]] = []
        if name in entry.boxes:
            boxes: Floats = entry.boxes[name]
            labels: Ints = entry.labels[name]
            areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
            sizes = list(zip(labels.tolist(), np.sqrt(areas).tolist(), strict=True))
        elif name in entry.masks:
            sizes = [(k, math.sqrt(n)) for k, n in enumerate((entry.masks[name] == 1).sum(axis=(1, 2)).tolist()) if n]
        structures += [Structure(name, task.classes[k], framed * scale, framed, spacing) for k, framed in sizes]
    return structures
