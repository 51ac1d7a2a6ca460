"""Orders of the training images: shuffled, a positive image in every batch, or rare labels drawn more often."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DistributedSampler

from datamodules.loading.negatives import NEGATIVE
from datamodules.records import BoxTruth, ClassTruth, MaskSource, MaskTruth, Record, ValueTruth
from mtmedformer.batch import Task
from mtmedformer.errors import ConfigError
from mtmedformer.metrics.cases import plain_name

log = logging.getLogger(__name__)

Strategy = Literal["shuffle", "positive", "sqrt"]


def strata(record: Record, tasks: dict[str, Task]) -> tuple[str, ...]:
    """Return the strata of a record, one string per label.

    ``task=class`` for each class that holds, ``task=none`` if every known class is absent; ``task=+`` or ``task=-`` for
    boxes and masks; ``task=grade``, or for numbers the quarter of their range. Unknown tasks and classes, and uncertain
    ones, add nothing. A mask file counts as ``+`` until it has been read and found empty (``Record.empty``).
    """
    labels = []
    for name in sorted(tasks):
        truth = record.truth.get(name)
        if isinstance(truth, ClassTruth):
            known = [(c, v) for c, v in zip(tasks[name].classes, truth.values, strict=True) if v in (0, 1)]
            present = [f"{name}={c}" for c, v in known if v]
            labels += present or ([f"{name}=none"] if known else [])
        elif name in record.empty:
            labels.append(f"{name}=-")
        elif isinstance(truth, BoxTruth):
            labels.append(f"{name}={'+' if truth.boxes or _drawn(truth.masks) else '-'}")
        elif isinstance(truth, ValueTruth):
            labels.append(f"{name}={_place(tasks[name], truth.value)}")
        elif isinstance(truth, MaskTruth) and any(c is not None for c in truth.channels):
            labels.append(f"{name}={'+' if _drawn([c for c in truth.channels if c is not None]) else '-'}")
    return tuple(labels)


def is_positive(stratum: str, negative: Collection[str] = NEGATIVE) -> bool:
    """Return whether a stratum of `strata` is positive.

    Args:
        stratum: The stratum.
        negative: Names of the negative classes, each as `plain_name` returns it.
    """
    value = stratum.split("=", 1)[1]
    return value not in ("-", "none") and plain_name(value) not in negative


def positives(
    records: Sequence[Record], tasks: dict[str, Task], negative: Collection[str] = NEGATIVE
) -> NDArray[np.bool_]:
    """Return which records are positive, bool (N,).

    A record is if, in any task, it has a box, a mask that is not empty, or a class that is not a negative one. A task
    in which more than half of all records are positive (lungs, breast outline) is left out, because every batch has one
    of those anyway. Numbers and grades are neither positive nor negative.

    Args:
        records: The records.
        tasks: The tasks by name.
        negative: Names of the negative classes, each as `plain_name` returns it.

    Returns:
        bool (len(records),).
    """
    positive = np.zeros(len(records), bool)
    for hit in positives_by_task(records, tasks, negative).values():
        positive |= hit
    return positive


def positives_by_task(
    records: Sequence[Record], tasks: dict[str, Task], negative: Collection[str] = NEGATIVE
) -> dict[str, NDArray[np.bool_]]:
    """Return which records are positive in each task that `positives` counts; arguments as there."""
    strata_of = [strata(r, tasks) for r in records]
    hits = {}
    for name in [name for name, task in tasks.items() if task.kind != "regression"]:
        hit = np.array(
            [any(is_positive(w, negative) for w in ws if w.startswith(f"{name}=")) for ws in strata_of], bool
        )
        if 0 < hit.sum() <= len(records) / 2:
            hits[name] = hit
    return hits


def describe_positives(records: Sequence[Record], tasks: dict[str, Task], negative: Collection[str] = NEGATIVE) -> str:
    """Return a sentence on what the sampler counts as positive and as negative, or nothing if no record is positive.

    Args:
        records: The records.
        tasks: The tasks by name.
        negative: Names of the negative classes (see `positives`).
    """
    hits = positives_by_task(records, tasks, negative)
    if not hits:
        return ""
    words = sorted({word for record in records for word in strata(record, tasks) if is_positive(word, negative)})
    parts = []
    for name in hits:
        present = [word.split("=", 1)[1] for word in words if word.startswith(f"{name}=")]
        parts.append(name if present == ["+"] else f"{name}: {', '.join(present)}")
    classes = {c for task in tasks.values() if task.kind == "classification" for c in task.classes}
    without = ", ".join(sorted(c for c in classes if plain_name(c) in negative)) or "none"
    count = int(np.any(list(hits.values()), axis=0).sum())
    return (
        f"sampler: {count} of {len(records)} training images are positive ({'; '.join(parts)}); "
        f"negative classes: {without}"
    )


class TaskSampler(DistributedSampler[int]):
    """Yield indices of records in an order that depends on seed, epoch and settings only.

    It is a ``DistributedSampler``, so Lightning keeps it and calls ``set_epoch``. One order is drawn for all processes;
    they take one batch each in turn and have equally many samples (a few are repeated).

    Args:
        records: The records of the training split, in their order there.
        tasks: The tasks by name.
        strategy: ``shuffle``: every record once, in random order. ``positive``: every record once, arranged so that
            every batch has a positive record while there are enough of them. ``sqrt``: as many draws as records, with
            replacement; a stratum (see `strata`) of n records is drawn in proportion to √n.
        batch_size: Samples per batch and process.
        seed: Seed of the order.
        num_replicas: Number of processes that share the records.
        rank: Index of this process.
        negative: Names of the negative classes (see `positives`).

    Raises:
        ConfigError: An unknown strategy, or a batch size below 1.
    """

    def __init__(
        self,
        records: Sequence[Record],
        tasks: dict[str, Task],
        strategy: Strategy = "shuffle",
        batch_size: int = 1,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        negative: Collection[str] = NEGATIVE,
    ) -> None:
        if strategy not in ("shuffle", "positive", "sqrt"):
            raise ConfigError(f"sampler strategy is {strategy!r}; choose shuffle, positive or sqrt")
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; it must be at least 1")
        super().__init__(range(len(records)), num_replicas, rank, seed=seed)  # type: ignore[arg-type]
        self.strategy = strategy
        self.batch_size = batch_size
        self.positive = positives(records, tasks, negative) if strategy == "positive" else np.zeros(0, bool)
        if strategy == "positive" and not self.positive.any():
            log.warning(
                "sampler: no image is positive in any task where positives are the minority; plain shuffling. Which "
                "classes are negative is set by data.init_args.negative"
            )
        strata_of = [strata(r, tasks) for r in records] if strategy == "sqrt" else []
        counts = Counter(strata_of)
        weights = np.array([1 / math.sqrt(counts[w]) for w in strata_of])
        self.probability = weights / weights.sum() if len(strata_of) else weights

    def __len__(self) -> int:
        """Return the number of samples of this process in one epoch."""
        return math.ceil(len(self.dataset) / self.num_replicas)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        """Yield this process's indices of the current epoch."""
        rng = np.random.default_rng([self.seed, self.epoch])
        total = len(self) * self.num_replicas
        count = len(self.dataset)  # type: ignore[arg-type]
        if self.strategy == "sqrt":
            order = rng.choice(count, size=total, p=self.probability) if count else np.zeros(0, np.int64)
        else:
            order = np.resize(rng.permutation(count), total)
        slices = _batches(len(self), self.num_replicas, self.batch_size)
        if self.strategy == "positive":
            order = _spread(order, self.positive[order], [b for turn in slices for b in turn], rng)
        yield from (int(order[i]) for turn in slices for i in range(*turn[self.rank]))


def _place(task: Task, value: float) -> str:
    """Return the grade of a regression, or the quarter of the range, ``1/4`` to ``4/4``."""
    if task.classes:
        return task.classes[int(value)]
    low, high = task.range or (value, value)
    share = (value - low) / (high - low) if high > low else 0.0
    return f"{1 + min(3, max(0, int(4 * share)))}/4"


def _drawn(masks: Sequence[MaskSource]) -> bool:
    return any(mask.file is not None or mask.polygons or mask.discs for mask in masks)


def _batches(each: int, replicas: int, size: int) -> list[list[tuple[int, int]]]:
    """Divide ``each * replicas`` positions into turns of one batch ``(start, stop)`` per process."""
    turns, start = [], 0
    for done in range(0, each, size):
        length = min(size, each - done)
        turns.append([(start + r * length, start + (r + 1) * length) for r in range(replicas)])
        start += replicas * length
    return turns


def _spread(
    order: NDArray[np.int64], positive: NDArray[np.bool_], batches: list[tuple[int, int]], rng: np.random.Generator
) -> NDArray[np.int64]:
    """Rearrange a random order so that as many batches as possible have a positive record; the rest stays random."""
    hits = order[positive]
    chosen = rng.permutation(len(batches))[: len(hits)]
    spots = np.array([rng.integers(*batches[b]) for b in chosen], np.int64)
    arranged = np.empty_like(order)
    arranged[spots] = hits[: len(spots)]
    others = np.concatenate([hits[len(spots) :], order[~positive]])
    free = np.ones(len(order), bool)
    free[spots] = False
    arranged[free] = rng.permutation(others)
    return arranged
