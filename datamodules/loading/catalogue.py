"""Check a catalogue, and select patients, records and tasks from it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from datamodules.loading.samplers import strata
from datamodules.records import Catalogue, ClassTruth, MaskTruth, Record, Truth, ValueTruth
from mtmedformer.batch import Task
from mtmedformer.errors import ConfigError, DataError, NoImagesError


def check_catalogue(catalogue: Catalogue, name: str) -> None:
    """Raise if a catalogue contradicts itself.

    Args:
        catalogue: Tasks and records of a data set.
        name: Name of the data set, for the error.

    Raises:
        DataError: There is no record, two records have one id, or a label does not fit its task.
    """
    if not catalogue.records:
        raise NoImagesError(f"{name} has no images")
    twice = [i for i, count in Counter(record.id for record in catalogue.records).items() if count > 1]
    if twice:
        raise DataError(f"{name}: {len(twice)} ids belong to several images, for example {twice[0]!r}")
    for record in catalogue.records:
        for task, truth in record.truth.items():
            if task not in catalogue.tasks:
                raise DataError(f"{name}: {record.file.name} is labelled for {task!r}, which is not one of its tasks")
            problem = _misfit(catalogue.tasks[task], truth)
            if problem:
                raise DataError(f"{name}: {record.file.name}, task {task!r}: {problem}")


def _misfit(task: Task, truth: Truth) -> str:
    count = len(task.classes)
    if isinstance(truth, ClassTruth):
        fits, given = task.kind == "classification", f"{len(truth.values)} values"
        complete = len(truth.values) == count
    elif isinstance(truth, ValueTruth):
        fits, given = task.kind == "regression", f"grade {truth.value:g}"
        if not math.isfinite(truth.value):
            return f"{truth.value} is no number"
        complete = not task.classes or truth.value in range(count)
    elif isinstance(truth, MaskTruth):
        fits, given = task.kind == "segmentation", f"{len(truth.channels)} masks"
        complete = len(truth.channels) == count
    else:
        fits, given = task.kind == "detection", f"class indices {sorted({*truth.labels, *truth.mask_labels})}"
        complete = all(0 <= label < count for label in (*truth.labels, *truth.mask_labels))
        if len(truth.boxes) != len(truth.labels) or len(truth.masks) != len(truth.mask_labels):
            return "the numbers of labels and of boxes and masks differ"
    if not fits:
        return f"the task's kind is {task.kind}, but its label is a {type(truth).__name__}"
    return "" if complete else f"{given} for {count} classes ({', '.join(task.classes)})"


def some_patients(records: list[Record], limit: int | None, seed: int) -> list[Record]:
    """Keep the records of ``limit`` patients drawn with a seed, in their order; all with ``None``."""
    patients = sorted({record.patient for record in records})
    if limit is None or limit >= len(patients):
        return records
    chosen = {patients[i] for i in np.random.default_rng(seed).permutation(len(patients))[:limit]}
    return [record for record in records if record.patient in chosen]


def select(records: list[Record], where: Mapping[str, str | list[str]]) -> list[Record]:
    """Keep the records whose site, view, laterality or group has one of the values allowed.

    Raises:
        ConfigError: Records have no such key, or no record is left.
    """
    groups = list(dict.fromkeys(key for record in records for key in record.groups))
    kept = records
    for key, allowed in where.items():
        if key not in (*_FIELDS, *groups):
            known = ", ".join([*_FIELDS, *groups])
            raise ConfigError(f"data.init_args.where: images have no {key!r}; choose from {known}")
        values = {allowed} if isinstance(allowed, str) else set(allowed)
        present = {_value(record, key) for record in records}
        kept = [record for record in kept if _value(record, key) in values]
        if not kept:
            known = ", ".join(sorted(str(value) for value in present))
            raise ConfigError(f"data.init_args.where: no image has {key} {allowed!r}; there are {known}")
    return kept


def choose_tasks(tasks: dict[str, Task], names: list[str] | None) -> dict[str, Task]:
    """Keep the tasks of these names, or all with ``None``.

    Raises:
        ConfigError: A name is unknown, or the list is empty.
    """
    unknown = sorted(set(names or []) - set(tasks))
    if unknown or names == []:
        raise ConfigError(f"data.init_args.tasks={names}: choose from {', '.join(tasks)}, or null for all")
    return {name: task for name, task in tasks.items() if names is None or name in names}


def advice(records: Sequence[Record], tasks: dict[str, Task]) -> str:
    """Return a sentence on the tasks and classes without (positive) images, which cannot be learned; or nothing."""
    counts = Counter(word for record in records for word in set(strata(record, tasks)))
    problems = []
    for name, task in tasks.items():
        labelled = sum(name in record.truth for record in records)
        if not labelled:
            problems.append(f"no image is labelled for {name}")
        elif task.kind == "classification":
            absent = [c for c in task.classes if not counts[f"{name}={c}"]]
            problems += [f"{name} has no image of {', '.join(absent)}"] if absent else []
        elif task.kind != "regression" and not counts[f"{name}=+"]:
            problems.append(f"{name} has {labelled} labelled images and no positive one")
    return f"Of the {len(records)} training images: {'; '.join(problems)}" if problems else ""


_FIELDS = ("site", "view", "laterality")


def _value(record: Record, key: str) -> str | None:
    own = {"site": record.site, "view": record.view, "laterality": record.laterality}
    return own[key] if key in own else record.groups.get(key)
