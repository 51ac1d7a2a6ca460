"""The costs of a training, and how soon it reached 95 % of training on all data in one place."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mtmedformer.commands.compare.comparison import Costs
from mtmedformer.commands.compare.study import metric_words
from mtmedformer.commands.compare.trainings import RoundCosts, Training, read_json
from mtmedformer.metrics.base import known_mean

SHARE = 0.95
"""Share of the yardstick's value that has to be reached."""


@dataclass(frozen=True)
class ValidationCurve:
    """A metric on validation images over the epochs (or rounds) of a training.

    Attributes:
        values: One value per epoch; NaN where it was not measured.
    """

    values: list[float]

    @property
    def end(self) -> float:
        """The mean of the last three values, because a single one is noisy."""
        return known_mean([value for value in self.values if value == value][-3:])

    def reaches(self, target: float) -> int | None:
        """Return the number of the first epoch, from 1, with a value of at least the target."""
        return next((i + 1 for i, value in enumerate(self.values) if value >= target), None)


def curve_of(training: Training, metric: str) -> ValidationCurve:
    """Return the validation curve of a metric: the mean over sites where the sites were logged.

    Args:
        training: A finished training.
        metric: As in a study.
    """
    status = training.status
    own = status is not None and status.models == "own"
    words = [re.escape(word) for word in metric_words(metric)]
    if len(words) == 1:
        words = [r"[^/]+", *words]
    name = "/".join(words)
    by_site = re.compile(rf"site/[^/]+/val/{name}" if own else rf"val/{name}/site=.+")
    together = re.compile(rf"val/{name}")
    values: dict[int, float] = {}
    for row in training.logged():
        logged = [float(v) for key, v in row.items() if v and by_site.fullmatch(key)]
        if not logged and not own:
            logged = [float(v) for key, v in row.items() if v and together.fullmatch(key)]
        mean = known_mean(logged)
        if not math.isnan(mean) and row.get("epoch", "").isdigit():
            values[int(row["epoch"])] = mean
    return ValidationCurve([values.get(epoch, math.nan) for epoch in range(max(values, default=-1) + 1)])


def costs_of(training: Training, metric: str, yardstick: Training | None, higher_is_better: bool) -> Costs:
    """Return the costs of a finished training.

    Args:
        training: The training.
        metric: The study's deciding metric.
        yardstick: The training of the same run on all data in one place.
        higher_is_better: Whether more of the metric is better; if not, no costs until 95 % are given.
    """
    status, rounds = training.status, RoundCosts.read(training.folder)
    costs = Costs(
        weights=sum(part["weights"] for part in _start(training).values()) or None,
        seconds=status.seconds if status else None,
        processor_seconds=status.processor_seconds if status else None,
        rounds=len(rounds.bytes) or None,
        bytes=sum(rounds.bytes) or None,
        bytes_down=sum(rounds.bytes_down) or None,
    )
    if yardstick is None or not higher_is_better:
        return costs
    number = curve_of(training, metric).reaches(SHARE * curve_of(yardstick, metric).end)
    if number is None:
        return costs
    return replace(
        costs,
        rounds_to_95=number,
        bytes_to_95=sum(rounds.bytes[:number]) if costs.bytes else None,
        seconds_to_95=sum(rounds.seconds[:number]) if rounds.seconds else None,
    )


def same_start(trainings: Sequence[Training]) -> list[str]:
    """Return a sentence for each part whose initial weights differ between variants of a run.

    Parts are compared if they have the same number of weights and so have their encoders; others have another
    architecture.
    """
    differing: dict[str, list[str]] = {}
    for run in dict.fromkeys(training.run for training in trainings):
        variants: dict[tuple[str, int, int], dict[str, list[str]]] = {}
        for training in trainings:
            start = _start(training) if training.run == run else {}
            encoder = start.get("encoder", {}).get("weights", 0)
            for part, one in start.items():
                by_hash = variants.setdefault((part, one["weights"], encoder), {})
                by_hash.setdefault(one["hash"], []).append(training.variant)
        for (part, *_), hashes in variants.items():
            if len(hashes) > 1:
                groups = "; ".join(", ".join(names) for names in hashes.values())
                differing.setdefault(f"{part} started differently in {groups}", []).append(run)
    return [f"{', '.join(runs)}: {words}" for words, runs in differing.items()]


def _start(training: Training) -> dict[str, Any]:
    """Return hash and number of the initial weights of each part, as ``callbacks.StartWeights`` writes them."""
    file = training.folder / "start_weights.json"
    return read_json(file) if file.is_file() else {}
