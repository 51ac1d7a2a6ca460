"""Base of the metrics of every task: rows per image, from which values, intervals and subgroups are computed."""

from __future__ import annotations

import hashlib
import json
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from mtmedformer.batch import Meta
from mtmedformer.metrics.subgroups import members_by_group

Floats = NDArray[np.float64]
Evaluate = Callable[[Floats], dict[str, Floats]]
"""Weights (R, n), how often each of the n images counts in each of R resamples, to metric name -> values (R,)."""

CHUNK = 32
"""Resamples evaluated at once, which bounds the memory of a bootstrap and keeps its arrays in the cache."""


@dataclass(frozen=True)
class Images:
    """The distinct labelled images a metric has seen, in an order that does not depend on arrival.

    Attributes:
        rows: (n,) row of each image in the metric's states.
        patients: (n,) patient of each image as a number from 0.
        sites: Site of each image.
        views: View of each image, or ``None``.
        groups: Further groups of each image by column.
    """

    rows: NDArray[np.int64]
    patients: NDArray[np.int64]
    sites: tuple[str, ...]
    views: tuple[str | None, ...]
    groups: tuple[dict[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.rows)


class TaskMetrics(Metric):
    """Metrics of one task over the labelled images, with patient-level intervals and values per site, view and group.

    ``update`` keeps small rows per image on the CPU (never pixels), so a metric neither grows on the GPU nor needs its
    data in any order: in distributed runs rows are gathered, and an image that a sampler served twice counts once.
    Values without ground truth are NaN, never 0 or -1.

    Subclasses declare their row states with ``add_rows``, fill them in ``update`` and evaluate them in ``prepare``.

    Args:
        classes: Class names in channel order.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    primary: ClassVar[str]
    """Name of the headline metric: in [0, 1], higher is better."""

    images: list[Tensor]

    def __init__(self, classes: Sequence[str]) -> None:
        super().__init__(dist_sync_fn=gather_on_cpu)
        self.classes = tuple(classes)
        self.no_rows: dict[str, Tensor] = {}
        self.add_rows("images", torch.zeros(0, dtype=torch.uint8))

    def add_rows(self, name: str, empty: Tensor) -> None:
        """Declare a state that is a growing table.

        Args:
            name: Attribute that holds the list of tables.
            empty: A table of no rows, of the shape and dtype of the others.
        """
        self.add_state(name, [], dist_reduce_fx="cat")
        self.no_rows[name] = empty

    def table(self, name: str) -> Tensor:
        """Return a state as one tensor on the CPU."""
        state = getattr(self, name)
        return torch.cat([self.no_rows[name], *(t.cpu() for t in ([state] if isinstance(state, Tensor) else state))])

    def register(self, meta: Sequence[Meta], present: Tensor) -> list[int]:
        """Store the identities of the labelled images of a batch and return their indices in it.

        Args:
            meta: One entry per image of the batch.
            present: bool (B,), whether the image is labelled for this task.
        """
        if len(meta) != len(present):
            raise ValueError(f"metrics need one Meta per image: got {len(meta)} for {len(present)} images")
        rows: list[int] = present.nonzero().flatten().tolist()
        if rows:
            text = "".join(
                json.dumps([_identity(m), m.patient, m.site, m.view, dict(m.groups)]) + "\n"
                for m in (meta[i] for i in rows)
            )
            self.images.append(torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8))
        return rows

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the states of all processes; one that saw no labelled image takes part with tables of no rows."""
        for name in self.no_rows:
            setattr(self, name, [self.table(name)])
        super().sync(*args, **kwargs)

    @abstractmethod
    def prepare(self, rows: NDArray[np.int64]) -> Evaluate:
        """Do the part that all resamples share (sorting, matching) and return the function that evaluates them.

        Args:
            rows: (n,) rows of the states to use, in this order; possibly none.

        Returns:
            Function of weights (R, n) that returns every metric, overall first, then ``<metric>/<class>``.
        """

    def compute(self) -> dict[str, Tensor]:
        """Return every metric as a float32 scalar: overall ones first, then per class as ``<metric>/<class>``."""
        values = self.overall(self.seen().rows)
        return {name: torch.tensor(value, dtype=torch.float32) for name, value in values.items()}

    def overall(self, rows: NDArray[np.int64]) -> dict[str, float]:
        """Return every metric over the given rows."""
        values = self.prepare(rows)(np.ones((1, len(rows))))
        return {name: float(value[0]) for name, value in values.items()}

    def report(self, replicates: int = 1000, seed: int = 0, level: float = 0.95) -> dict[str, float]:
        """Return every metric with its interval, over all images and per site, view and group.

        Intervals are percentiles over resamples of whole patients with replacement: images of one patient are not
        independent, so resampling images would make the intervals too narrow. A resample in which a metric has no
        ground truth is left out of that metric's interval. In distributed runs every process has to call this.

        Args:
            replicates: Number of resamples.
            seed: Seed of the resampling; the same seed and images give the same intervals on any number of processes.
            level: Probability mass of the intervals.

        Returns:
            ``n_images`` and ``n_patients``, then ``<metric>``, ``<metric>_ci_low`` and ``<metric>_ci_high`` (NaN
            with fewer than two patients). The same for every group of images (``site=<site>``, ``view=<view>``,
            ``<column>=<value>``), where there is ground truth: ``<metric>/<group>``, ``<metric>_ci_low/<group>``,
            ``<metric>_ci_high/<group>``, ``n_images/<group>``, ``n_patients/<group>`` and
            ``n_positive/<class>/<group>``.
        """
        with self.gathered():
            images = self.seen()
            report = self._measured(images.rows, images.patients, "", replicates, seed, level)
            for group, members in members_by_group(images.sites, images.views, images.groups).items():
                rows, patients = images.rows[members], images.patients[members]
                one = self._measured(rows, patients, f"/{group}", 0 if members.all() else replicates, seed, level)
                report |= {name: value for name, value in one.items() if not math.isnan(value)}
                report |= {f"n_positive/{label}/{group}": n for label, n in self.positives(rows).items()}
        return report

    def _measured(
        self,
        rows: NDArray[np.int64],
        patients: NDArray[np.int64],
        group: str,
        replicates: int,
        seed: int,
        level: float,
    ) -> dict[str, float]:
        """Return the metrics of some rows with their intervals; those of single classes only over all images."""
        numbers, patients = np.unique(patients, return_inverse=True)
        report: dict[str, float] = {f"n_images{group}": len(rows), f"n_patients{group}": len(numbers)}
        evaluate = self.prepare(rows)
        weights = patient_weights(patients, replicates, seed)
        parts = [evaluate(weights[i : i + CHUNK].astype(np.float64)) for i in range(0, len(weights), CHUNK)]
        for name, values in evaluate(np.ones((1, len(rows)))).items():
            report[f"{name}{group}"] = float(values[0])
            if not group or "/" not in name:
                samples = np.concatenate([part[name] for part in parts]) if parts else np.zeros(0)
                low, high = interval(samples, level)
                report |= {f"{name}_ci_low{group}": low, f"{name}_ci_high{group}": high}
        return report

    def positives(self, rows: NDArray[np.int64]) -> dict[str, int]:
        """Return the number of images (of boxes: of lesions) of some rows by class; empty where it is not known."""
        return {}

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Hold the rows of all processes within the context; every process has to enter it."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self.sync_on_compute):
            yield

    def seen(self) -> Images:
        """Return the distinct labelled images, ordered by identity."""
        lines = [json.loads(line) for line in bytes(self.table("images").numpy()).decode().splitlines()]
        first = {identity: row for row, (identity, *_) in reversed(list(enumerate(lines)))}
        rows = [first[identity] for identity in sorted(first)]
        numbers = {patient: i for i, patient in enumerate(sorted({lines[row][1] for row in rows}))}
        return Images(
            rows=np.array(rows, dtype=np.int64),
            patients=np.array([numbers[lines[row][1]] for row in rows], dtype=np.int64),
            sites=tuple(lines[row][2] for row in rows),
            views=tuple(lines[row][3] for row in rows),
            groups=tuple(lines[row][4] for row in rows),
        )


class MetricsByTask(nn.ModuleDict):
    """The metrics of every task for one split.

    Args:
        metrics: A fresh metric per task, by its name.
    """

    def __init__(self, metrics: Mapping[str, TaskMetrics]) -> None:
        super().__init__(metrics)

    def of(self, name: str) -> TaskMetrics:
        """Return the metric of a task."""
        return cast("TaskMetrics", self[name])

    def reset(self) -> None:
        """Remove all images."""
        for name in self:
            self.of(name).reset()

    def compute(self) -> tuple[dict[str, dict[str, float]], float]:
        """Return the values of each task by name, and the mean of the primary ones that are known (NaN if none is)."""
        values = {name: {key: float(value) for key, value in self.of(name).compute().items()} for name in self}
        return values, known_mean(one.get(self.of(name).primary, math.nan) for name, one in values.items())


class TaskMeans(nn.ModuleDict):
    """The mean of one number per task, weighted by labelled images.

    Args:
        tasks: Names of the tasks.
    """

    def __init__(self, tasks: Iterable[str]) -> None:
        super().__init__({name: MeanMetric() for name in tasks})

    def of(self, name: str) -> MeanMetric:
        """Return the mean of a task."""
        return cast("MeanMetric", self[name])

    def reset(self) -> None:
        """Remove all values."""
        for name in self:
            self.of(name).reset()

    def compute(self) -> dict[str, Tensor]:
        """Return the mean of each task; NaN without a value."""
        return {name: self.of(name).compute() for name in self}


def known_mean(values: Iterable[float]) -> float:
    """Return the mean of the values that are not NaN; NaN where there is none."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def gather_on_cpu(tensor: Tensor, group: Any = None) -> list[Tensor]:
    """Gather a CPU tensor from all processes, through the accelerator where the backend requires it (NCCL)."""
    device = torch.accelerator.current_accelerator()
    if device is None or "gloo" in dist.get_backend(group):
        return gather_all_tensors(tensor, group)
    device = torch.device(device.type, torch.accelerator.current_device_index())
    return [t.cpu() for t in gather_all_tensors(tensor.to(device), group)]


def _identity(meta: Meta) -> str:
    name = "\x00".join((meta.site, meta.patient, meta.id))
    return hashlib.blake2b(name.encode(), digest_size=16).hexdigest()


def patient_weights(patients: NDArray[np.int64], replicates: int, seed: int) -> NDArray[np.int32]:
    """Draw patients with replacement, as many as there are, and return how often each image is in each resample.

    All images of a patient have the same count.

    Args:
        patients: (n,) patient of each image as a number from 0.
        replicates: Number of resamples R.
        seed: Seed of the draw.

    Returns:
        (R, n) counts; (0, n) with fewer than two patients, where resampling is meaningless.
    """
    number = int(patients.max()) + 1 if len(patients) else 0
    if number < 2:
        return np.zeros((0, len(patients)), dtype=np.int32)
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(number, np.full(number, 1 / number), size=replicates).astype(np.int32)
    return draws[:, patients]


def interval(samples: NDArray[np.float64], level: float) -> tuple[float, float]:
    """Return the central percentile interval of the resampled values, NaN where none is known.

    Args:
        samples: (R,) value in each resample; NaN where it has no ground truth, which is left out.
        level: Probability mass of the interval, for example 0.95.
    """
    known = samples[~np.isnan(samples)]
    if not len(known):
        return float("nan"), float("nan")
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def entropy(probability: Tensor, classes: int | None = None) -> Tensor:
    """Return the entropy of probabilities, in nats.

    Args:
        probability: Probabilities of any shape.
        classes: Dimension along which they sum to 1; it disappears. ``None``: each is binary.
    """
    terms: Tensor = torch.special.entr(probability)
    if classes is None:
        terms = terms + torch.special.entr(1 - probability)
        return terms
    return terms.sum(classes)
