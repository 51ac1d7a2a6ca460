"""HTML page of a federation report: data, scores, drift, weights, cost and privacy of the sites."""

from __future__ import annotations

import math
from typing import Any

from callbacks.reports.federation_summary import FederationSummary, gains, site_scores, site_values
from callbacks.reports.federation_updates import alignment, cost, drift, privacy, shares
from callbacks.reports.federation_warnings import warnings_of
from callbacks.reports.round_curves import Panel, lines_by_site, round_figure
from mtmedformer.plots.gains import gain_figure, signed
from mtmedformer.plots.html import (
    Html,
    ShadedCell,
    details,
    duration,
    facts,
    figure,
    join,
    number,
    page,
    paragraph,
    points,
    size_of,
    table,
    tiles,
)


def federation_page(summary: FederationSummary) -> str:
    """Return the whole page."""
    state = summary.state
    if summary.reason and state != "finished":
        state += f": {summary.reason}"
    subtitle = f"{len(summary.history)} of {summary.rounds} rounds · {summary.aggregator.name} · {state}"
    sections = [
        ("Sites and labels", _sites(summary)),
        ("Scores", _scores(summary)),
        ("Who gained", _gains(summary)),
        ("Faults", _faults(summary)),
        ("Drift", drift(summary.history)),
        ("Weight of each site", shares(summary.history)),
        ("Alignment of units", alignment(summary.history)),
        ("Time and traffic", cost(summary.history)),
        ("Data sent by each site", privacy(summary)),
        ("Run", _run(summary)),
    ]
    title = f"Federation of {len(summary.sites)} site{'s' if len(summary.sites) != 1 else ''}"
    return page(title, subtitle, sections, _overview(summary))


def _overview(summary: FederationSummary) -> Html:
    if not summary.history:
        return paragraph("No round was completed; only the data of the sites are reported.", "warn")
    reported, best = summary.reported_round(), summary.best_round()
    scores, pooled = site_scores(reported), summary.pooled_scores()
    worst = min(scores, key=lambda site: scores[site], default=None)
    sent = sum(site.bytes for entry in summary.history for site in entry.sites.values())
    boxes = [(f"{len(summary.history)} of {summary.rounds}", "rounds")]
    if best is not None:
        boxes.append((number(pooled[best]), f"best score, round {best + 1}"))
    if worst:
        boxes.append((number(scores[worst]), f"worst site in that round: {worst}"))
    boxes += [
        (size_of(sent), "sent by all sites"),
        (duration(sum(entry.seconds for entry in summary.history)), "training and merging"),
        (str(sum(len(entry.faults) for entry in summary.history)), "faults"),
    ]
    sentences = []
    if worst and len(scores) > 1:
        top = max(scores, key=lambda site: scores[site])
        sentences.append(
            f"After round {reported.round + 1} the score is highest at {top} ({number(scores[top])}) and lowest at "
            f"{worst} ({number(scores[worst])}). The score is the mean of the tasks' main metrics, from 0 to 1, on the "
            "validation images of the sites."
        )
        if len({tuple(count > 0 for count in site.labels.values()) for site in summary.sites}) > 1:
            sentences.append("Sites have labels for different tasks: compare them per task (below), not by the score.")
    last = next(reversed(pooled.values()), math.nan)
    if best is not None and last < pooled[best] - 0.02:
        sentences.append(
            f"Later rounds have a lower score, the last one {number(last)}; best.ckpt holds round {best + 1}."
        )
    return join(tiles(boxes), *sentences, *(paragraph(text, "warn") for text in warnings_of(summary)))


def _sites(summary: FederationSummary) -> Html:
    sites = summary.sites
    tasks = list(sites[0].labels) if sites else []
    most = max((site.images for site in sites), default=0) or 1
    rows = []
    for site in sites:
        cells = [ShadedCell(site.labels[task] or "none", site.labels[task] / most) for task in tasks]
        rows.append([site.site, site.patients, site.images, *cells, site.validation])
    missing = {site.site: ", ".join(task for task in tasks if not site.labels[task]) for site in sites}
    sentences = [f"{site} has no labels for {names}" for site, names in missing.items() if names]
    few = 0 < len(sentences) <= 12
    text = f"{'; '.join(sentences)}. Images without a label count as unknown, not as negative." if few else ""
    columns = ["site", "patients", "training images", *tasks, "validation images"]
    return join(table(rows, columns, "Labelled training images by site and task"), paragraph(text, "note"))


def score_panels(summary: FederationSummary) -> list[Panel]:
    """Return the curves of the score and of each task's main metric over the rounds, without empty panels."""
    panels = [Panel("score", lines_by_site(summary.history, site_scores), summary.pooled_scores())]
    for task, metric in summary.primary.items():
        pooled = {r: metrics.get(f"val/{task}/{metric}", math.nan) for r, metrics in summary.pooled.items()}
        lines = lines_by_site(summary.history, lambda entry, t=task, m=metric: site_values(entry, t, m))  # type: ignore[misc]
        panels.append(Panel(f"{task}: {metric}", lines, pooled))
    panels = [Panel(one.title, one.sites, {r: v for r, v in one.overall.items() if v == v}) for one in panels]
    return [panel for panel in panels if panel.sites or (panel.overall and panel.title != "score")]


def _scores(summary: FederationSummary) -> Html:
    panels = score_panels(summary)
    if not panels or not summary.history:
        return paragraph("No site has validation images; the performance of the model is unknown.")
    own = any(site.metrics for entry in summary.history for site in entry.sites.values())
    model = "the site's own model" if own else "the global model"
    text = f"Validation images of each site after every round, by {model}; the thick line is all sites together."
    return join(
        figure(round_figure(panels, "all sites together"), text, "Validation scores by round, one line per site"),
        _score_table(summary),
        details("All metrics of the last round, by site", _metric_table(summary)),
    )


def _gains(summary: FederationSummary) -> Html:
    """Return the difference of the merged model from each site's own model, as bars and a table."""
    if not summary.history:
        return Html("")
    entry = summary.reported_round()
    found = {f"{task}: {metric}": gains(entry, task, metric) for task, metric in summary.primary.items()}
    by_task = {title: dict(sorted(values.items())) for title, values in found.items() if values}
    drawn = gain_figure(by_task, "merged model minus the site's own model")
    if drawn is None:
        return Html("")
    sites = sorted({site for values in by_task.values() for site in values})
    rows = [[site, *(signed(v[site]) if site in v else None for v in by_task.values())] for site in sites]
    text = (
        f"Round {entry.round + 1}: the merged model minus the site's own model after its local training and before the "
        "merge, both on the site's validation images. Above zero the site gained by the federation. Few images make "
        "large differences by chance."
    )
    return join(
        paragraph(text, "note"),
        figure(drawn, "", "Difference of the merged model from each site's own model, by site and task"),
        table(rows, ["site", *by_task]),
    )


def _score_table(summary: FederationSummary) -> Html:
    entry, best = summary.reported_round(), summary.best_round()
    scores = site_scores(entry)
    worst = min(scores, key=lambda site: scores[site], default=None)
    columns = [f"{task}: {metric}" for task, metric in summary.primary.items()]
    rows: list[list[Any]] = []
    for site in [holding.site for holding in summary.sites] or sorted(scores):
        cells = [site_values(entry, task, metric).get(site) for task, metric in summary.primary.items()]
        rows.append([site, scores.get(site), *cells, "worst" if site == worst and len(scores) > 1 else ""])
    if best is not None:
        metrics = summary.pooled[best]
        values = [metrics.get(f"val/{task}/{metric}") for task, metric in summary.primary.items()]
        rows.append(["all together", metrics["val/score"], *values, ""])
    kind = "the best round" if best is not None else "the last round"
    return table(rows, ["site", "score", *columns, ""], f"After round {entry.round + 1}, {kind}")


def _metric_table(summary: FederationSummary) -> Html:
    by_metric: dict[str, dict[str, float]] = {}
    for key, value in summary.history[-1].validation.items():
        name, _, site = key.removeprefix("val/").partition("/site=")
        if site:
            by_metric.setdefault(name, {})[site] = value
    sites = sorted({site for values in by_metric.values() for site in values})
    return table([[name, *(values.get(s) for s in sites)] for name, values in by_metric.items()], ["metric", *sites])


def _faults(summary: FederationSummary) -> Html:
    rows = [
        [entry.round + 1, fault.site, fault.fault, fault.action] for entry in summary.history for fault in entry.faults
    ]
    reason = f": {summary.reason}" if summary.reason else ""
    ended = "" if summary.state == "finished" else paragraph(f"The run is {summary.state}{reason}.", "warn")
    if rows:
        return join(ended, table(rows, ["round", "site", "fault", "action"]))
    return join(ended, "Every selected site delivered an update in every round.") if summary.history else Html(ended)


def _run(summary: FederationSummary) -> Html:
    options = dict(summary.options) | dict(summary.aggregator.options)
    return join(
        facts({"aggregator": summary.aggregator.name, "seed": summary.seed or "not set", **summary.versions}),
        details("Options of the federation and its aggregator", points(f"{k}: {v}" for k, v in options.items())),
        paragraph(
            "config.yaml in the same folder is the whole configuration, report.json has all numbers of this page, and "
            "checkpoints/best.ckpt is the model of the best round, for test and predict.",
            "note",
        ),
    )
