"""Settings that a data set asks for, each with its reason: input size, finest detection stride, order of sampling."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from mtmedformer.batch import Task

if TYPE_CHECKING:
    from datamodules.audit.survey import Facts

WANTED = 12.0
"""Side in input pixels that the smallest structures (5 % quantile) should have: three cells at stride 4."""

SHORTEST, LONGEST, STEP = 256, 1024, 32
"""Bounds of the input's longer side, unless the images are smaller, and what both sides are multiples of."""


@dataclass(frozen=True)
class Suggestion:
    """Settings, and why.

    Attributes:
        image_size: ``(height, width)`` of the network's input.
        strides: Strides of the levels a detection head should read.
        sampler: Order of training.
        reasons: A sentence each.
        content: Median ``(height, width)`` in original pixels of what the preset frames.
        pixels_per_pixel: Original pixels a side of one input pixel spans at this size, for the median image.
    """

    image_size: tuple[int, int]
    strides: tuple[int, ...]
    sampler: Literal["shuffle", "positive", "sqrt"]
    reasons: tuple[str, ...]
    content: tuple[int, int]
    pixels_per_pixel: float


def suggest(facts: Sequence[Facts], tasks: Mapping[str, Task], batch_size: int) -> Suggestion:
    """Derive settings from the images of all splits (sizes) and of training (labels).

    Args:
        facts: What was seen of each image.
        tasks: The tasks by name.
        batch_size: Images a batch, to judge whether one without a lesion is likely.
    """
    height, width = (float(v) for v in np.median([f.content for f in facts], axis=0))
    boxes = [s.size for f in facts for s in f.structures if tasks[s.task].kind == "detection"]
    sizes = boxes or [s.size for f in facts for s in f.structures]
    what = "boxes" if boxes else "masks"
    reasons = []
    longer = float(SHORTEST)
    small = float(np.percentile(sizes, 5)) if sizes else math.inf
    if sizes:
        longer = max(height, width) * WANTED / small
        reasons.append(
            f"5 % of the {what} are under {small:.0f} px a side in the original; they should span {WANTED:.0f} px of "
            f"the input."
        )
    available = math.ceil(max(height, width) / STEP) * STEP
    longer = min(max(SHORTEST, math.ceil(longer / STEP) * STEP), available, LONGEST)
    ratio = min(height, width) / max(height, width)
    shorter = longer if ratio > 0.8 else max(STEP, math.ceil(longer * ratio / STEP) * STEP)
    size = (longer, shorter) if height >= width else (shorter, longer)
    scale = max(height / size[0], width / size[1])
    if sizes and small / scale < 0.9 * WANTED:
        limit = "that is all the images have" if longer == available else f"limited to {LONGEST} for memory"
        reasons.append(
            f"At {size[0]}x{size[1]} they span {small / scale:.0f} px ({limit}); expect to miss the smallest."
        )
    fine = bool(boxes) and small / scale < 32
    if boxes:
        reasons.append(
            f"The smallest boxes span {small / scale:.0f} px: "
            + ("a stride-4 level is needed." if fine else "stride 8 is fine enough, and four times cheaper.")
        )
    sampler, reason = _sampler(facts, dict(tasks), batch_size)
    return Suggestion(
        size,
        (4, 8, 16, 32, 64) if fine or not boxes else (8, 16, 32, 64),
        sampler,
        (*reasons, reason),
        (round(height), round(width)),
        scale,
    )


def _sampler(
    facts: Sequence[Facts], tasks: dict[str, Task], batch_size: int
) -> tuple[Literal["shuffle", "positive", "sqrt"], str]:
    from datamodules.loading.samplers import positives, strata

    records = [f.record for f in facts if f.split == "train"]
    share = float(positives(records, tasks).mean()) if records else 0.0
    without = (1 - share) ** batch_size
    if share > 0 and without > 0.05:
        return "positive", (
            f"{share:.0%} of the training images show something to find; at batch size {batch_size}, {without:.0%} of "
            f"shuffled batches would have none."
        )
    labels = Counter(word for record in records for word in strata(record, tasks))
    for name, task in tasks.items():
        counts = [labels[f"{name}={label}"] for label in task.classes if labels[f"{name}={label}"]]
        if task.kind == "classification" and len(counts) > 1 and max(counts) > 10 * min(counts):
            return "sqrt", f"The classes of {name} differ in number by a factor of {max(counts) / min(counts):.0f}."
    return "shuffle", "Labels are balanced well enough for plain shuffling."
