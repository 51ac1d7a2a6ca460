"""``comparison.html``: the table, the differences, the pairs, the costs, and what speaks against believing them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

METHOD = (
    "Every variant was trained with the same seeds on the same images for the same budget, and judged on the same "
    "images. A difference is that of two variants on the same runs and the same patients. Its interval (95 %) comes "
    "from resampling patients within sites and runs, with Satterthwaite's degrees of freedom, and holds for these "
    "sites. "
    "A verdict needs a p-value below 0.05 after Holm's correction for the number of differences of its kind; "
    "'no difference shown' does not mean that there is none."
)

COSTS = {
    "weights": "weights",
    "seconds": "seconds of training",
    "processor_seconds": "of a processor",
    "rounds": "rounds",
    "bytes": "MB sent by sites",
    "bytes_down": "MB sent to sites",
    "rounds_to_95": "rounds to 95 %",
    "bytes_to_95": "MB to 95 %",
    "seconds_to_95": "seconds to 95 %",
}


def render(comparison: Mapping[str, Any]) -> str:
    """Return the page of a comparison."""
    from mtmedformer.plots import html as page

    metrics = comparison["metrics"]
    sections = [
        (f"{'Deciding metric: ' if i == 0 else ''}{name}", _metric(comparison, name, i == 0, page))
        for i, name in enumerate(metrics)
    ]
    sections += [
        ("Costs", _costs(comparison, page)),
        ("Before believing this", page.points(comparison["remarks"])),
        ("How it was done", _method(comparison, page)),
    ]
    form = f", {comparison['form']} form" if comparison["form"] else ""
    subtitle = comparison["question"] or "A comparison of variants"
    return page.page(f"{comparison['study']}{form}", subtitle, sections, _summary(comparison, page))


def _summary(comparison: Mapping[str, Any], page: Any) -> Any:
    metrics = comparison["metrics"]
    if not metrics:
        return page.paragraph("No training is finished yet.")
    name = next(iter(metrics))
    values = metrics[name]["values"]
    sign = 1 if metrics[name]["higher_is_better"] else -1
    known = {n: v["mean"]["value"] for n, v in values.items() if math.isfinite(v["mean"]["value"])}
    best = max(known, key=lambda n: sign * known[n]) if known else "–"
    cells, patients = comparison["cells"], sum(comparison["patients"].values())
    tiles = [
        (f"{cells['finished']} of {cells['all']}", "trainings finished"),
        (str(len(comparison["runs"])), "runs of every variant"),
        (str(patients), f"patients at {len(comparison['patients'])} sites"),
        (best, f"highest {name}" if sign > 0 else f"lowest {name}"),
    ]
    return page.join(page.tiles(tiles), *_sentences(comparison, name))


def _sentences(comparison: Mapping[str, Any], metric: str) -> list[str]:
    """Say in words what the deciding metric has shown."""
    told, reference = comparison["metrics"][metric]["differences"], comparison["reference"]
    by_verdict: dict[str, list[str]] = {}
    for name, one in told.items():
        by_verdict.setdefault(one["mean"]["verdict"], []).append(name)
    words = {
        "better": f"Better than {reference}: {{}}.",
        "worse": f"Worse than {reference}: {{}}.",
        "no difference shown": f"No difference from {reference} shown: {{}}.",
        "cannot be said": f"Nothing can be said of {{}} against {reference}.",
    }
    return [words[v].format(", ".join(names)) for v, names in sorted(by_verdict.items())]


def _metric(comparison: Mapping[str, Any], name: str, deciding: bool, page: Any) -> Any:
    from mtmedformer.commands.compare.plots import dots, forest
    from mtmedformer.plots import style

    told, reference = comparison["metrics"][name], comparison["reference"]
    direction = "more is better" if told["higher_is_better"] else "less is better"
    parts = [page.table(_rows(comparison, told, page), _columns(comparison, told), f"{name}; {direction}")]
    if told["differences"]:
        drawing = forest(told, name, reference, style.STYLE, style.INK)
        parts.append(
            page.figure(
                drawing,
                "Differences with 95 % intervals; colour: verdict after Holm's correction.",
                f"Differences of {name} from {reference}",
            )
        )
    drawing = dots(told, name, style.COLOURS, style.STYLE, style.INK)
    parts.append(page.figure(drawing, "", f"{name} of every run at every site"))
    pairs = page.table(
        _pairs(told), ["row minus column", *list(told["values"])[1:]], "* after correction for all pairs"
    )
    parts.append(page.join(page.heading("Every pair"), pairs) if deciding else page.details("Every pair", pairs))
    return page.join(*parts)


def _columns(comparison: Mapping[str, Any], told: Mapping[str, Any]) -> list[str]:
    share = [f"of {comparison['yardstick']}"] if _measured(told) else []
    difference = f"difference from {comparison['reference']}"
    return ["variant", "mean", *share, "worst site", difference, "p (Holm)", "verdict", "at the worst site"]


def _measured(told: Mapping[str, Any]) -> bool:
    """Return whether a metric has a yardstick's value to be measured by."""
    return any(math.isfinite(value["share"]) for value in told["values"].values())


def _rows(comparison: Mapping[str, Any], told: Mapping[str, Any], page: Any) -> list[list[Any]]:
    rows = []
    for name, value in told["values"].items():
        difference = told["differences"].get(name, {})
        mean, worst = difference.get("mean", {}), difference.get("worst", {})
        mark = " (sites' own models)" if comparison["variants"][name]["judged"] == "own" else ""
        site = f" {value['worst_site']}" if value["worst_site"] and len(value["by_site"]) > 1 else ""
        rows.append(
            [
                f"{name}{mark}",
                value["mean"]["value"],
                *([f"{value['share']:.1%}" if math.isfinite(value["share"]) else "–"] if _measured(told) else []),
                f"{page.number(value['worst']['value'])}{site}",
                _interval(mean, page),
                _p(mean.get("p_holm")),
                mean.get("verdict", "reference"),
                ", ".join(filter(None, (_interval(worst, page) if worst else "", worst.get("verdict", "")))),
            ]
        )
    return rows


def _pairs(told: Mapping[str, Any]) -> list[list[str]]:
    names = list(told["values"])
    rows = []
    for i, a in enumerate(names[:-1]):
        cells = []
        for j, b in enumerate(names[1:], start=1):
            one = told["pairs"].get(f"{a}|{b}") if j > i else None
            star = " *" if one and one["verdict"] in ("better", "worse") else ""
            cells.append("" if one is None or not math.isfinite(one["value"]) else f"{one['value']:+.3f}{star}")
        rows.append([a, *cells])
    return rows


def _costs(comparison: Mapping[str, Any], page: Any) -> Any:
    costs = comparison["costs"]
    shown = [key for key in COSTS if any(cost[key] is not None for cost in costs.values())]
    rows = [[name, *(_cost(key, cost[key]) for key in shown)] for name, cost in costs.items()]
    note = ""
    if comparison["yardstick"]:
        note = (
            f"'To 95 %': until the deciding metric on validation images was 95 % of {comparison['yardstick']}'s last."
        )
    return page.join(page.table(rows, ["variant", *(COSTS[key] for key in shown)], digits=1), note)


def _cost(key: str, value: float | None) -> Any:
    if value is None:
        return None
    if key.startswith("bytes"):
        return value / 1e6
    return round(value) if key == "weights" else value


def _method(comparison: Mapping[str, Any], page: Any) -> Any:
    tried = {f"settings tried: {n}": v["tried"] for n, v in comparison["variants"].items() if v["tried"] is not None}
    about = {n: v["about"] for n, v in comparison["variants"].items() if v["about"]}
    facts = {
        "judged on": {"test": "test images", "val": "validation images"}[comparison["split"]],
        "weights judged": f"the {comparison['checkpoint']}",
        "means over": comparison["average"],
        "runs": ", ".join(comparison["runs"]) or "none",
        "patients": ", ".join(f"{site} {n}" for site, n in comparison["patients"].items()) or "none",
        "resamples": comparison["replicates"],
        "code": ", ".join(code[:12] for code in comparison["code"]) or "–",
    }
    return page.join(METHOD, page.facts(facts), page.facts(about), page.facts(tried))


def _interval(told: Mapping[str, Any], page: Any) -> str:
    """Return a difference with its interval."""
    if not told or not math.isfinite(told["value"]):
        return "–"
    low, high = told["low"], told["high"]
    between = f" ({page.number(low)} to {page.number(high)})" if math.isfinite(low) else ""
    return f"{page.number(told['value'])}{between}"


def _p(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
