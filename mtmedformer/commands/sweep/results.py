"""What came out of a sweep: a table on screen and as CSV, and a picture of what the tasks cost each other."""

from __future__ import annotations

import csv
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mtmedformer.errors import ConfigError
from mtmedformer.storage.atomic_write import whole

PRIMARY = re.compile(r"val/[^/]+/(auroc|map50|dice)")
"""The metric that stands for a task in ``val/score``."""

SHOWN = 10
"""Rows of the table on screen; the CSV has all."""


@dataclass(frozen=True)
class Row:
    """A trial that has ended.

    Attributes:
        number: Its number.
        value: What it reached; ``None`` where it failed.
        parameters: What was tried.
        metrics: Everything validated in its best epoch.
        epoch: That epoch, from 0.
        seconds: How long it took.
        reason: Why it failed.
    """

    number: int
    value: float | None
    parameters: dict[str, Any]
    metrics: dict[str, float] = field(default_factory=dict)
    epoch: int = 0
    seconds: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class Objective:
    """A metric whose trade-off is shown, and whether more of it is better."""

    name: str
    maximise: bool = True

    @classmethod
    def parse(cls, text: str) -> Objective:
        """Read ``val/lungs/dice``, or ``val/lungs/hd95:min`` where less is better.

        Raises:
            ConfigError: It ends in something else.
        """
        name, _, way = text.strip().partition(":")
        if way not in ("", "min", "max") or not name:
            raise ConfigError(f"--metrics {text}: write NAME, or NAME:min where less is better")
        return cls(name, way != "min")


def objectives(rows: Sequence[Row], asked: Sequence[Objective]) -> list[Objective]:
    """Return the metrics to weigh against each other: those asked for, or each task's primary one.

    Raises:
        ConfigError: One that was asked for was never logged.
    """
    there = {name: None for row in rows for name, value in row.metrics.items() if math.isfinite(value)}
    for one in asked:
        if rows and one.name not in there:
            raise ConfigError(f"--metrics {one.name}: was not logged; there are {', '.join(there) or 'none'}")
    return list(asked) or [Objective(name) for name in there if PRIMARY.fullmatch(name)]


def points_of(rows: Sequence[Row], chosen: Sequence[Objective]) -> dict[int, tuple[float, ...]]:
    """Return what each trial reached in every objective; one that lacks any is left out."""
    found = {row.number: tuple(row.metrics.get(one.name, math.nan) for one in chosen) for row in rows}
    return {number: values for number, values in found.items() if all(map(math.isfinite, values))}


def write_csv(rows: Sequence[Row], best_of_all: set[int], file: Path) -> None:
    """Write every trial: its value, parameters, metrics, and whether it lies on the Pareto front."""
    parameters = list({key: None for row in rows for key in row.parameters})
    metrics = sorted({name for row in rows for name in row.metrics})
    with whole(file) as part, part.open("w", newline="") as lines:
        writer = csv.writer(lines)
        writer.writerow(["trial", "value", "front", "epoch", "seconds", *parameters, *metrics, "failed"])
        for row in rows:
            head = [row.number, "" if row.value is None else row.value, int(row.number in best_of_all), row.epoch]
            tried = [row.parameters.get(key, "") for key in parameters]
            writer.writerow(
                [*head, round(row.seconds, 1), *tried, *(row.metrics.get(m, "") for m in metrics), row.reason]
            )


def show(
    rows: Sequence[Row], chosen: Sequence[Objective], best_of_all: set[int], metric: str, console: Console
) -> None:
    """Print the best trials, best first; ``*`` marks those on the front."""
    parameters = list({key: None for row in rows for key in row.parameters})
    table = Table("trial", metric.removeprefix("val/"), pad_edge=False, header_style="bold")
    for name in [*_short([one.name for one in chosen]), *_short(parameters)]:
        table.add_column(re.sub(r"[./](?=[^./]+$)", "\n", name), justify="right")
    for row in rows[:SHOWN]:
        reached = [_number(row.metrics.get(one.name, math.nan)) for one in chosen]
        tried = [_number(row.parameters[key]) for key in parameters]
        mark = "*" if row.number in best_of_all else ""
        table.add_row(f"{row.number}{mark}", _number(row.value), *reached, *tried)
    console.print(table)
    if best_of_all:
        console.print("* no other trial is better in one task without being worse in another", highlight=False)


def draw(
    points: Mapping[int, tuple[float, ...]], chosen: Sequence[Objective], best_of_all: set[int], file: Path
) -> None:
    """Draw every pair of objectives against each other, the trials of the front named and joined."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pairs = list(itertools.combinations(range(len(chosen)), 2))
    figure = Figure(figsize=(4.6 * len(pairs), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    labels = [f"{name} {'→' if one.maximise else '←'}" for one, name in zip(chosen, _names(chosen), strict=True)]
    for place, (i, j) in enumerate(pairs, start=1):
        axes = figure.add_subplot(1, len(pairs), place)
        for number, values in points.items():
            on = number in best_of_all
            axes.plot(values[i], values[j], "o", color="#d9822b" if on else "#8b929c", ms=7 if on else 5, zorder=2 + on)
            if on:
                at = (values[i], values[j])
                axes.annotate(str(number), at, xytext=(5, 5), textcoords="offset points", fontsize=8)
        axes.set_xlabel(labels[i])
        axes.set_ylabel(labels[j])
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(0.12)
    told = f"{len(points)} trials; orange: the {len(best_of_all)} on the Pareto front; arrows point to better"
    figure.suptitle(told, fontsize=10)
    figure.savefig(file, dpi=130)


def _names(chosen: Sequence[Objective]) -> list[str]:
    return [one.name.removeprefix("val/").replace("/", " ") for one in chosen]


def _short(keys: Sequence[str]) -> list[str]:
    """Return what tells names apart at a glance: ``health/auroc``, ``weights.health``."""
    short = [key.removeprefix("val/") if "/" in key else ".".join(key.split(".")[-2:]) for key in keys]
    return short if len(set(short)) == len(keys) else list(keys)


def _number(value: Any) -> str:
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:.3g}"
    return "–" if value is None else str(value).rpartition(".")[2] if isinstance(value, str) else str(value)
