"""The data contract: samples, batches and the targets of each kind of task.

Missing is not empty. A sample whose truth for a task is ``None`` (``present=False`` in the batch) is *unknown* for that
task and reaches neither its loss nor its metrics; an empty box list or an all-zero mask is a known negative.

Coordinates are continuous and measured from the top-left **corner** of the top-left pixel: pixel column ``j`` covers
``[j, j + 1)``, so boxes are ``(x0, y0, x1, y1)`` with exclusive ``x1, y1`` and an image
of width ``W`` spans ``[0, W]``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

IGNORE = 255
"""Value of a mask pixel that is not annotated; it contributes to no loss and no metric."""

Kind = Literal["classification", "detection", "segmentation", "regression"]


@dataclass(frozen=True)
class Task:
    """The name, the kind and the classes of a task.

    Attributes:
        name: Key of the task in batches, heads, losses and logs, for example ``lungs``.
        kind: ``classification``, ``detection``, ``segmentation`` or ``regression``.
        classes: Class names in channel order. Background and "normal by absence" are never classes of a detection or
            segmentation task. Of a regression: the names of ordinal grades, the lowest first; empty for a number.
        multi_label: Whether several classes may hold at once (sigmoid) or exactly one does (softmax). Detection is
            always single-label; a segmentation task with one class is always multi-label (one sigmoid channel).
        weak: Whether the truth is approximate everywhere (boxes from circles, masks from boxes).
        unit: Unit of the number of a regression, for example ``years``; empty for none.
        range: Lowest and highest value of the number of a regression; ``None`` where it is not known.
    """

    name: str
    kind: Kind
    classes: tuple[str, ...]
    multi_label: bool = False
    weak: bool = False
    unit: str = ""
    range: tuple[float, float] | None = None

    @property
    def ordinal(self) -> bool:
        """Whether the truth is one of several grades in order."""
        return self.kind == "regression" and bool(self.classes)

    @property
    def probabilistic(self) -> bool:
        """Whether predictions are probabilities of classes, of pixels or of grades, which a temperature calibrates."""
        return self.kind in ("classification", "segmentation") or self.ordinal

    @property
    def exclusive(self) -> bool:
        """Whether exactly one of several classes holds, so that their probabilities sum to 1."""
        return not self.multi_label and len(self.classes) > 1


@dataclass(frozen=True)
class Meta:
    """What is known of one image besides its pixels and truth.

    Attributes:
        id: Name of the image, unique within its data set.
        patient: One-way hash of the patient (see ``datamodules.records.hash_patient``), never the identifier itself.
        site: Site (hospital, source) of the image, or ``"unknown"``.
        view: Radiographic view (``PA``, ``AP``, ``CC``, ``MLO`` …), or ``None``.
        laterality: ``L``, ``R`` or ``None``.
        to_original: Affine as six floats ``(a, b, c, d, e, f)``: a point ``(x, y)`` of the network's input lies at
            ``(a x + b y + c, d x + e y + f)`` in the original image.
        original_size: ``(height, width)`` of the original image in pixels.
        spacing: ``(row, column)`` pixel spacing of the original image in mm, or ``None``.
        case: One-way hash of the case (exam, breast) that the image belongs to; ``None`` where it is not known.
        groups: Further groups of the image by column (sex, age band, scanner …), for results by group.
    """

    id: str
    patient: str
    site: str = "unknown"
    view: str | None = None
    laterality: str | None = None
    to_original: tuple[float, float, float, float, float, float] = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    original_size: tuple[int, int] = (0, 0)
    spacing: tuple[float, float] | None = None
    case: str | None = None
    groups: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Boxes:
    """Boxes of one image: ``xyxy`` float32 (N, 4) in pixels, ``labels`` int64 (N,) in ``0..K-1``. N = 0: none there."""

    xyxy: Tensor
    labels: Tensor


@dataclass
class Sample:
    """One image with its truth, before batching.

    Attributes:
        image: float32 (C, H, W) in [0, 1].
        truth: Per task ``None`` (unknown) or: classification float32 (K,) of 0/1 with NaN where a class is unknown;
            detection ``Boxes``; segmentation uint8 (K, H, W) of 0/1/``IGNORE``; regression float32 () in the unit of
            the task, or the index of the grade.
        meta: What else is known of the image.
    """

    image: Tensor
    truth: dict[str, Tensor | Boxes | None]
    meta: Meta


class _Movable:
    """Base of dataclasses whose tensors can be moved; Lightning calls ``to`` and DataLoader calls ``pin_memory``."""

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Return a copy with every tensor moved as by ``Tensor.to``."""
        return self._map(lambda t: t.to(*args, **kwargs))

    def pin_memory(self) -> Self:
        """Return a copy with every tensor in pinned memory."""
        return self._map(lambda t: t.pin_memory())

    def _map(self, move: Any) -> Self:
        def walk(value: Any) -> Any:
            return [move(one) for one in value] if isinstance(value, list) else move(value)

        return replace(self, **{f.name: walk(getattr(self, f.name)) for f in fields(self)})  # type: ignore[type-var, arg-type]


@dataclass
class ClassificationTarget(_Movable):
    """``labels`` float32 (B, K): 1, 0 or NaN (unknown); one-hot for single-label tasks. ``present`` bool (B,)."""

    labels: Tensor
    present: Tensor

    def __getitem__(self, rows: Tensor) -> ClassificationTarget:
        return ClassificationTarget(self.labels[rows], self.present[rows])


@dataclass
class DetectionTarget(_Movable):
    """Per image ``boxes`` float32 (N, 4) xyxy pixels and ``labels`` int64 (N,); ``present`` bool (B,)."""

    boxes: list[Tensor]
    labels: list[Tensor]
    present: Tensor

    def __getitem__(self, rows: Tensor) -> DetectionTarget:
        keep = (rows.nonzero().flatten() if rows.dtype == torch.bool else rows).tolist()
        return DetectionTarget([self.boxes[i] for i in keep], [self.labels[i] for i in keep], self.present[rows])


@dataclass
class SegmentationTarget(_Movable):
    """``masks`` uint8 (B, K, H, W): 1, 0 or ``IGNORE``; one-hot for single-label tasks. ``present`` bool (B,)."""

    masks: Tensor
    present: Tensor

    def __getitem__(self, rows: Tensor) -> SegmentationTarget:
        return SegmentationTarget(self.masks[rows], self.present[rows])


@dataclass
class RegressionTarget(_Movable):
    """``values`` float32 (B,): numbers in the unit of the task, or indices of grades; NaN unknown. ``present`` (B,)."""

    values: Tensor
    present: Tensor

    def __getitem__(self, rows: Tensor) -> RegressionTarget:
        return RegressionTarget(self.values[rows], self.present[rows])

    def one_hot(self, grades: int) -> ClassificationTarget:
        """Return indices of grades as labels of exclusive classes, float32 (B, grades) of 0, 1 and NaN (unknown)."""
        labels = (self.values[:, None] == torch.arange(grades, device=self.values.device)).float()
        return ClassificationTarget(labels.masked_fill(~self.present[:, None], torch.nan), self.present)


Target = ClassificationTarget | DetectionTarget | SegmentationTarget | RegressionTarget


class Batch(_Movable):
    """What a training step receives.

    Not a dataclass: Lightning converts every tensor of a dataclass to the precision of the weights, which would round
    boxes to several pixels. The network converts the image alone.

    Attributes:
        image: float32 (B, C, H, W) in [0, 1].
        targets: Per task its target; every task of the data set has an entry, present or not.
        meta: One ``Meta`` per image.
    """

    def __init__(self, image: Tensor, targets: dict[str, Target] | None = None, meta: list[Meta] | None = None) -> None:
        self.image, self.targets, self.meta = image, targets or {}, meta or []

    def _map(self, move: Any) -> Batch:
        return Batch(move(self.image), {name: one._map(move) for name, one in self.targets.items()}, self.meta)

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the images as one tensor, from which Lightning takes the size of the batch."""
        yield self.image

    def __len__(self) -> int:
        return len(self.image)

    def only(self, i: int) -> Batch:
        """Return a batch of image ``i`` alone."""
        row = torch.tensor([i], device=self.image.device)
        return Batch(
            self.image[row], {name: target[row] for name, target in self.targets.items()}, self.meta[i : i + 1]
        )


def collate(samples: Sequence[Sample], tasks: dict[str, Task]) -> Batch:
    """Stack samples of one size into a batch.

    Args:
        samples: At least one sample, images all of one shape.
        tasks: The tasks the batch has an entry for, by name; a sample lacking a task counts as unknown.
    """
    return Batch(
        image=torch.stack([s.image for s in samples]),
        targets={
            name: _target(task, [s.truth.get(name) for s in samples], samples[0].image) for name, task in tasks.items()
        },
        meta=[s.meta for s in samples],
    )


def add_entries(batch: Batch, tasks: dict[str, Task]) -> None:
    """Add to a batch, in place, an entry for every task without one; no image is labelled in it."""
    nothing: list[Tensor | Boxes | None] = [None] * len(batch)
    for name, task in tasks.items():
        if name not in batch.targets:
            batch.targets[name] = _target(task, nothing, batch.image[0]).to(batch.image.device)


def _target(task: Task, truths: list[Tensor | Boxes | None], image: Tensor) -> Target:
    k, present = len(task.classes), torch.tensor([t is not None for t in truths])
    if task.kind == "detection":
        boxes = [t if isinstance(t, Boxes) else no_boxes() for t in truths]
        return DetectionTarget([b.xyxy for b in boxes], [b.labels for b in boxes], present)
    known = [t for t in truths if isinstance(t, Tensor)]
    if task.kind == "regression":
        values = torch.stack([t if isinstance(t, Tensor) else torch.tensor(float("nan")) for t in truths])
        return RegressionTarget(values, present & ~values.isnan())
    if task.kind == "classification":
        unknown = torch.full((k,), float("nan"))
        labels = torch.stack([t if isinstance(t, Tensor) else unknown for t in truths])
        return ClassificationTarget(labels, present & ~labels.isnan().all(dim=1))
    size = known[0].shape[-2:] if known else image.shape[-2:]
    unlabelled = torch.full((k, *size), IGNORE, dtype=torch.uint8)
    masks = torch.stack([t if isinstance(t, Tensor) else unlabelled for t in truths])
    return SegmentationTarget(masks, present & (masks != IGNORE).flatten(1).any(dim=1))


def no_boxes() -> Boxes:
    """Return the boxes of an image that has none."""
    return Boxes(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
