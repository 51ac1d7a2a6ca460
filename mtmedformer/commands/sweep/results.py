"""The results of a sweep: a table on screen, a CSV file, and a picture of the trade-off between tasks."""

from __future__ import annotations

import csv
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from mtmedformer.commands.sweep.trials import TrialResult
from mtmedformer.errors import ConfigError
from mtmedformer.storage.atomic_write import atomic_write
from mtmedformer.storage.safe_text import cell

PRIMARY = re.compile(r"val/[^/]+/(auroc|map50|dice)")
"""The metrics whose mean is ``val/score``, one per task."""

SHOWN = 10
"""Rows of the table on screen; the CSV file has all trials."""


@dataclass(frozen=True)
class Objective:
    """A metric to weigh against others, and whether more of it is better."""

    name: str
    maximise: bool = True

    @classmethod
    def parse(cls, text: str) -> Objective:
        """Read ``val/lungs/dice``, or ``val/lungs/hd95:min`` if less is better.

        Raises:
            ConfigError: The text has another form.
        """
        name, _, goal = text.strip().partition(":")
        if goal not in ("", "min", "max") or not name:
            raise ConfigError(f"--metrics {text}: write NAME, or NAME:min if less is better")
        return cls(name, goal != "min")


def objectives(rows: Sequence[TrialResult], named: Sequence[Objective]) -> list[Objective]:
    """Return the metrics to weigh against each other: the named ones, or the primary one of each task.

    Raises:
        ConfigError: A named metric was not logged.
    """
    logged = {name: None for row in rows for name, value in row.metrics.items() if math.isfinite(value)}
    for one in named:
        if rows and one.name not in logged:
            raise ConfigError(f"--metrics {one.name}: was not logged; logged were {', '.join(logged) or 'none'}")
    return list(named) or [Objective(name) for name in logged if PRIMARY.fullmatch(name)]


def points_of(rows: Sequence[TrialResult], chosen: Sequence[Objective]) -> dict[int, tuple[float, ...]]:
    """Return the values of each trial in every objective; trials without all of them are left out."""
    points = {row.number: tuple(row.metrics.get(one.name, math.nan) for one in chosen) for row in rows}
    return {number: values for number, values in points.items() if all(map(math.isfinite, values))}


def write_csv(rows: Sequence[TrialResult], front: set[int], file: Path) -> None:
    """Write every trial: its value, parameters, metrics, and whether it lies on the Pareto front."""
    parameters = list({key: None for row in rows for key in row.parameters})
    metrics = sorted({name for row in rows for name in row.metrics})
    with atomic_write(file) as part, part.open("w", newline="") as lines:
        writer = csv.writer(lines)
        names = (cell(name) for name in (*parameters, *metrics))
        writer.writerow(["trial", "value", "front", "epoch", "seconds", *names, "failed"])
        for row in rows:
            head = [row.number, "" if row.value is None else row.value, int(row.number in front), row.epoch]
            values = [row.parameters.get(key, "") for key in parameters]
            values = [cell(value) if isinstance(value, str) else value for value in values]
            writer.writerow(
                [*head, round(row.seconds, 1), *values, *(row.metrics.get(m, "") for m in metrics), cell(row.reason)]
            )


def show(
    rows: Sequence[TrialResult], chosen: Sequence[Objective], front: set[int], metric: str, console: Console
) -> None:
    """Print the best trials, best first; ``*`` marks those on the Pareto front."""
    parameters = list({key: None for row in rows for key in row.parameters})
    table = Table("trial", metric.removeprefix("val/"), pad_edge=False, header_style="bold")
    for name in [*_short([one.name for one in chosen]), *_short(parameters)]:
        table.add_column(re.sub(r"[./](?=[^./]+$)", "\n", name), justify="right")
    for row in rows[:SHOWN]:
        values = [_number(row.metrics.get(one.name, math.nan)) for one in chosen]
        settings = [_number(row.parameters[key]) for key in parameters]
        mark = "*" if row.number in front else ""
        table.add_row(f"{row.number}{mark}", _number(row.value), *values, *settings)
    console.print(table)
    if front:
        console.print("* no other trial is better in one task without being worse in another", highlight=False)


def draw(points: Mapping[int, tuple[float, ...]], chosen: Sequence[Objective], front: set[int], file: Path) -> None:
    """Draw every pair of objectives as a scatter plot, with the numbers of the trials on the front."""
    pairs = list(itertools.combinations(range(len(chosen)), 2))
    figure = Figure(figsize=(4.6 * len(pairs), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    labels = [f"{name} {'→' if one.maximise else '←'}" for one, name in zip(chosen, _names(chosen), strict=True)]
    for place, (i, j) in enumerate(pairs, start=1):
        axes = figure.add_subplot(1, len(pairs), place)
        for number, values in points.items():
            on = number in front
            axes.plot(values[i], values[j], "o", color="#d9822b" if on else "#8b929c", ms=7 if on else 5, zorder=2 + on)
            if on:
                at = (values[i], values[j])
                axes.annotate(str(number), at, xytext=(5, 5), textcoords="offset points", fontsize=8)
        axes.set_xlabel(labels[i])
        axes.set_ylabel(labels[j])
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(0.12)
    title = f"{len(points)} trials; orange: the {len(front)} on the Pareto front; arrows point to better values"
    figure.suptitle(title, fontsize=10)
    figure.savefig(file, dpi=130)


def _names(chosen: Sequence[Objective]) -> list[str]:
    return [one.name.removeprefix("val/").replace("/", " ") for one in chosen]


def _short(keys: Sequence[str]) -> list[str]:
    """Shorten names as far as they stay different: ``health/auroc``, ``weights.health``."""
    short = [key.removeprefix("val/") if "/" in key else ".".join(key.split(".")[-2:]) for key in keys]
    return short if len(set(short)) == len(keys) else list(keys)


def _number(value: Any) -> str:
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:.3g}"
    return "–" if value is None else str(value).rpartition(".")[2] if isinstance(value, str) else str(value)
