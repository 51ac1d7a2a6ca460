"""Compute every metric of every variant by run and site, on the same resamples, from the results of each image."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from difflib import get_close_matches

import numpy as np
from numpy.typing import NDArray

from mtmedformer.commands.compare.statistics import Floats, MetricPanel, draw_patients
from mtmedformer.commands.compare.study import Study, is_own, metric_words
from mtmedformer.commands.compare.trainings import Split, Training
from mtmedformer.errors import ConfigError
from mtmedformer.metrics.curves import nan_mean
from mtmedformer.metrics.rows import TaskRows, load_rows

CALIBRATION = ("nll", "ece")
"""Metrics of stored probabilities; ``nll_raw`` and ``ece_raw`` are those before temperature scaling."""

REFERRAL = ("dice_at80", "gain_at80", "aurc")
"""Metrics of the stored uncertainty of masks."""

CHUNK = 64
"""Number of resamples evaluated at once."""

Rows = dict[str, TaskRows]
Values = dict[str, Floats]
"""By metric (1 + R,): on the data, then on each resample."""


class Panels:
    """Panels of a study's metrics, from its finished trainings.

    Args:
        study: The study.
        trainings: Its finished trainings.
        split: Split they were evaluated on.
        replicates: Number of resamples R.
        seed: Seed of the resamples.

    Attributes:
        sites: All sites, in the order of their names.
        patients: Patients by site, as keyed hashes.
    """

    def __init__(
        self, study: Study, trainings: Sequence[Training], split: Split, replicates: int = 2000, seed: int = 0
    ) -> None:
        self.study, self.split, self.replicates = study, split, replicates
        self.trainings = {(training.variant, training.run): training for training in trainings}
        self.runs = tuple(dict.fromkeys(training.run for training in trainings))
        self._rows: dict[tuple[str, str, bool], Rows] = {}
        people: dict[str, set[str]] = defaultdict(set)
        for training in trainings:
            for own in (False, True):
                for rows in self.rows(training, own).values():
                    for site, patient in zip(rows.sites.tolist(), rows.patients.tolist(), strict=True):
                        people[site].add(patient)
        self.patients = {site: sorted(patients) for site, patients in sorted(people.items())}
        self.sites = tuple(self.patients)
        self._drawn = draw_patients(self.patients, replicates, seed)
        self._columns = {site: {p: i for i, p in enumerate(patients)} for site, patients in self.patients.items()}
        self._values: dict[tuple[str, str, bool, str], dict[str, Values]] = {}

    def rows(self, training: Training, own: bool) -> Rows:
        """Return the results of each image of a training, read once."""
        key = (training.variant, training.run, own)
        if key not in self._rows:
            files = training.rows(self.split, own)
            same = (training.variant, training.run, not own)
            shared = same in self._rows and training.rows(self.split, not own) == files
            self._rows[key] = self._rows[same] if shared else load_rows(files)
        return self._rows[key]

    def panel(self, variant: str, metric: str) -> MetricPanel:
        """Return the panel of one metric of one variant.

        Raises:
            ConfigError: When no task of the study has the metric.
        """
        runs = tuple(run for run in self.runs if (variant, run) in self.trainings)
        values = np.full((self.replicates + 1, len(runs), len(self.sites)), np.nan)
        whole = np.full((self.replicates + 1, len(runs)), np.nan)
        patients: set[str] = set()
        for i, run in enumerate(runs):
            rows = self.rows(self.trainings[variant, run], is_own(metric))
            for task, _ in self._tasks_of(metric, rows):
                patients |= set(rows[task].patients.tolist())
            for j, site in enumerate(self.sites):
                values[:, i, j] = self._mean(variant, run, metric, rows, site)
            if self.study.average == "images":
                whole[:, i] = self._mean(variant, run, metric, rows, "")
        mean = {"whole": whole[0], "whole_resampled": whole[1:]} if self.study.average == "images" else {}
        return MetricPanel(runs, self.sites, len(patients), values[0], values[1:], **mean)

    def _tasks_of(self, metric: str, rows: Rows) -> list[tuple[str, str]]:
        """Return the tasks and their metrics that the name of a metric covers."""
        words, tasks = metric_words(metric), [task for task in rows if "~" not in task]
        if words[0] in tasks:
            return [(words[0], "/".join(words[1:]))]
        pairs = [(task, "/".join(words)) for task in tasks if "/".join(words) in self._names(rows, task)]
        if not pairs and len(words) == 1 and not _of_probabilities(words[0]):
            known = sorted({name for task in tasks for name in self._names(rows, task) if "/" not in name})
            close = get_close_matches(words[0], known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
            raise ConfigError(f"metrics: no task has the metric {metric!r}; {hint}")
        return pairs

    def _names(self, rows: Rows, task: str) -> list[str]:
        none, once = np.arange(0), np.ones((1, 0))
        return list(_united({k: r.evaluate(none)(once) for k, r in rows.items() if k.split("~")[0] == task}))

    def _mean(self, variant: str, run: str, metric: str, rows: Rows, site: str) -> Floats:
        """Return the mean over the tasks of a metric, at one site or (site ``""``) over all images."""
        of_tasks = []
        for task, name in self._tasks_of(metric, rows):
            values = self._of_task(variant, run, is_own(metric), task, rows)[site]
            if values and name not in values and _of_probabilities(name):
                continue
            if values and name not in values:
                close = get_close_matches(name, values, n=1) or sorted(n for n in values if "/" not in n)
                raise ConfigError(f"metrics: {metric!r}: {task} has no {name!r}; did you mean {' or '.join(close)}?")
            if values:
                of_tasks.append(values[name])
        if not of_tasks:
            return np.full(self.replicates + 1, np.nan)
        return nan_mean(np.stack(of_tasks))

    def _of_task(self, variant: str, run: str, own: bool, task: str, rows: Rows) -> dict[str, Values]:
        """Return all metrics of a task by site and over all images, evaluated once."""
        key = (variant, run, own, task)
        if key not in self._values:
            parts = {name: self._by_site(one) for name, one in rows.items() if name.split("~")[0] == task}
            sites = next(iter(parts.values()))
            self._values[key] = {site: _united({name: one[site] for name, one in parts.items()}) for site in sites}
        return self._values[key]

    def _by_site(self, rows: TaskRows) -> dict[str, Values]:
        weights = self._weights(rows)
        values = {s: self._evaluated(rows, weights, np.flatnonzero(rows.sites == s)) for s in self.sites}
        if self.study.average == "images":
            values[""] = self._evaluated(rows, weights, np.arange(len(rows.rows)))
        return values

    def _weights(self, rows: TaskRows) -> NDArray[np.int32]:
        """Return the weight of each image in each resample: (R, n)."""
        weights = np.zeros((self.replicates, len(rows.rows)), np.int32)
        for i, (site, patient) in enumerate(zip(rows.sites.tolist(), rows.patients.tolist(), strict=True)):
            weights[:, i] = self._drawn[site][:, self._columns[site][patient]]
        return weights

    def _evaluated(self, rows: TaskRows, weights: NDArray[np.int32], chosen: NDArray[np.int64]) -> Values:
        if not len(chosen):
            return {}
        evaluate = rows.evaluate(chosen)
        parts = [evaluate(np.ones((1, len(chosen))))]
        for start in range(0, self.replicates, CHUNK):
            parts.append(evaluate(weights[start : start + CHUNK, chosen].astype(np.float64)))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _united(parts: Mapping[str, Values]) -> Values:
    """Join the metrics of a task with those of its probabilities; without a temperature the raw ones are the same."""
    united: Values = {}
    for key, values in parts.items():
        kind = key.partition("~")[2]
        if kind != "raw":
            united |= {name: value for name, value in values.items() if name not in united}
    raw = next((values for key, values in parts.items() if key.endswith("~raw")), united)
    return united | {f"{name}_raw": raw[name] for name in CALIBRATION if name in raw}


def _of_probabilities(name: str) -> bool:
    return name.split("/")[0].removesuffix("_raw") in CALIBRATION + REFERRAL


def paired(panels: Panels, variants: Sequence[str]) -> list[str]:
    """Return a sentence for each run and task on which variants were evaluated on different images."""
    remarks = []
    for run in panels.runs:
        images_of: Mapping[str, set[tuple[str, ...]]] = defaultdict(set)
        for variant in variants:
            training = panels.trainings.get((variant, run))
            for task, rows in panels.rows(training, False).items() if training else ():
                images_of[task].add(tuple(sorted(rows.images.tolist())))
        remarks += [
            f"{run}: {task} was evaluated on different images" for task, images in images_of.items() if len(images) > 1
        ]
    return remarks
