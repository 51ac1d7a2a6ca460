"""What a training cost, and how soon it was nearly as good as training on all data in one place."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mtmedformer.commands.compare.cells import Cell, read_json
from mtmedformer.commands.compare.study import metric_words

SHARE = 0.95
"""Of the yardstick's value that counts as nearly as good."""


@dataclass(frozen=True)
class Curve:
    """How a metric rose on validation images, an epoch or round each; NaN where it was not measured.

    Attributes:
        values: One an epoch.
    """

    values: list[float]

    @property
    def end(self) -> float:
        """The mean of the last three values: a single one is noisy."""
        known = [value for value in self.values if value == value][-3:]
        return sum(known) / len(known) if known else math.nan

    def reaches(self, target: float) -> int | None:
        """Return the number of the first epoch, from 1, whose value is no less than a target."""
        return next((i + 1 for i, value in enumerate(self.values) if value >= target), None)


def curve_of(cell: Cell, metric: str) -> Curve:
    """Return the validation curve of a metric, the mean over sites where it was logged by site.

    Args:
        cell: A finished cell.
        metric: As in a study.
    """
    own = cell.state.get("by") == "own"
    words = [re.escape(word) for word in metric_words(metric)]
    if len(words) == 1:
        words = [r"[^/]+", *words]
    name = "/".join(words)
    by_site = re.compile(rf"site/[^/]+/val/{name}" if own else rf"val/{name}/site=.+")
    whole = re.compile(rf"val/{name}")
    values: dict[int, float] = {}
    for row in cell.logged():
        found = [float(v) for key, v in row.items() if v and by_site.fullmatch(key)]
        if not found and not own:
            found = [float(v) for key, v in row.items() if v and whole.fullmatch(key)]
        known = [value for value in found if value == value]
        if known and row.get("epoch", "").isdigit():
            values[int(row["epoch"])] = sum(known) / len(known)
    return Curve([values.get(epoch, math.nan) for epoch in range(max(values, default=-1) + 1)])


def measures(cell: Cell, metric: str, yardstick: Cell | None, higher_is_better: bool) -> dict[str, float | None]:
    """Return what a cell cost; ``None`` for what is not known.

    Args:
        cell: A finished cell.
        metric: The study's deciding metric.
        yardstick: The cell of the same run that trained on all data in one place.
        higher_is_better: Whether more of the metric is better; otherwise nothing is said of reaching the yardstick.
    """
    file = cell.folder / "rounds.json"
    rounds: dict[str, Any] = read_json(file) if file.is_file() else {}
    parts: dict[str, Any] = _start(cell)
    found: dict[str, float | None] = {
        "weights": sum(part["weights"] for part in parts.values()) or None,
        "seconds": cell.state.get("seconds"),
        "processor_seconds": cell.state.get("processor_seconds"),
        "rounds": len(rounds.get("bytes", [])) or None,
        "bytes": sum(rounds.get("bytes", [])) or None,
        "bytes_down": sum(rounds.get("bytes_down", [])) or None,
        "rounds_to_95": None,
        "bytes_to_95": None,
        "seconds_to_95": None,
    }
    if yardstick is not None and higher_is_better:
        number = curve_of(cell, metric).reaches(SHARE * curve_of(yardstick, metric).end)
        if number is not None:
            found["rounds_to_95"] = number
            if found["bytes"]:
                found["bytes_to_95"] = sum(rounds["bytes"][:number])
            if rounds.get("seconds"):
                found["seconds_to_95"] = sum(rounds["seconds"][:number])
    return found


def same_start(cells: Sequence[Cell]) -> list[str]:
    """Return where trainings of one run did not start from the same weights: sentences, none if all did.

    Parts of equal size on encoders of equal size are compared; what has another size is another architecture.
    """
    found: dict[str, list[str]] = {}
    for run in dict.fromkeys(cell.run for cell in cells):
        seen: dict[tuple[str, int, int], dict[str, list[str]]] = {}
        for cell in cells:
            start = _start(cell) if cell.run == run else {}
            encoder = start.get("encoder", {}).get("weights", 0)
            for part, told in start.items():
                seen.setdefault((part, told["weights"], encoder), {}).setdefault(told["hash"], []).append(cell.variant)
        for (part, *_), hashes in seen.items():
            if len(hashes) > 1:
                groups = "; ".join(", ".join(names) for names in hashes.values())
                found.setdefault(f"{part} started differently in {groups}", []).append(run)
    return [f"{', '.join(runs)}: {words}" for words, runs in found.items()]


def _start(cell: Cell) -> dict[str, Any]:
    file = cell.folder / "start_weights.json"
    return read_json(file) if file.is_file() else {}
