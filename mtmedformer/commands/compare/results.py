"""Compare the finished trainings of a study: values, differences with intervals, verdicts, costs and remarks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace

import numpy as np

from mtmedformer.commands.compare.code_version import code_version
from mtmedformer.commands.compare.comparison import (
    Comparison,
    Costs,
    Difference,
    MetricComparison,
    TrainingCount,
    VariantSummary,
    VariantValue,
)
from mtmedformer.commands.compare.measures import costs_of, same_start
from mtmedformer.commands.compare.panels import Panels, paired
from mtmedformer.commands.compare.statistics import Estimate, MetricPanel, Summary, estimate, holm, per_run, verdict
from mtmedformer.commands.compare.study import Study, metric_words
from mtmedformer.commands.compare.trainings import Models, Split, Training
from mtmedformer.errors import ConfigError

LOWER_IS_BETTER = ("hd95", "nll", "ece", "loss", "brier", "aurc", "mae", "rmse")
SIGNED = ("gain_at80", "ccc", "kappa", "pearson")
UNBOUNDED = ("r2", "bias")
SUMMARIES: tuple[Summary, ...] = ("mean", "worst")


def higher_is_better(metric: str) -> bool:
    """Return whether more of a metric is better."""
    return not any(word.removesuffix("_raw") in LOWER_IS_BETTER for word in metric_words(metric))


def limits(metric: str) -> tuple[float, float]:
    """Return the lowest and highest possible value of a metric; a metric of which less is better has no highest."""
    words = metric_words(metric)
    lowest = -math.inf if any(word in UNBOUNDED for word in words) else -1.0 if any(w in SIGNED for w in words) else 0.0
    return lowest, 1.0 if higher_is_better(metric) else math.inf


def compare(study: Study, trainings: Sequence[Training], split: Split, replicates: int = 2000) -> Comparison:
    """Compare the finished trainings of a study.

    Args:
        study: The study.
        trainings: All its trainings.
        split: Split on whose images they were evaluated.
        replicates: Number of resamples of the intervals.
    """
    done = [training for training in trainings if training.finished(split)]
    names = [name for name in study.variants if any(training.variant == name for training in done)]
    panels = Panels(study, done, split, replicates) if done else None
    metrics, unknown = _metrics(study, names, panels) if panels else ({}, [])
    codes = sorted({training.status.code for training in done if training.status})
    return Comparison(
        study=study.name,
        question=study.question,
        form=study.form,
        split=split,
        reference=study.reference,
        yardstick=study.yardstick,
        average=study.average,
        checkpoint=study.checkpoint,
        replicates=replicates,
        runs=list(panels.runs) if panels else [],
        patients={site: len(p) for site, p in panels.patients.items()} if panels else {},
        trainings=TrainingCount(len(done), len(trainings)),
        variants={name: _summary(study, name, done, split) for name in study.variants},
        metrics=metrics,
        costs={name: _costs(study, name, done) for name in names},
        remarks=[*unknown, *_remarks(study, trainings, done, names, panels, codes)],
        code=codes,
    )


def _metrics(study: Study, names: Sequence[str], panels: Panels) -> tuple[dict[str, MetricComparison], list[str]]:
    """Compare every metric; one that does not exist becomes a remark, so that the trainings are not lost."""
    metrics, unknown = {}, []
    for metric in study.metrics:
        try:
            metrics[metric] = _metric(study, metric, names, panels)
        except ConfigError as error:
            unknown.append(str(error))
    return metrics, unknown


def _metric(study: Study, metric: str, names: Sequence[str], panels: Panels) -> MetricComparison:
    """Compare one metric: the value of each variant, its difference from the reference, and every pair."""
    higher = higher_is_better(metric)
    by_name = {name: panels.panel(name, metric) for name in names}
    values = {name: _value(panel, metric) for name, panel in by_name.items()}
    yardstick = values[study.yardstick].by_run if study.yardstick in values and higher else {}
    values = {name: replace(value, share=_share(value.by_run, yardstick)) for name, value in values.items()}
    differences: dict[str, dict[Summary, Difference]] = {}
    if study.reference in by_name:
        others = [name for name in names if name != study.reference]
        for of in SUMMARIES:
            estimates = {n: estimate(by_name[n], by_name[study.reference], of, higher) for n in others}
            for name, difference in _tested(estimates, higher).items():
                differences.setdefault(name, {})[of] = difference
    pairs = {
        f"{a}|{b}": estimate(by_name[a], by_name[b], "mean", higher)
        for i, a in enumerate(names)
        for b in names[i + 1 :]
    }
    return MetricComparison(higher, values, differences, _tested(pairs, higher))


def _value(panel: MetricPanel, metric: str) -> VariantValue:
    higher, ends = higher_is_better(metric), limits(metric)
    known = np.asarray(~np.isnan(panel.value).any(axis=0))
    by_site = {site: float(panel.value[:, j].mean()) for j, site in enumerate(panel.sites) if known[j]}
    worst = (min if higher else max)(by_site, key=lambda site: by_site[site]) if by_site else None
    runs = zip(panel.runs, per_run(panel, known, "mean", higher), strict=True) if known.any() else ()
    return VariantValue(
        mean=_within(ends, estimate(panel, higher_is_better=higher)),
        worst=_within(ends, estimate(panel, of="worst", higher_is_better=higher)),
        worst_site=worst,
        by_site=by_site,
        by_run={run: float(value) for run, value in runs},
        by_run_and_site={
            run: {site: float(v) for site, v in zip(panel.sites, row, strict=True) if v == v}
            for run, row in zip(panel.runs, panel.value, strict=True)
        },
    )


def _within(ends: tuple[float, float], one: Estimate) -> Estimate:
    """Return an estimate whose interval is clipped to the possible values of its metric; NaN stays NaN."""
    low, high = np.clip([one.low, one.high], *ends)
    return replace(one, low=float(low), high=float(high))


def _share(by_run: Mapping[str, float], yardstick: Mapping[str, float]) -> float:
    """Return a value as a share of the yardstick's, on the runs that both have; NaN if there are none."""
    common = [run for run in by_run if run in yardstick]
    total = sum(yardstick[run] for run in common)
    return sum(by_run[run] for run in common) / total if total else math.nan


def _tested(estimates: Mapping[str, Estimate], higher: bool) -> dict[str, Difference]:
    """Correct the p-values of several differences for their number, and add the verdicts."""
    corrected = holm({name: one.p for name, one in estimates.items()})
    return {
        name: Difference(**asdict(one), p_holm=corrected[name], verdict=verdict(one.value, corrected[name], higher))
        for name, one in estimates.items()
    }


def _summary(study: Study, name: str, done: Sequence[Training], split: Split) -> VariantSummary:
    own = [training.status for training in done if training.variant == name]
    models = {status.evaluated[split].models for status in own if status}
    evaluated: Models | None = None if not models else "own" if models == {"own"} else "global"
    return VariantSummary(study.variants[name].about, len(own), study.tuning.get(name), evaluated)


def _costs(study: Study, name: str, done: Sequence[Training]) -> Costs:
    """Return the mean costs of a variant's trainings; ``None`` where the cost of some training is not known."""
    higher = higher_is_better(study.metrics[0])
    yardsticks = {training.run: training for training in done if training.variant == study.yardstick}
    costs = [costs_of(one, study.metrics[0], yardsticks.get(one.run), higher) for one in done if one.variant == name]
    return Costs(*(_mean([asdict(one)[key.name] for one in costs]) for key in fields(Costs)))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _remarks(
    study: Study,
    trainings: Sequence[Training],
    done: Sequence[Training],
    names: Sequence[str],
    panels: Panels | None,
    codes: Sequence[str],
) -> list[str]:
    """Return the limits of the comparison, one sentence per limit."""
    remarks = []
    if len(done) < len(trainings):
        remarks.append(f"{len(trainings) - len(done)} of {len(trainings)} trainings are not finished.")
    if len(codes) > 1:
        remarks.append(f"The trainings were run by {len(codes)} versions of the code.")
    elif codes and codes[0] != code_version():
        remarks.append("The trainings were run by an earlier version of the code.")
    runs = len(panels.runs) if panels else 0
    if runs == 1:
        remarks.append("There is one run: the intervals cover other patients, but not other seeds.")
    elif 1 < runs < 5:
        remarks.append(f"There are {runs} runs; with fewer than five, the variance between seeds is a rough estimate.")
    tried = {name: study.tuning.get(name) for name in names}
    if any(n is None for n in tried.values()):
        remarks.append("The study does not state for every variant how many settings were tried on validation images.")
    elif len(set(tried.values())) > 1:
        remarks.append("The number of settings tried on validation images differs between the variants.")
    remarks += same_start(done)
    remarks += paired(panels, names) if panels else []
    return remarks
