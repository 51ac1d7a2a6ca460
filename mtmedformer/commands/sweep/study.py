"""The trials of a sweep: an Optuna study in a journal file, which is continued by the next process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import distribution_to_json
from optuna.samplers import BaseSampler, GridSampler, RandomSampler, TPESampler
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState

from mtmedformer.commands.sweep.sweep_file import Sweep, choices
from mtmedformer.errors import ConfigError

STUDY = "study.journal"
"""Parameters and value of every trial; Optuna's journal, a text file that is only appended to."""


def open_study(sweep: Sweep, output: Path) -> optuna.Study:
    """Open the study in a folder, or create one.

    Raises:
        ConfigError: The folder contains the trials of another sweep.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    output.mkdir(parents=True, exist_ok=True)
    file = str(output / STUDY)
    study = optuna.create_study(
        storage=optuna.storages.JournalStorage(JournalFileBackend(file, JournalFileOpenLock(file))),
        study_name=sweep.name,
        direction="maximize" if sweep.maximise else "minimize",
        load_if_exists=True,
    )
    digest = _digest(sweep)
    if study.user_attrs.setdefault("sweep", digest) != digest:
        raise ConfigError(
            f"--output {output}: contains trials of another version of this sweep; choose another folder, or delete it"
        )
    study.set_user_attr("sweep", digest)
    return study


def next_trial(study: optuna.Study, sweep: Sweep, seed: int) -> FrozenTrial:
    """Choose the parameters of the next trial, the same in an interrupted and in an uninterrupted sweep."""
    study.sampler = _sampler(sweep, seed, len(study.get_trials(deepcopy=False)))
    trial = study.ask(sweep.space)
    return next(one for one in study.get_trials() if one.number == trial.number)


def unfinished(study: optuna.Study) -> list[FrozenTrial]:
    """Return the trials that were started and have neither ended nor failed."""
    return study.get_trials(states=(TrialState.RUNNING,))


class _Grid(GridSampler):
    """A grid that leaves the counting of trials to the sweep; Optuna's would stop a loop that does not run here."""

    def after_trial(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""


def _sampler(sweep: Sweep, seed: int, number: int) -> BaseSampler:
    if sweep.method == "grid":
        # one seed for all trials: it shuffles the grid, and the trials store their places in it
        return _Grid({key: choices(one) for key, one in sweep.space.items()}, seed=seed)
    if sweep.method == "random":
        return RandomSampler(seed=seed + number)
    return TPESampler(seed=seed + number, multivariate=True, constant_liar=True)


def front(points: Mapping[int, tuple[float, ...]], maximise: tuple[bool, ...]) -> set[int]:
    """Return the trials on the Pareto front: those that no other trial equals or exceeds in every objective.

    Args:
        points: Values of each trial, by its number.
        maximise: Whether more is better, for each of the values.
    """
    direction = optuna.study.StudyDirection
    study = optuna.create_study(directions=[direction.MAXIMIZE if more else direction.MINIMIZE for more in maximise])
    study.add_trials([optuna.trial.create_trial(values=list(v), user_attrs={"number": n}) for n, v in points.items()])
    return {trial.user_attrs["number"] for trial in study.best_trials}


def _digest(sweep: Sweep) -> str:
    space = {key: distribution_to_json(one) for key, one in sweep.space.items()}
    parts = [sweep.method, sweep.metric, sweep.maximise, space, sweep.fixed, sweep.command]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
