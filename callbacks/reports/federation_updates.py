"""Sections on the updates of a federation: where sites pull, how much they say, what leaves them and what it costs."""

from __future__ import annotations

import math
from typing import Any

from callbacks.reports.round_curves import Panel, by_site, curves, line_of
from mtmedformer.plots.html import (
    Html,
    ShadedCell,
    details,
    duration,
    figure,
    heading,
    join,
    paragraph,
    points,
    size_of,
    table,
)

Facts = dict[str, Any]


def drift(told: Facts) -> Html:
    """Return how far each site moved the weights, and whether it pulled where all went."""
    history = told["history"]
    size = by_site(history, lambda e: {s: _norm(t) for s, t in e["sites"].items()})
    angle = by_site(history, lambda e: {s: t.get("cosine") for s, t in e["sites"].items()})
    drawn = {"size of the update (norm)": size, "agreement with the merge (cosine)": angle}
    panels: list[Panel] = [(title, lines, {}) for title, lines in drawn.items() if lines]
    if not panels:
        return Html("")
    text = (
        "Left: how far a site moved the weights in a round. Right: whether it pulled where all went together; 1 is the "
        "same direction, 0 none in common. A site whose line lies apart from the others holds different data, "
        "adds noise, or has something wrong with it."
    )
    return figure(curves(panels, ""), text, "Norm of each site's update and its cosine to the merged change, by round")


def shares(told: Facts) -> Html:
    """Return each site's part in the weights of the merge, by block."""
    history = [entry for entry in told["history"] if any("share" in t for t in entry["sites"].values())]
    if not history:
        return Html("")
    blocks = list(dict.fromkeys(b for e in history for t in e["sites"].values() for b in t.get("share", {})))
    sites = sorted({site for entry in history for site in entry["sites"]})
    rows = []
    for site in sites:
        cells = []
        for block in blocks:
            found = [e["sites"].get(site, {}).get("share", {}).get(block) for e in history]
            mean = sum(f or 0.0 for f in found) / len(found)
            cells.append(
                ShadedCell(f"{100 * mean:.0f} %", mean) if any(f is not None for f in found) else ShadedCell("–")
            )
        rows.append([site, *cells])
    text = (
        "Each site's part in the weights of the merge, mean over rounds. It follows the number of labelled images and "
        "the precision of what the site learnt. A site without labels for a task has no part in that task's head."
    )
    return join(paragraph(text), table(rows, ["site", *blocks]))


def moved(told: Facts) -> Html:
    """Return which units alignment moved."""
    rows = [
        [entry["round"] + 1, site, group, f"{100 * share:.1f} %"]
        for entry in told["history"]
        for site, t in entry["sites"].items()
        for group, share in t.get("moved", {}).items()
        if share
    ]
    if not told["history"]:
        return Html("")
    if not rows:
        return paragraph("No hidden unit or attention head had changed places; nothing was moved.")
    words = "Hidden units and attention heads of a site that alignment moved to the global order before the merge."
    shown = table(rows[:200], ["round", "site", "group of units", "moved"])
    more = f"The first 200 of {len(rows)}; report.json has all." if len(rows) > 200 else ""
    return join(words, shown, paragraph(more, "note"))


def cost(told: Facts) -> Html:
    """Return seconds and bytes, by round and by site."""
    history = told["history"]
    if not history:
        return Html("")
    time = by_site(history, lambda e: {s: t.get("seconds") for s, t in e["sites"].items()})
    data = by_site(history, lambda e: {s: t["bytes"] / 1e6 for s, t in e["sites"].items() if "bytes" in t})
    whole = line_of((entry["round"], entry.get("seconds")) for entry in history)
    drawn = curves([("seconds", time, whole), ("megabytes sent", data, {})], "the whole round", low=0.0)
    rows = []
    for site in sorted({s for entry in history for s in entry["sites"]}):
        held = [entry["sites"][site] for entry in history if site in entry["sites"]]
        seconds, sent = sum(t.get("seconds", 0.0) for t in held), sum(t.get("bytes", 0) for t in held)
        steps = sum(t.get("steps", 0) for t in held)
        rows.append([site, len(held), steps, duration(seconds), size_of(sent), size_of(sent / len(held))])
    columns = ["site", "rounds", "steps", "training", "sent", "sent a round"]
    return join(
        figure(
            drawn, "Local training and update of each site; the thick line is the whole round.", "Seconds and megabytes"
        ),
        table(rows, columns),
    )


def privacy(told: Facts) -> Html:
    """Return what left each site, and what its privacy policy spent."""
    history = told["history"]
    if not history:
        return Html("")
    what = paragraph(
        "An update holds changes of weights, their precision, counts of labelled images and training metrics; no "
        "image, no name, no identifier."
    )
    policy = _policies(told) or paragraph(
        "No site had a privacy policy: updates left as they were, without clipping or noise."
    )
    last = history[-1]
    blocks = list(dict.fromkeys(b for t in last["sites"].values() for b in t.get("norms", {})))
    plain = [
        [s, *(t.get("norms", {}).get(b) for b in blocks), size_of(t.get("bytes", 0))]
        for s, t in last["sites"].items()
        if "norms" in t
    ]
    num_examples = [
        [s, *(t.get("num_examples", {}).get(b) for b in blocks)]
        for s, t in last["sites"].items()
        if t.get("num_examples")
    ]
    return join(
        what,
        policy,
        heading(f"In round {last['round'] + 1}"),
        table(plain, ["site", *blocks, "bytes"], "Norm of the change, by block; a dash is a block that did not leave"),
        table(num_examples, ["site", *blocks], "Labelled training images behind it"),
    )


def _policies(told: Facts) -> Html:
    """Return what each site's privacy policy did and what it has spent, for the sites that have one."""
    history = told["history"]
    guarded = {s: t["privacy"] for entry in history for s, t in entry["sites"].items() if t.get("privacy")}
    rows = []
    for site, last in sorted(guarded.items()):
        sent = sum(e["sites"].get(site, {}).get("privacy", {}).get("bytes", 0) for e in history)
        epsilon, delta = last.get("epsilon"), last.get("delta")
        spent = "no noise" if epsilon is None else f"({epsilon:.3g}, {delta or 0:.1g})"
        before, after = last.get("norm"), last.get("clipped")
        clipped = "not told" if before is None or after is None else f"{before:.3g} to {after:.3g}"
        rows.append([site, spent, last.get("unit") or "–", clipped, size_of(sent), str(last.get("sha256", ""))[:16]])
    columns = ["site", "(ε, δ) spent", "protects a", "last norm, clipped", "sent in all", "last SHA-256"]
    lists = (f"{site}: {', '.join(names)}" for site, names in told.get("arrays", {}).items())
    hides = any(last.get("epsilon") is not None for last in guarded.values())
    said = "A site with an (ε, δ) guarantee sends neither its counts nor its times: num_examples is 1, seconds are 0."
    return join(
        table(rows, columns, "After each site's own privacy policy"),
        paragraph(said, "note") if hides else Html(""),
        details("Names of the arrays that left", points(lists)) if told.get("arrays") else Html(""),
    )


def _norm(told: Facts) -> float | None:
    norms = told.get("norms", {}).values()
    return math.sqrt(sum(norm**2 for norm in norms)) if norms else None
