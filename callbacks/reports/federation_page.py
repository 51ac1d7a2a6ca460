"""Draws the report of a federation from its facts: who holds what, who gained, who pulled apart, what it cost."""

from __future__ import annotations

from typing import Any

from callbacks.reports.federation_updates import cost, drift, moved, privacy, shares
from callbacks.reports.round_curves import Panel, by_site, curves, line_of
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

Facts = dict[str, Any]


def federation_page(told: Facts) -> str:
    """Return the whole page.

    Args:
        told: What ``report.json`` holds.
    """
    asked, done = told["rounds"]["asked"], told["rounds"]["done"]
    state, reason = told["state"]["state"], told["state"]["reason"]
    how = f"{state}: {reason}" if reason and state != "finished" else state
    subtitle = f"{done} of {asked} rounds · {told['aggregator']['class']} · {how}"
    sections = [
        ("Sites and labels", _matrix(told)),
        ("Scores", _scores(told)),
        ("Faults", _faults(told)),
        ("Drift", drift(told)),
        ("Weight of each site", shares(told)),
        ("Units moved", moved(told)),
        ("Time and traffic", cost(told)),
        ("What left each site", privacy(told)),
        ("Run", _run(told)),
    ]
    title = f"Federation of {len(told['sites'])} site{'s' if len(told['sites']) != 1 else ''}"
    return page(title, subtitle, sections, _summary(told))


def best_round(told: Facts) -> Facts | None:
    """Return the round with the best pooled score, as ``{"round": …, "metrics": …}``."""
    scored = [entry for entry in told["pooled"] if entry["metrics"].get("val/score") is not None]
    return max(scored, key=lambda entry: entry["metrics"]["val/score"]) if scored else None


def site_scores(entry: Facts) -> dict[str, float]:
    """Return each site's score in a round, mean of its tasks' primary metrics: of the model the site would use."""
    said = {key.removeprefix("site/"): value for key, value in _validation(entry).items() if key.startswith("site/")}
    found = {key.removesuffix("/val/score"): value for key, value in said.items() if key.endswith("/val/score")}
    own = {site: told.get("metrics", {}).get("score") for site, told in entry["sites"].items()}
    own = {site: score for site, score in own.items() if score is not None}
    return found | own


def _summary(told: Facts) -> Html:
    history, best = told["history"], best_round(told)
    if not history:
        return paragraph("No round was completed; there is nothing to report but what the sites hold.", "warn")
    at = _entry(told, best["round"]) if best else history[-1]
    scores = site_scores(at)
    worst = min(scores, key=lambda site: scores[site], default=None)
    sent = sum(one.get("bytes", 0) for entry in history for one in entry["sites"].values())
    faults = sum(len(entry.get("faults", [])) for entry in history)
    boxes = [(f"{told['rounds']['done']} of {told['rounds']['asked']}", "rounds")]
    if best:
        boxes.append((number(best["metrics"]["val/score"]), f"best score, round {best['round'] + 1}"))
    if worst:
        boxes.append((number(scores[worst]), f"worst site then: {worst}"))
    boxes += [(size_of(sent), "sent by all sites"), (duration(_total_seconds(told)), "training and merging")]
    boxes.append((str(faults), "faults"))
    words = []
    if worst and len(scores) > 1:
        top = max(scores, key=lambda site: scores[site])
        words.append(
            f"After round {at['round'] + 1} the model does best at {top} ({number(scores[top])}) and worst at {worst} "
            f"({number(scores[worst])}). A score is the mean of the tasks' main metrics, from 0 to 1, on images that "
            "the sites kept for validation."
        )
        if len({tuple(site["labels"][t] > 0 for t in site["labels"]) for site in told["sites"]}) > 1:
            words.append(
                "Sites have labels for different tasks: compare them task by task, below, rather than by score."
            )
    last = told["pooled"][-1]["metrics"].get("val/score") if told["pooled"] else None
    if best and last is not None and last < best["metrics"]["val/score"] - 0.02:
        words.append(f"Later rounds did worse, the last one {number(last)}; best.ckpt holds round {best['round'] + 1}.")
    return join(tiles(boxes), *words)


def _matrix(told: Facts) -> Html:
    sites = told["sites"]
    tasks = list(sites[0]["labels"]) if sites else []
    most = max((site["images"] for site in sites), default=0) or 1
    rows = []
    for site in sites:
        cells = [ShadedCell(site["labels"][t] or "none", site["labels"][t] / most) for t in tasks]
        rows.append([site["site"], site["patients"], site["images"], *cells, site["validation"]])
    without = {s["site"]: ", ".join(t for t in tasks if not s["labels"][t]) for s in sites}
    said = [f"{site} has no labels for {names}" for site, names in without.items() if names]
    text = f"{'; '.join(said)}. What is not labelled is unknown, never negative." if 0 < len(said) <= 12 else ""
    columns = ["site", "patients", "training images", *tasks, "validation images"]
    return join(table(rows, columns, "Training images with labels, by site and task"), paragraph(text, "note"))


def _scores(told: Facts) -> Html:
    history = told["history"]
    panels: list[Panel] = []
    pooled = {entry["round"]: entry["metrics"] for entry in told["pooled"]}
    score = by_site(history, site_scores)
    if any(score.values()):
        panels.append(("score", score, line_of((r, m.get("val/score")) for r, m in pooled.items())))
    for task, metric in told["primary"].items():
        lines = by_site(history, lambda entry, t=task, m=metric: _of_task(entry, t, m))  # type: ignore[misc]
        whole = line_of((r, values.get(f"val/{task}/{metric}")) for r, values in pooled.items())
        if lines or whole:
            panels.append((f"{task}: {metric}", lines, whole))
    if not panels:
        return paragraph("No site has validation images, so nothing is known of how well the model does.")
    drawn = curves(panels, "all sites together")
    own = any(one.get("metrics") for entry in history for one in entry["sites"].values())
    model = "the model the site would use" if own else "the global model"
    text = f"Each site's validation images after every round, by {model}; the thick line is all sites together."
    return join(
        figure(drawn, text, "Validation scores by round, one line a site"),
        _score_table(told),
        details("Every metric of the last round, by site", _metric_table(told)),
    )


def _score_table(told: Facts) -> Html:
    best = best_round(told)
    entry = _entry(told, best["round"]) if best else told["history"][-1]
    scores = site_scores(entry)
    worst = min(scores, key=lambda site: scores[site], default=None)
    columns = [f"{task}: {metric}" for task, metric in told["primary"].items()]
    rows: list[list[Any]] = []
    for site in [s["site"] for s in told["sites"]] or sorted(scores):
        cells = [_of_task(entry, task, metric).get(site) for task, metric in told["primary"].items()]
        rows.append([site, scores.get(site), *cells, "worst" if site == worst and len(scores) > 1 else ""])
    if best:
        values = [best["metrics"].get(f"val/{task}/{metric}") for task, metric in told["primary"].items()]
        rows.append(["all together", best["metrics"]["val/score"], *values, ""])
    return table(rows, ["site", "score", *columns, ""], f"After round {entry['round'] + 1}, the best by its score")


def _metric_table(told: Facts) -> Html:
    found: dict[str, dict[str, float]] = {}
    for key, value in _validation(told["history"][-1]).items():
        name, _, site = key.removeprefix("val/").partition("/site=")
        if site:
            found.setdefault(name, {})[site] = value
    sites = sorted({site for values in found.values() for site in values})
    return table([[name, *(values.get(s) for s in sites)] for name, values in found.items()], ["metric", *sites])


def _faults(told: Facts) -> Html:
    rows = [
        [entry["round"] + 1, fault.get("site", ""), fault.get("fault", ""), fault.get("action", "")]
        for entry in told["history"]
        for fault in entry.get("faults", [])
    ]
    state, reason = told["state"]["state"], told["state"]["reason"]
    ended = "" if state == "finished" else paragraph(f"The run is {state}{f': {reason}' if reason else ''}.", "warn")
    if not rows:
        return join(ended, "Every site that was asked delivered in every round.") if told["history"] else Html(ended)
    return join(ended, table(rows, ["round", "site", "what happened", "what was done"]))


def _run(told: Facts) -> Html:
    aggregator = told["aggregator"]
    options = [f"{name}: {value}" for name, value in (told["options"] | aggregator["options"]).items()]
    return join(
        facts({"aggregator": aggregator["class"], "seed": told["seed"] or "not set", **told["versions"]}),
        details("Options of the federation and its aggregator", points(options)),
        paragraph(
            "The whole configuration is config.yaml beside this page; every number here is in report.json; "
            "checkpoints/best.ckpt is the model of the best round, for test and predict.",
            "note",
        ),
    )


def _validation(entry: Facts) -> dict[str, float]:
    return {key: value for key, value in entry.get("validation", {}).items() if value is not None}


def _of_task(entry: Facts, task: str, metric: str) -> dict[str, float | None]:
    start = f"val/{task}/{metric}/site="
    found: dict[str, float | None] = {
        key.removeprefix(start): value for key, value in _validation(entry).items() if key.startswith(start)
    }
    own = {site: told.get("metrics", {}).get(f"{task}/{metric}") for site, told in entry["sites"].items()}
    return found | {site: value for site, value in own.items() if value is not None}


def _entry(told: Facts, round: int) -> Facts:
    found: Facts = next((e for e in told["history"] if e["round"] == round), told["history"][-1])
    return found


def _total_seconds(told: Facts) -> float:
    return float(sum(entry.get("seconds") or 0.0 for entry in told["history"]))
