"""Metrics by site: of the global model on each site's images, and of each site's own model on its own data."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import lightning as L
import numpy as np

from federation.client.train import validate_site
from federation.exchange.collectives import Processes
from federation.exchange.schema import State
from federation.site_loaders import Site
from mtmedformer.metrics.base import TaskMetrics, known_mean
from mtmedformer.protocols import ValidatedModule


def metrics_by_site(module: L.LightningModule) -> dict[str, float]:
    """Return every validation metric by site, the score of each site, and the scores of the mean and the worst site."""
    primary: dict[str, list[float]] = {}
    metrics: dict[str, float] = {}
    for task, metric in _val_metrics(module).items():
        if not isinstance(metric, TaskMetrics):
            continue
        images = metric.seen()
        for site in sorted(set(images.sites)):
            rows = images.rows[[other == site for other in images.sites]]
            values = metric.overall(rows)
            primary.setdefault(site, []).append(values.get(metric.primary, float("nan")))
            metrics |= {f"val/{task}/{k}/site={site}": v for k, v in values.items() if "/" not in k}
    scores = {site: known_mean(values) for site, values in primary.items()}
    metrics |= {f"site/{site}/val/score": score for site, score in scores.items()}
    known = [score for score in scores.values() if score == score]
    if known:
        metrics |= {"val/site_mean": known_mean(known), "val/site_worst": min(known)}
    return metrics


def primary_metrics(module: L.LightningModule) -> dict[str, str]:
    """Return the main metric of every task."""
    return {task: metric.primary for task, metric in _val_metrics(module).items() if isinstance(metric, TaskMetrics)}


def _val_metrics(module: object) -> Mapping[str, object]:
    return module.val_metrics if isinstance(module, ValidatedModule) else {}


def validate_own(
    sites: Mapping[str, Site],
    template: L.LightningModule,
    processes: Processes,
    model_of: Callable[[str], State],
    make_trainer: Callable[[], L.Trainer],
) -> dict[str, dict[str, float]]:
    """Return by site the metrics of its own model on its own data, on every process; the processes share the work."""
    metrics: dict[str, dict[str, float]] = {}
    for i, (name, site) in enumerate(sites.items()):
        own: dict[str, float] | None = None
        if i % processes.world == processes.rank:
            own = validate_site(template, site, model_of(name), make_trainer)
        own = processes.share(own, i % processes.world)
        if own:
            metrics[name] = own
    return metrics


def mean_and_worst(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return mean and minimum of the sites' scores; empty where no site has one."""
    scores = [values.get("score", float("nan")) for values in metrics.values()]
    if not any(score == score for score in scores):
        return {}
    return {"site/mean_score": float(np.nanmean(scores)), "site/worst_score": float(np.nanmin(scores))}
