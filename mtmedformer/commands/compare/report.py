"""``comparison.html``: the metrics, differences, pairs and costs of a study, its limits and its method."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from mtmedformer.commands.compare.comparison import Comparison, Difference, MetricComparison
from mtmedformer.commands.compare.plots import dots, forest, site_gains
from mtmedformer.plots import html
from mtmedformer.plots.html import Html

METHOD = (
    "All variants were trained with the same seeds on the same images for the same budget, and evaluated on the same "
    "images. A difference compares two variants on the same runs and the same patients. Its 95 % interval comes from "
    "resampling the patients within each site and the runs, with Satterthwaite's degrees of freedom, and holds for "
    "these sites. A verdict requires a p-value below 0.05 after Holm's correction for the number of differences of "
    "its kind. 'No difference shown' does not mean that there is none."
)

COSTS = {
    "weights": "weights",
    "seconds": "seconds of training",
    "processor_seconds": "processor seconds",
    "rounds": "rounds",
    "bytes": "MB sent by sites",
    "bytes_down": "MB sent to sites",
    "rounds_to_95": "rounds to 95 %",
    "bytes_to_95": "MB to 95 %",
    "seconds_to_95": "seconds to 95 %",
}


def render(comparison: Comparison) -> str:
    """Return the HTML page of a comparison."""
    sections = [
        (f"{'Deciding metric: ' if i == 0 else ''}{name}", _metric(comparison, name, i == 0))
        for i, name in enumerate(comparison.metrics)
    ]
    sections += [
        ("Costs", _costs(comparison)),
        ("Limits of this comparison", html.points(comparison.remarks)),
        ("Method", _method(comparison)),
    ]
    form = f", {comparison.form} form" if comparison.form else ""
    subtitle = comparison.question or "A comparison of variants"
    return html.page(f"{comparison.study}{form}", subtitle, sections, _summary(comparison))


def _summary(comparison: Comparison) -> Html:
    if not comparison.metrics:
        return html.paragraph("No training is finished yet.")
    name, metric = next(iter(comparison.metrics.items()))
    sign = 1 if metric.higher_is_better else -1
    known = {n: value.mean.value for n, value in metric.values.items() if math.isfinite(value.mean.value)}
    best = max(known, key=lambda n: sign * known[n]) if known else "–"
    tiles = [
        (f"{comparison.trainings.finished} of {comparison.trainings.all}", "trainings finished"),
        (str(len(comparison.runs)), "runs of every variant"),
        (str(sum(comparison.patients.values())), f"patients at {len(comparison.patients)} sites"),
        (best, f"highest {name}" if sign > 0 else f"lowest {name}"),
    ]
    return html.join(html.tiles(tiles), *_sentences(comparison, metric))


def _sentences(comparison: Comparison, metric: MetricComparison) -> list[str]:
    """Return one sentence per verdict with its variants, for the deciding metric."""
    by_verdict: dict[str, list[str]] = {}
    for name, difference in metric.differences.items():
        by_verdict.setdefault(difference["mean"].verdict, []).append(name)
    reference = comparison.reference
    words = {
        "better": f"Better than {reference}: {{}}.",
        "worse": f"Worse than {reference}: {{}}.",
        "no difference shown": f"No difference from {reference} shown: {{}}.",
        "not determined": f"Difference from {reference} not determined: {{}}.",
    }
    return [words[verdict].format(", ".join(names)) for verdict, names in sorted(by_verdict.items())]


def _metric(comparison: Comparison, name: str, deciding: bool) -> Html:
    metric = comparison.metrics[name]
    direction = "more is better" if metric.higher_is_better else "less is better"
    parts = [html.table(_rows(comparison, metric), _columns(comparison, metric), f"{name}; {direction}")]
    if metric.differences:
        parts.append(
            html.figure(
                forest(metric, name, comparison.reference),
                "Differences with 95 % intervals; the colour is the verdict after Holm's correction.",
                f"Differences of {name} from {comparison.reference}",
            )
        )
    parts.append(html.figure(dots(metric, name), "", f"{name} of every run at every site"))
    if drawn := site_gains(metric, name, comparison.reference):
        parts.append(html.figure(drawn, "Mean over the runs.", f"Difference of {name} at each site"))
    columns = ["row minus column", *list(metric.values)[1:]]
    pairs = html.table(_pairs(metric), columns, "* significant after correction for all pairs")
    parts.append(html.join(html.heading("Every pair"), pairs) if deciding else html.details("Every pair", pairs))
    return html.join(*parts)


def _columns(comparison: Comparison, metric: MetricComparison) -> list[str]:
    share = [f"share of {comparison.yardstick}"] if _has_shares(metric) else []
    difference = f"difference from {comparison.reference}"
    return ["variant", "mean", *share, "worst site", difference, "p (Holm)", "verdict", "at the worst site"]


def _has_shares(metric: MetricComparison) -> bool:
    """Return whether the values can be given as shares of the yardstick's."""
    return any(math.isfinite(value.share) for value in metric.values.values())


def _rows(comparison: Comparison, metric: MetricComparison) -> list[list[Any]]:
    rows = []
    for name, value in metric.values.items():
        difference = metric.differences.get(name, {})
        mean, worst = difference.get("mean"), difference.get("worst")
        mark = " (sites' own models)" if comparison.variants[name].evaluated == "own" else ""
        site = f" {value.worst_site}" if value.worst_site and len(value.by_site) > 1 else ""
        rows.append(
            [
                f"{name}{mark}",
                value.mean.value,
                *([f"{value.share:.1%}" if math.isfinite(value.share) else "–"] if _has_shares(metric) else []),
                f"{html.number(value.worst.value)}{site}",
                _interval(mean) if mean else "–",
                _p(mean.p_holm) if mean else "–",
                mean.verdict if mean else "reference",
                f"{_interval(worst)}, {worst.verdict}" if worst else "",
            ]
        )
    return rows


def _pairs(metric: MetricComparison) -> list[list[str]]:
    names = list(metric.values)
    rows = []
    for i, a in enumerate(names[:-1]):
        cells = []
        for j, b in enumerate(names[1:], start=1):
            one = metric.pairs.get(f"{a}|{b}") if j > i else None
            star = " *" if one and one.verdict in ("better", "worse") else ""
            cells.append("" if one is None or not math.isfinite(one.value) else f"{one.value:+.3f}{star}")
        rows.append([a, *cells])
    return rows


def _costs(comparison: Comparison) -> Html:
    costs = {name: asdict(one) for name, one in comparison.costs.items()}
    shown = [key for key in COSTS if any(cost[key] is not None for cost in costs.values())]
    rows = [[name, *(_cost(key, cost[key]) for key in shown)] for name, cost in costs.items()]
    note = (
        "To 95 %: until the deciding metric on validation images reached 95 % of the last value of "
        f"{comparison.yardstick}."
        if comparison.yardstick
        else ""
    )
    return html.join(html.table(rows, ["variant", *(COSTS[key] for key in shown)], digits=1), note)


def _cost(key: str, value: float | None) -> float | None:
    if value is None:
        return None
    if key.startswith("bytes"):
        return value / 1e6
    return round(value) if key == "weights" else value


def _method(comparison: Comparison) -> Html:
    variants = comparison.variants.items()
    tried = {f"settings tried: {name}": one.tried for name, one in variants if one.tried is not None}
    about = {name: one.about for name, one in variants if one.about}
    facts = {
        "evaluated on": {"test": "test images", "val": "validation images"}[comparison.split],
        "weights": f"the {comparison.checkpoint} of each training",
        "means over": comparison.average,
        "runs": ", ".join(comparison.runs) or "none",
        "patients": ", ".join(f"{site} {n}" for site, n in comparison.patients.items()) or "none",
        "resamples": comparison.replicates,
        "code": ", ".join(code[:12] for code in comparison.code) or "–",
    }
    return html.join(METHOD, html.facts(facts), html.facts(about), html.facts(tried))


def _interval(difference: Difference) -> str:
    """Return a difference with its interval as text."""
    if not math.isfinite(difference.value):
        return "–"
    low, high = html.number(difference.low), html.number(difference.high)
    return f"{html.number(difference.value)}{f' ({low} to {high})' if math.isfinite(difference.low) else ''}"


def _p(value: float) -> str:
    if not math.isfinite(value):
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
