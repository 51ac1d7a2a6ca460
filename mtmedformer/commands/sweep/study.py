"""The trials of a sweep and who chooses them: an Optuna study in a file, which outlives the process."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtmedformer.commands.sweep.sweep_file import Sweep
from mtmedformer.errors import ConfigError

if TYPE_CHECKING:
    import optuna
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

STUDY = "study.journal"
"""Holds every trial, what was tried and what came out; Optuna's journal, text, appended to only."""


def open_study(sweep: Sweep, output: Path) -> optuna.Study:
    """Open the study of a folder, or start one.

    Raises:
        ConfigError: The folder holds another sweep.
    """
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    output.mkdir(parents=True, exist_ok=True)
    file = str(output / STUDY)
    study = optuna.create_study(
        storage=optuna.storages.JournalStorage(JournalFileBackend(file, JournalFileOpenLock(file))),
        study_name=sweep.name,
        direction="maximize" if sweep.maximise else "minimize",
        load_if_exists=True,
    )
    asked = _digest(sweep)
    if study.user_attrs.setdefault("sweep", asked) != asked:
        raise ConfigError(
            f"--output {output}: holds trials of another version of this sweep; choose another folder, or delete it"
        )
    study.set_user_attr("sweep", asked)
    return study


def next_trial(study: optuna.Study, sweep: Sweep, seed: int) -> FrozenTrial:
    """Choose the parameters of one more trial; the same number gets the same random numbers, interrupted or not."""
    study.sampler = _sampler(sweep, seed, len(study.get_trials(deepcopy=False)))
    trial = study.ask(sweep.space)
    return next(one for one in study.get_trials() if one.number == trial.number)


def unfinished(study: optuna.Study) -> list[FrozenTrial]:
    """Return the trials that were begun and neither ended nor failed."""
    from optuna.trial import TrialState

    return study.get_trials(states=(TrialState.RUNNING,))


def _sampler(sweep: Sweep, seed: int, number: int) -> BaseSampler:
    from optuna.samplers import GridSampler, RandomSampler, TPESampler

    class Grid(GridSampler):
        """Leaves the counting of trials to the sweep: Optuna's own stops a loop that is not run here."""

        def after_trial(self, *args: Any, **kwargs: Any) -> None:
            """Do nothing."""

    if sweep.method == "grid":
        # one seed for all: it shuffles the grid, whose places the trials remember
        return Grid({key: list(getattr(one, "choices", ())) for key, one in sweep.space.items()}, seed=seed)
    if sweep.method == "random":
        return RandomSampler(seed=seed + number)
    return TPESampler(seed=seed + number, multivariate=True, constant_liar=True)


def front(points: dict[int, tuple[float, ...]], maximise: tuple[bool, ...]) -> set[int]:
    """Return the trials that no other beats in every respect (the Pareto front).

    Args:
        points: What each trial reached, by its number.
        maximise: Whether more is better, for each of the values.
    """
    import optuna

    way = optuna.study.StudyDirection
    study = optuna.create_study(directions=[way.MAXIMIZE if more else way.MINIMIZE for more in maximise])
    study.add_trials([optuna.trial.create_trial(values=list(v), user_attrs={"number": n}) for n, v in points.items()])
    return {trial.user_attrs["number"] for trial in study.best_trials}


def _digest(sweep: Sweep) -> str:
    from optuna.distributions import distribution_to_json

    space = {key: distribution_to_json(one) for key, one in sweep.space.items()}
    parts = [sweep.method, sweep.metric, sweep.maximise, space, sweep.fixed, sweep.command]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
