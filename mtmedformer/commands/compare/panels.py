"""From rows of images to panels: every metric of every variant, by run and site, under the same resamples."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from difflib import get_close_matches

import numpy as np
from numpy.typing import NDArray

from mtmedformer.commands.compare.cells import Cell, Split
from mtmedformer.commands.compare.statistics import Floats, Panel, draw_patients
from mtmedformer.commands.compare.study import Study, is_own, metric_words
from mtmedformer.errors import ConfigError
from mtmedformer.metrics.rows import TaskRows, load_rows

CALIBRATION = ("nll", "ece")
"""Metrics there are where probabilities were kept; ``nll_raw`` and ``ece_raw`` are those before a temperature."""

REFERRAL = ("dice_at80", "gain_at80", "aurc")
"""Metrics there are where the doubt of masks was kept."""

CHUNK = 64
"""Resamples evaluated at once."""

Rows = dict[str, TaskRows]
Values = dict[str, Floats]
"""By metric (1 + R,): as the data are, then under each resample."""


class Panels:
    """Panels of a study's metrics, from the finished cells.

    Args:
        study: The study.
        cells: Its finished cells.
        split: What they were judged on.
        replicates: Number of resamples R.
        seed: Seed of the resamples.

    Attributes:
        sites: All sites, in the order of their names.
        patients: Patients by site, keyed hashes.
    """

    def __init__(
        self, study: Study, cells: Sequence[Cell], split: Split, replicates: int = 2000, seed: int = 0
    ) -> None:
        self.study, self.split, self.replicates = study, split, replicates
        self.cells = {(cell.variant, cell.run): cell for cell in cells}
        self.runs = tuple(dict.fromkeys(cell.run for cell in cells))
        self._rows: dict[tuple[str, str, bool], Rows] = {}
        people: dict[str, set[str]] = defaultdict(set)
        for cell in cells:
            for own in (False, True):
                for rows in self.rows(cell, own).values():
                    for site, patient in zip(rows.sites.tolist(), rows.patients.tolist(), strict=True):
                        people[site].add(patient)
        self.patients = {site: sorted(found) for site, found in sorted(people.items())}
        self.sites = tuple(self.patients)
        self._drawn = draw_patients(self.patients, replicates, seed)
        self._columns = {site: {p: i for i, p in enumerate(found)} for site, found in self.patients.items()}
        self._values: dict[tuple[str, str, bool, str], dict[str, Values]] = {}

    def rows(self, cell: Cell, own: bool) -> Rows:
        """Return what a cell saw of the images, read once."""
        key = (cell.variant, cell.run, own)
        if key not in self._rows:
            files = cell.rows(self.split, own)
            same = (cell.variant, cell.run, not own)
            shared = same in self._rows and cell.rows(self.split, not own) == files
            self._rows[key] = self._rows[same] if shared else load_rows(files)
        return self._rows[key]

    def panel(self, variant: str, metric: str) -> Panel:
        """Return the panel of one metric of one variant.

        Raises:
            ConfigError: When no task of the study has the metric.
        """
        runs = tuple(run for run in self.runs if (variant, run) in self.cells)
        values = np.full((self.replicates + 1, len(runs), len(self.sites)), np.nan)
        whole = np.full((self.replicates + 1, len(runs)), np.nan)
        patients: set[str] = set()
        for i, run in enumerate(runs):
            rows = self.rows(self.cells[variant, run], is_own(metric))
            for task, _ in self._meant(metric, rows):
                patients |= set(rows[task].patients.tolist())
            for j, site in enumerate(self.sites):
                values[:, i, j] = self._mean(variant, run, metric, rows, site)
            if self.study.average == "images":
                whole[:, i] = self._mean(variant, run, metric, rows, "")
        mean = {"whole": whole[0], "whole_resampled": whole[1:]} if self.study.average == "images" else {}
        return Panel(runs, self.sites, len(patients), values[0], values[1:], **mean)

    def _meant(self, metric: str, rows: Rows) -> list[tuple[str, str]]:
        """Return the tasks and metrics that a name stands for."""
        words, tasks = metric_words(metric), [task for task in rows if "~" not in task]
        if words[0] in tasks:
            return [(words[0], "/".join(words[1:]))]
        found = [(task, "/".join(words)) for task in tasks if "/".join(words) in self._names(rows, task)]
        if not found and len(words) == 1 and not _of_probabilities(words[0]):
            known = sorted({name for task in tasks for name in self._names(rows, task) if "/" not in name})
            close = get_close_matches(words[0], known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
            raise ConfigError(f"metrics: no task has {metric!r}; {hint}")
        return found

    def _names(self, rows: Rows, task: str) -> list[str]:
        none, once = np.arange(0), np.ones((1, 0))
        return list(_united({k: r.evaluate(none)(once) for k, r in rows.items() if k.split("~")[0] == task}))

    def _mean(self, variant: str, run: str, metric: str, rows: Rows, site: str) -> Floats:
        """Return the mean over the tasks a metric stands for, at one site or (site ``""``) over all images."""
        found = []
        for task, name in self._meant(metric, rows):
            values = self._of_task(variant, run, is_own(metric), task, rows)[site]
            if values and name not in values and _of_probabilities(name):
                continue
            if values and name not in values:
                close = get_close_matches(name, values, n=1) or sorted(n for n in values if "/" not in n)
                raise ConfigError(f"metrics: {metric!r}: {task} has no {name!r}; did you mean {' or '.join(close)}?")
            if values:
                found.append(values[name])
        if not found:
            return np.full(self.replicates + 1, np.nan)
        return known_mean(np.stack(found))

    def _of_task(self, variant: str, run: str, own: bool, task: str, rows: Rows) -> dict[str, Values]:
        """Return all metrics of a task, by site and over all images, evaluated once."""
        key = (variant, run, own, task)
        if key not in self._values:
            parts = {name: self._by_site(found) for name, found in rows.items() if name.split("~")[0] == task}
            places = next(iter(parts.values()))
            self._values[key] = {
                place: _united({name: found[place] for name, found in parts.items()}) for place in places
            }
        return self._values[key]

    def _by_site(self, rows: TaskRows) -> dict[str, Values]:
        weights = self._weights(rows)
        found = {s: self._evaluated(rows, weights, np.flatnonzero(rows.sites == s)) for s in self.sites}
        if self.study.average == "images":
            found[""] = self._evaluated(rows, weights, np.arange(len(rows.rows)))
        return found

    def _weights(self, rows: TaskRows) -> NDArray[np.int32]:
        """Return how often each image counts: (R, n)."""
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
    """Return the metrics of a task and of its probabilities under one roof; without a temperature raw is as it is."""
    found: Values = {}
    for key, values in parts.items():
        kind = key.partition("~")[2]
        if kind != "raw":
            found |= {name: value for name, value in values.items() if name not in found}
    raw = next((values for key, values in parts.items() if key.endswith("~raw")), found)
    return found | {f"{name}_raw": raw[name] for name in CALIBRATION if name in raw}


def _of_probabilities(name: str) -> bool:
    return name.split("/")[0].removesuffix("_raw") in CALIBRATION + REFERRAL


def known_mean(values: Floats) -> Floats:
    """Average over the first axis what is not NaN; NaN where all is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        mean: Floats = np.nanmean(values, axis=0)
    return mean


def paired(panels: Panels, variants: Sequence[str]) -> list[str]:
    """Return where variants were not judged on the same images of a run: sentences, none if all were."""
    found = []
    for run in panels.runs:
        seen: Mapping[str, set[tuple[str, ...]]] = defaultdict(set)
        for variant in variants:
            cell = panels.cells.get((variant, run))
            for task, rows in panels.rows(cell, False).items() if cell else ():
                seen[task].add(tuple(sorted(rows.images.tolist())))
        found += [f"{run}: {task} was judged on different images" for task, images in seen.items() if len(images) > 1]
    return found
