"""Warnings of a federation report: what makes a federation uneven, whom the merge harms, and what to try."""

from __future__ import annotations

import math

from callbacks.reports.federation_summary import FederationSummary, site_values
from mtmedformer.plots.html import number

DOMINANT = 0.6
"""Share of the labelled images above which one site dominates."""

FEW_STEPS = 1 / 3
"""Share of the mean number of steps below which a site trains little."""

HARM = 0.02
"""Difference of a metric in [0, 1] above which the merged model is reported to be worse than a site's own."""


def warnings_of(summary: FederationSummary) -> list[str]:
    """Return one sentence or two per finding; none for an even federation that harms no site."""
    return [*_dominant_sites(summary), *_single_owners(summary), *_few_steps(summary), *_harmed_sites(summary)]


def _dominant_sites(summary: FederationSummary) -> list[str]:
    """Warn of a site with most of the labelled images, where the merge weights sites by their images."""
    total = sum(site.images for site in summary.sites)
    largest = max(summary.sites, key=lambda site: site.images, default=None)
    weights = summary.aggregator.options
    bounded = weights.get("saturation", math.inf) < math.inf
    equal = bounded or weights.get("a") == 0 or weights.get("weights") == "equal"
    if largest is None or len(summary.sites) < 2 or equal or largest.images <= DOMINANT * total:
        return []
    return [
        f"{largest.site} holds {largest.images / total:.0%} of the labelled training images, and the merge weights "
        "sites by their images: the shared encoder follows this site. Limit the weight of a site "
        "(federation.aggregator.saturation=100; FedAvg: federation.aggregator.weights=equal)."
    ]


def _single_owners(summary: FederationSummary) -> list[str]:
    """Warn of tasks that one site alone has labels for."""
    tasks = list(summary.sites[0].labels) if len(summary.sites) > 1 else []
    owners = {task: [site.site for site in summary.sites if site.labels.get(task)] for task in tasks}
    return [
        f"Only {sites[0]} has labels for {task}. A round without this site does not train the head of {task}; let it "
        "take part in every round, and set federation.aggregator.remember=true if it cannot."
        for task, sites in owners.items()
        if len(sites) == 1
    ]


def _few_steps(summary: FederationSummary) -> list[str]:
    """Warn of sites that take far fewer optimizer steps per round than the mean."""
    if not summary.history:
        return []
    steps = {name: site.steps for name, site in summary.history[-1].sites.items() if site.steps}
    mean = sum(steps.values()) / len(steps) if steps else 0
    few = {name: count for name, count in steps.items() if count < FEW_STEPS * mean}
    if not few:
        return []
    listed = ", ".join(f"{name} {count}" for name, count in sorted(few.items()))
    return [
        f"Optimizer steps per round: {listed}; the mean of all sites is {mean:.0f}. A site with few steps has little "
        "effect on the shared encoder. Set federation.local_steps=equal."
    ]


def _harmed_sites(summary: FederationSummary) -> list[str]:
    """Warn of sites whose own model, before the last merge, was better than the merged model on their images."""
    if not summary.history:
        return []
    last = summary.history[-1]
    harmed = []
    for task, metric in summary.primary.items():
        merged = site_values(last, task, metric)
        for name, site in last.sites.items():
            own = site.trained.get(f"{task}/{metric}")
            if own is not None and name in merged and merged[name] < own - HARM:
                harmed.append(f"{name}, {task} {metric}: {number(merged[name])} merged, {number(own)} alone")
    if not harmed:
        return []
    return [
        f"After the last round the merged model is worse than the site's own model before the merge, on the validation "
        f"images of the site ({'; '.join(harmed)}). Try more and shorter rounds (federation.local_steps), sites of "
        "equal weight (federation.aggregator.a=0) or personal models (federation.aggregator.personal_models=true)."
    ]
