"""Metrics by site: of the global model on each site's images, and of each site's own model on its own."""

from __future__ import annotations

from collections.abc import Callable

import lightning as L
import numpy as np

from federation.client.train import validate_site
from federation.exchange.schema import State
from federation.server.round import Group
from federation.site_loaders import Site
from mtmedformer.metrics.base import TaskMetrics


def metrics_by_site(module: L.LightningModule) -> dict[str, float]:
    """Return every validation metric by site, the score of each site, and those of the mean and the worst site."""
    primary: dict[str, list[float]] = {}
    found: dict[str, float] = {}
    for task, metric in getattr(module, "val_metrics", {}).items():
        if not isinstance(metric, TaskMetrics):
            continue
        images = metric.seen()
        for site in sorted(set(images.sites)):
            rows = images.rows[[other == site for other in images.sites]]
            values = metric.overall(rows)
            primary.setdefault(site, []).append(values.get(metric.primary, float("nan")))
            found |= {f"val/{task}/{k}/site={site}": v for k, v in values.items() if "/" not in k}
    scores = {site: mean_known(values) for site, values in primary.items()}
    found |= {f"site/{site}/val/score": score for site, score in scores.items()}
    known = [score for score in scores.values() if score == score]
    if known:
        found |= {"val/site_mean": sum(known) / len(known), "val/site_worst": min(known)}
    return found


def validate_own(
    sites: dict[str, Site],
    template: L.LightningModule,
    group: Group,
    model_of: Callable[[str], State],
    make_trainer: Callable[[], L.Trainer],
) -> dict[str, dict[str, float]]:
    """Return by site the metrics of its own model on its own data; processes share the work and learn all of it."""
    known: dict[str, dict[str, float]] = {}
    for i, (name, site) in enumerate(sites.items()):
        found: dict[str, float] | None = None
        if i % group.world == group.rank:
            has_any = bool(site.val_dataloader())
            found = validate_site(template, site, model_of(name), make_trainer) if has_any else {}
        found = group.share(found, i % group.world)
        if found:
            known[name] = found
    return known


def mean_and_worst(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return mean and worst of the sites' scores, or nothing where no site has one."""
    scores = [values.get("score", float("nan")) for values in found.values()]
    if not any(score == score for score in scores):
        return {}
    return {"site/mean_score": float(np.nanmean(scores)), "site/worst_score": float(np.nanmin(scores))}


def mean_known(values: list[float]) -> float:
    """Return the mean of the values that are not NaN; NaN where there is none."""
    known = [value for value in values if value == value]
    return sum(known) / len(known) if known else float("nan")
