"""Sections of a federation report about updates: drift, weights in the merge, alignment, cost and privacy."""

from __future__ import annotations

from collections.abc import Sequence

from callbacks.reports.federation_summary import FederationSummary, PrivacySummary, change_norm
from callbacks.reports.round_curves import Panel, lines_by_site, round_figure
from federation.server.history import RoundRecord
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

MAX_ROWS = 200
"""Rows of the alignment table."""

History = Sequence[RoundRecord]


def drift(history: History) -> Html:
    """Return curves of the size of each site's change and of its cosine to the merged change."""
    norms = lines_by_site(history, lambda entry: {name: change_norm(site) for name, site in entry.sites.items()})
    cosines = lines_by_site(history, lambda entry: {name: site.cosine for name, site in entry.sites.items()})
    panels = [Panel("norm of the change", norms), Panel("cosine to the merged change", cosines)]
    panels = [panel for panel in panels if panel.sites]
    if not panels:
        return Html("")
    text = (
        "Left: how far each site moved the weights in a round. Right: agreement of its direction with the merged "
        "change; 1 is the same direction, 0 is unrelated. A site whose curve differs from the others has different "
        "data, adds noise, or has an error."
    )
    return figure(round_figure(panels, ""), text, "Norm of each site's change and its cosine to the merged change")


def shares(history: History) -> Html:
    """Return a table with the mean weight of each site in the merge, by block."""
    merged = [entry for entry in history if any(site.share for site in entry.sites.values())]
    if not merged:
        return Html("")
    blocks = list(dict.fromkeys(block for entry in merged for site in entry.sites.values() for block in site.share))
    rows = []
    for name in sorted({name for entry in merged for name in entry.sites}):
        cells = []
        for block in blocks:
            values = [entry.sites[name].share.get(block) if name in entry.sites else None for entry in merged]
            mean = sum(value or 0.0 for value in values) / len(values)
            known = any(value is not None for value in values)
            cells.append(ShadedCell(f"{100 * mean:.0f} %", mean) if known else ShadedCell("–"))
        rows.append([name, *cells])
    text = (
        "Weight of each site in the merge, mean over rounds. It depends on the number of labelled images and on the "
        "precision of the site's weights. A site without labels for a task has no weight in the head of that task."
    )
    return join(paragraph(text), table(rows, ["site", *blocks]))


def alignment(history: History) -> Html:
    """Return a table of the hidden units and attention heads that were permuted before the merge."""
    if not history:
        return Html("")
    rows = [
        [entry.round + 1, name, group, f"{100 * share:.1f} %"]
        for entry in history
        for name, site in entry.sites.items()
        for group, share in site.moved.items()
        if share
    ]
    if not rows:
        return paragraph("No hidden unit or attention head was permuted; alignment changed nothing.")
    text = "Hidden units and attention heads that were permuted at a site; alignment moved them back before the merge."
    more = f"The first {MAX_ROWS} of {len(rows)} rows; report.json has all." if len(rows) > MAX_ROWS else ""
    return join(text, table(rows[:MAX_ROWS], ["round", "site", "group of units", "moved"]), paragraph(more, "note"))


def cost(history: History) -> Html:
    """Return seconds and bytes, by round and by site."""
    if not history:
        return Html("")
    seconds = lines_by_site(history, lambda entry: {name: site.seconds for name, site in entry.sites.items()})
    megabytes = lines_by_site(history, lambda entry: {name: site.bytes / 1e6 for name, site in entry.sites.items()})
    panels = [
        Panel("seconds", seconds, {entry.round: entry.seconds for entry in history}),
        Panel("megabytes sent", megabytes),
    ]
    rows = []
    for name in sorted({name for entry in history for name in entry.sites}):
        rounds = [entry.sites[name] for entry in history if name in entry.sites]
        sent, steps = sum(site.bytes for site in rounds), sum(site.steps for site in rounds)
        time = duration(sum(site.seconds for site in rounds))
        rows.append([name, len(rounds), steps, time, size_of(sent), size_of(sent / len(rounds))])
    text = "Local training time and size of the update of each site; the thick line is the whole round."
    return join(
        figure(round_figure(panels, "whole round", low=0.0), text, "Seconds and megabytes by round"),
        table(rows, ["site", "rounds", "steps", "training", "sent", "sent per round"]),
    )


def privacy(summary: FederationSummary) -> Html:
    """Return what each site sent, and what its privacy policy spent."""
    if not summary.history:
        return Html("")
    content = (
        "An update contains changes of weights, their precision, counts of labelled images and training metrics. It "
        "contains no images, names or identifiers."
    )
    none = "No site has a privacy policy: updates were sent without clipping or noise."
    last = summary.history[-1]
    blocks = list(dict.fromkeys(block for site in last.sites.values() for block in site.norms))
    norms = [
        [name, *(site.norms.get(block) for block in blocks), size_of(site.bytes)]
        for name, site in last.sites.items()
        if site.norms
    ]
    examples = [
        [name, *(site.examples().get(block) for block in blocks)] for name, site in last.sites.items() if site.blocks
    ]
    return join(
        paragraph(content),
        _policies(summary) or paragraph(none),
        heading(f"In round {last.round + 1}"),
        table(norms, ["site", *blocks, "bytes"], "Norm of the change by block; a dash is a block that was not sent"),
        table(examples, ["site", *blocks], "Labelled training samples behind the change, by block"),
    )


def _policies(summary: FederationSummary) -> Html:
    """Return a table of the privacy policies of the sites, empty where no site has one."""
    last, sent = {}, dict.fromkeys((name for entry in summary.history for name in entry.sites), 0)
    for entry in summary.history:
        for name, site in entry.sites.items():
            privacy = PrivacySummary.of(site)
            if privacy is not None:
                last[name] = privacy
                sent[name] += privacy.bytes
    rows = []
    for name, one in sorted(last.items()):
        spent = "no noise" if one.epsilon is None else f"({one.epsilon:.3g}, {one.delta or 0:.1g})"
        clipped = "withheld"
        if one.norm is not None and one.clipped is not None:
            clipped = f"{one.norm:.3g} to {one.clipped:.3g}"
        rows.append([name, spent, one.unit or "–", clipped, size_of(sent[name]), one.sha256[:16]])
    columns = ["site", "(ε, δ) spent", "protected unit", "last norm, clipped", "sent in total", "last SHA-256"]
    lists = points(f"{site}: {', '.join(names)}" for site, names in summary.arrays.items())
    noisy = any(one.epsilon is not None for one in last.values())
    text = "A site with an (ε, δ) guarantee withholds its counts and times: examples are reported as 1, seconds as 0."
    return join(
        table(rows, columns, "After the privacy policy of each site"),
        paragraph(text, "note") if noisy else Html(""),
        details("Names of the arrays that were sent", lists),
    )
