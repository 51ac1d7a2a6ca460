"""Puts a comparison together: values, differences with their intervals, verdicts, costs, and what speaks against it."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mtmedformer.commands.compare.cells import Cell, Split, write_json
from mtmedformer.commands.compare.code_version import code_version
from mtmedformer.commands.compare.measures import measures, same_start
from mtmedformer.commands.compare.panels import Panels, paired
from mtmedformer.commands.compare.statistics import Estimate, Panel, Summary, estimate, holm, per_run, verdict
from mtmedformer.commands.compare.study import Study, metric_words
from mtmedformer.errors import ConfigError
from mtmedformer.storage.atomic_write import whole

LOWER_IS_BETTER = ("hd95", "nll", "ece", "loss", "brier", "aurc")
SIGNED = ("gain_at80",)


def higher_is_better(metric: str) -> bool:
    """Return whether more of a metric is better."""
    return not any(word.removesuffix("_raw") in LOWER_IS_BETTER for word in metric_words(metric))


def limits(metric: str) -> tuple[float, float]:
    """Return the least and the most that a metric can be; what is better when more is at most 1, others have no end."""
    least = -1.0 if any(word in SIGNED for word in metric_words(metric)) else 0.0
    return least, 1.0 if higher_is_better(metric) else math.inf


def compare(study: Study, cells: Sequence[Cell], split: Split, replicates: int = 2000) -> dict[str, Any]:
    """Return the comparison of the finished cells as plain containers; NaN stands for what is not known.

    Args:
        study: The study.
        cells: All its cells.
        split: What they were judged on.
        replicates: Number of resamples of the intervals.
    """
    done = [cell for cell in cells if cell.finished(split)]
    names = [name for name in study.variants if any(cell.variant == name for cell in done)]
    panels = Panels(study, done, split, replicates) if done else None
    metrics, unknown = _metrics(study, names, panels) if panels else ({}, [])
    codes = sorted({cell.state["code"] for cell in done})
    return {
        "study": study.name,
        "question": study.question,
        "form": study.form,
        "split": split,
        "reference": study.reference,
        "yardstick": study.yardstick,
        "average": study.average,
        "checkpoint": study.checkpoint,
        "replicates": replicates,
        "runs": list(panels.runs) if panels else [],
        "patients": {site: len(p) for site, p in panels.patients.items()} if panels else {},
        "cells": {"finished": len(done), "all": len(cells)},
        "variants": {name: _about(study, name, done, split) for name in study.variants},
        "metrics": metrics,
        "costs": {name: _costs(study, name, done) for name in names},
        "remarks": [*unknown, *_remarks(study, cells, done, names, panels, codes)],
        "code": codes,
    }


def _metrics(study: Study, names: Sequence[str], panels: Panels) -> tuple[dict[str, Any], list[str]]:
    """Compare every metric; one that nobody has becomes a remark, since hours of training must not end in an error."""
    found, unknown = {}, []
    for metric in study.metrics:
        try:
            found[metric] = _metric(study, metric, names, panels)
        except ConfigError as error:
            unknown.append(str(error))
    return found, unknown


def _metric(study: Study, metric: str, names: Sequence[str], panels: Panels) -> dict[str, Any]:
    """Compare one metric: a value a variant, its difference from the reference, and every pair."""
    higher = higher_is_better(metric)
    found = {name: panels.panel(name, metric) for name in names}
    values = {name: _value(panel, metric) for name, panel in found.items()}
    yardstick = values[study.yardstick]["by_run"] if study.yardstick in values and higher else {}
    for value in values.values():
        value["share"] = _share(value["by_run"], yardstick)
    differences: dict[str, Any] = {}
    if study.reference in found:
        others = [name for name in names if name != study.reference]
        summaries: tuple[Summary, ...] = ("mean", "worst")
        for of in summaries:
            made = {n: estimate(found[n], found[study.reference], of, higher) for n in others}
            for name, told in _judged(made, higher).items():
                differences.setdefault(name, {})[of] = told
    pairs = {
        f"{a}|{b}": estimate(found[a], found[b], "mean", higher) for i, a in enumerate(names) for b in names[i + 1 :]
    }
    return {
        "higher_is_better": higher,
        "values": values,
        "differences": differences,
        "pairs": _judged(pairs, higher),
    }


def _value(panel: Panel, metric: str) -> dict[str, Any]:
    higher, ends = higher_is_better(metric), limits(metric)
    known = np.asarray(~np.isnan(panel.value).any(axis=0))
    by_site = {site: float(panel.value[:, j].mean()) for j, site in enumerate(panel.sites) if known[j]}
    worst = (min if higher else max)(by_site, key=lambda site: by_site[site]) if by_site else None
    runs = zip(panel.runs, per_run(panel, known, "mean", higher), strict=True) if known.any() else ()
    return {
        "mean": _within(ends, estimate(panel, higher_is_better=higher)),
        "worst": _within(ends, estimate(panel, of="worst", higher_is_better=higher)),
        "worst_site": worst,
        "by_site": by_site,
        "by_run": {run: float(value) for run, value in runs},
        "by_run_and_site": {
            run: {site: float(v) for site, v in zip(panel.sites, row, strict=True) if v == v}
            for run, row in zip(panel.runs, panel.value, strict=True)
        },
    }


def _within(ends: tuple[float, float], one: Estimate) -> dict[str, Any]:
    """Return an estimate whose interval ends where its metric does; NaN stays NaN."""
    low, high = np.clip([one.low, one.high], *ends)
    return {**asdict(one), "low": float(low), "high": float(high)}


def _share(by_run: Mapping[str, float], yardstick: Mapping[str, float]) -> float:
    """Return a value over the yardstick's, on the runs that both have; NaN where there are none."""
    common = [run for run in by_run if run in yardstick]
    reached = sum(yardstick[run] for run in common)
    return sum(by_run[run] for run in common) / reached if reached else math.nan


def _judged(made: Mapping[str, Estimate], higher: bool) -> dict[str, Any]:
    corrected = holm({name: one.p for name, one in made.items()})
    return {
        name: {**asdict(one), "p_holm": corrected[name], "verdict": verdict(one.value, corrected[name], higher)}
        for name, one in made.items()
    }


def _about(study: Study, name: str, done: Sequence[Cell], split: Split) -> dict[str, Any]:
    mine = [cell for cell in done if cell.variant == name]
    judged = {cell.state["judged"][split]["by"] for cell in mine}
    return {
        "about": study.variants[name].about,
        "cells": len(mine),
        "tried": study.tuning.get(name),
        "judged": "own" if judged == {"own"} else "global" if judged else None,
    }


def _costs(study: Study, name: str, done: Sequence[Cell]) -> dict[str, float | None]:
    """Return the mean cost of a variant's cells; ``None`` where some cell does not know it."""
    higher = higher_is_better(study.metrics[0])
    yard = {cell.run: cell for cell in done if cell.variant == study.yardstick}
    found = [measures(cell, study.metrics[0], yard.get(cell.run), higher) for cell in done if cell.variant == name]
    return {key: _mean([one[key] for one in found]) for key in found[0]}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _remarks(
    study: Study,
    cells: Sequence[Cell],
    done: Sequence[Cell],
    names: Sequence[str],
    panels: Panels | None,
    codes: Sequence[str],
) -> list[str]:
    """Return what a reader has to know before believing the table."""
    found = []
    if len(done) < len(cells):
        found.append(f"{len(cells) - len(done)} of {len(cells)} trainings are not finished.")
    if len(codes) > 1:
        found.append(f"The trainings were run by {len(codes)} versions of the code.")
    elif codes and codes[0] != code_version():
        found.append("The trainings were run by an earlier version of the code.")
    runs = len(panels.runs) if panels else 0
    if runs == 1:
        found.append("There is one run: the intervals know of other patients, not of other seeds.")
    elif 1 < runs < 5:
        found.append(f"There are {runs} runs; with fewer than five, what the seeds contribute is rough.")
    tried = {name: study.tuning.get(name) for name in names}
    if any(n is None for n in tried.values()):
        found.append("It is not said for every variant how many settings were tried on validation images.")
    elif len(set(tried.values())) > 1:
        found.append("Not every variant had the same number of settings tried on validation images.")
    found += same_start(done)
    found += paired(panels, names) if panels else []
    return found


def write_json_report(comparison: Mapping[str, Any], file: Path) -> None:
    """Write a comparison as JSON, NaN as null."""
    write_json(_plain(comparison), file)


def write_csv(comparison: Mapping[str, Any], file: Path) -> None:
    """Write a row a metric and variant: value, worst site, difference from the reference, verdict."""
    columns = ["metric", "variant", "judged", "runs", "mean", "mean_low", "mean_high", "share", "worst_site", "worst"]
    columns += ["difference", "low", "high", "p", "p_holm", "verdict"]
    columns += ["worst_difference", "worst_low", "worst_high", "worst_verdict"]
    with whole(file) as part, part.open("w", newline="") as out:
        writer = csv.DictWriter(out, columns)
        writer.writeheader()
        for metric, told in comparison["metrics"].items():
            for name, value in told["values"].items():
                writer.writerow(_plain(_csv_row(comparison, metric, name, value, told["differences"].get(name, {}))))


def _csv_row(
    comparison: Mapping[str, Any], metric: str, name: str, value: Mapping[str, Any], difference: Mapping[str, Any]
) -> dict[str, Any]:
    mean, worst = difference.get("mean", {}), difference.get("worst", {})
    return {
        "metric": metric,
        "variant": name,
        "judged": comparison["variants"][name]["judged"],
        "runs": len(value["by_run"]),
        "mean": value["mean"]["value"],
        "mean_low": value["mean"]["low"],
        "mean_high": value["mean"]["high"],
        "share": value["share"],
        "worst_site": value["worst_site"],
        "worst": value["worst"]["value"],
        "difference": mean.get("value"),
        **{key: mean.get(key) for key in ("low", "high", "p", "p_holm", "verdict")},
        **{f"worst_{to}": worst.get(key) for to, key in (("difference", "value"), ("low", "low"), ("high", "high"))},
        "worst_verdict": worst.get("verdict"),
    }


def _plain(value: Any) -> Any:
    """Return plain containers with ``None`` for NaN and infinity."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
