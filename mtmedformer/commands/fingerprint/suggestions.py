"""Suggest settings for a data set, each with its reason: input size, finest detection stride, sampler."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from datamodules.audit.image_statistics import ImageStatistics
from datamodules.loading.negatives import NEGATIVE
from datamodules.loading.samplers import positives, strata
from mtmedformer.batch import Task

WANTED = 12.0
"""Side in input pixels that the smallest structures (5 % quantile) should have: three positions at stride 4."""

SHORTEST, LONGEST, STEP = 256, 1024, 32
"""Bounds of the input's longer side (smaller images have a smaller input), and the step that divides both sides."""


MOST_PIXELS, FEWEST_STEPS = 8 * 512 * 512, 4
"""Largest number of input pixels in a batch, and smallest number of batches in an epoch."""


@dataclass(frozen=True)
class Suggestion:
    """Suggested settings and their reasons.

    Attributes:
        image_size: ``(height, width)`` of the network's input.
        strides: Strides of the pyramid levels for a detection head.
        sampler: Sampler of the training images.
        batch_size: Images per batch.
        why: Sentences with the reasons of each setting, from the data's figures.
        content: Median ``(height, width)`` in original pixels of the region that the preset keeps.
        pixels_per_pixel: Side of one input pixel in original pixels, for the median image.
    """

    image_size: tuple[int, int]
    strides: tuple[int, ...]
    sampler: Literal["shuffle", "positive", "sqrt"]
    batch_size: int
    why: dict[str, tuple[str, ...]]
    content: tuple[int, int]
    pixels_per_pixel: float

    @property
    def reasons(self) -> tuple[str, ...]:
        """All sentences of ``why``."""
        return tuple(sentence for sentences in self.why.values() for sentence in sentences)


def suggest(
    facts: Sequence[ImageStatistics], tasks: Mapping[str, Task], batch_size: int, negative: Collection[str] = NEGATIVE
) -> Suggestion:
    """Derive settings from the images of all splits (sizes) and of training (labels).

    Args:
        facts: Measurements of each image.
        tasks: The tasks by name.
        batch_size: Images per batch; decides how often a shuffled batch would contain no lesion.
        negative: Names of the negative classes (see ``datamodules.loading.samplers.positives``).
    """
    height, width = (float(v) for v in np.median([f.content for f in facts], axis=0))
    boxes = [s.size for f in facts for s in f.structures if tasks[s.task].kind == "detection"]
    sizes = boxes or [s.size for f in facts for s in f.structures]
    what = "boxes" if boxes else "masks"
    reasons, levels = [], []
    longer = float(SHORTEST)
    small = float(np.percentile(sizes, 5)) if sizes else math.inf
    if sizes:
        longer = max(height, width) * WANTED / small
        reasons.append(
            f"5 % of the {what} are under {small:.0f} px per side in the original; they should span {WANTED:.0f} px "
            f"of the input."
        )
    available = math.ceil(max(height, width) / STEP) * STEP
    longer = min(max(SHORTEST, math.ceil(longer / STEP) * STEP), available, LONGEST)
    ratio = min(height, width) / max(height, width)
    shorter = longer if ratio > 0.8 else max(STEP, math.ceil(longer * ratio / STEP) * STEP)
    size = (longer, shorter) if height >= width else (shorter, longer)
    scale = max(height / size[0], width / size[1])
    if sizes and small / scale < 0.9 * WANTED:
        limit = "the size of the images" if longer == available else f"limited to {LONGEST} for memory"
        reasons.append(
            f"At {size[0]}x{size[1]} they span {small / scale:.0f} px ({limit}); the smallest may be missed."
        )
    fine = bool(boxes) and small / scale < 32
    if not sizes:
        reasons.append(f"There are no boxes and masks; {SHORTEST} px are a start for whole-image classes.")
    if boxes:
        levels.append(
            f"The smallest boxes span {small / scale:.0f} px: "
            + ("a level of stride 4 is needed." if fine else "stride 8 is fine enough and four times cheaper.")
        )
    batch, batch_reason = _batch_size(batch_size, size, sum(f.split == "train" for f in facts))
    sampler, reason = _sampler(facts, dict(tasks), batch, negative)
    why = {"image_size": reasons, "strides": levels, "batch_size": [batch_reason], "sampler": [reason]}
    return Suggestion(
        size,
        (4, 8, 16, 32, 64) if fine or not boxes else (8, 16, 32, 64),
        sampler,
        batch,
        {key: tuple(sentences) for key, sentences in why.items() if any(sentences)},
        (round(height), round(width)),
        scale,
    )


def _batch_size(given: int, size: tuple[int, int], images: int) -> tuple[int, str]:
    """Return the images per batch and the reason: as given, unless they have too many pixels or are too many."""
    fitting = max(2, int(MOST_PIXELS // (size[0] * size[1])))
    steps = max(2, images // FEWEST_STEPS)
    batch = min(given, fitting, steps)
    if batch == given:
        return given, ""
    if fitting <= steps:
        return batch, f"{given} images of {size[0]}x{size[1]} may not fit into the memory of a GPU."
    return batch, f"{images} training images give at least {FEWEST_STEPS} steps per epoch at {batch} per batch."


def _sampler(
    facts: Sequence[ImageStatistics], tasks: dict[str, Task], batch_size: int, negative: Collection[str]
) -> tuple[Literal["shuffle", "positive", "sqrt"], str]:
    records = [f.record for f in facts if f.split == "train"]
    share = float(positives(records, tasks, negative).mean()) if records else 0.0
    without = (1 - share) ** batch_size
    if share > 0 and without > 0.05:
        return "positive", (
            f"{share:.0%} of the training images are positive; at batch size {batch_size}, {without:.0%} of shuffled "
            f"batches would contain none."
        )
    labels = Counter(word for record in records for word in strata(record, tasks))
    for name, task in tasks.items():
        counts = [labels[f"{name}={label}"] for label in task.classes if labels[f"{name}={label}"]]
        if task.kind == "classification" and len(counts) > 1 and max(counts) > 10 * min(counts):
            factor = max(counts) / min(counts)
            return "sqrt", f"The largest class of {name} has {factor:.0f} times as many images as the smallest."
    return "shuffle", "The labels are balanced well enough for plain shuffling."
