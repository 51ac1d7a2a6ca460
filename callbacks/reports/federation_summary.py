"""Course of a federation as dataclasses, which ``report.json`` holds and the page of the report is drawn from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from federation.partition import Holding
from federation.server.history import RoundRecord, SiteRecord


@dataclass(frozen=True)
class PrivacySummary:
    """What the privacy policy of a site did with one update.

    Attributes:
        unit: Unit that the guarantee protects, ``site``, ``patient`` or ``image``; ``None`` without noise.
        epsilon: ε spent so far; ``None`` without noise.
        delta: δ of the guarantee.
        norm: L2 norm of the change before clipping; ``None`` under noise.
        clipped: L2 norm after clipping, before noise and rounding; ``None`` under noise.
        bytes: Bytes sent.
        sha256: Hash of the update as sent.
        names: Number of arrays sent.
        norms: L2 norm of the change as sent, by block.
        site: Guarantee of noise on updates, if any.
        example: Guarantee of noise on gradients, if any.
    """

    unit: str | None = None
    epsilon: float | None = None
    delta: float | None = None
    norm: float | None = None
    clipped: float | None = None
    bytes: int = 0
    sha256: str = ""
    names: int = 0
    norms: Mapping[str, float] = field(default_factory=dict)
    site: Mapping[str, Any] | None = None
    example: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, site: SiteRecord) -> PrivacySummary | None:
        """Return the summary of a site's record, ``None`` without a privacy policy."""
        if not site.privacy:
            return None
        names = site.privacy["names"]  # of earlier rounds only their number is kept
        return cls(**site.privacy | {"names": names if isinstance(names, int) else len(names)})


def change_norm(site: SiteRecord) -> float | None:
    """Return the L2 norm of a site's whole change, ``None`` where no block was sent."""
    return math.sqrt(sum(norm**2 for norm in site.norms.values())) if site.norms else None


def site_scores(record: RoundRecord) -> dict[str, float]:
    """Return the score of each site, the mean of its tasks' main metrics, of the model that the site uses."""
    of_global = {
        key.removeprefix("site/").removesuffix("/val/score"): value
        for key, value in record.validation.items()
        if key.startswith("site/") and key.endswith("/val/score")
    }
    own = {name: site.metrics["score"] for name, site in record.sites.items() if "score" in site.metrics}
    return _known(of_global | own)


def site_values(record: RoundRecord, task: str, metric: str) -> dict[str, float]:
    """Return a metric of each site, of the model that the site uses."""
    start, key = f"val/{task}/{metric}/site=", f"{task}/{metric}"
    of_global = {k.removeprefix(start): v for k, v in record.validation.items() if k.startswith(start)}
    return _known(of_global | {name: site.metrics[key] for name, site in record.sites.items() if key in site.metrics})


def gains(record: RoundRecord, task: str, metric: str) -> dict[str, float]:
    """Return by site the merged model's metric minus that of the site's own model before the merge, where both exist.

    Both models are validated on the site's own images.
    """
    merged, key = site_values(record, task, metric), f"{task}/{metric}"
    return {
        name: merged[name] - site.trained[key]
        for name, site in record.sites.items()
        if name in merged and not math.isnan(site.trained.get(key, math.nan))
    }


def _known(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if not math.isnan(value)}


@dataclass(frozen=True)
class PartDescription:
    """A configured object.

    Attributes:
        name: Its class.
        options: Its options that are plain values, and the class of those that are objects.
    """

    name: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class FederationSummary:
    """A whole federation. Nothing in it identifies a patient.

    Attributes:
        state: ``finished``, ``degraded``, ``interrupted`` or ``failed``.
        reason: Reason of the state in a few words.
        rounds: Configured number of rounds.
        aggregator: The aggregator.
        options: Options of the federation.
        primary: Main metric by task.
        sites: Data of each site, in counts.
        history: The completed rounds.
        arrays: By site with a privacy policy, the names of the arrays it sent last.
        pooled: By round, metrics over the validation images of all sites.
        seed: Seed of the run, if any.
        versions: Versions of software and hardware by name.
    """

    state: str
    reason: str
    rounds: int
    aggregator: PartDescription
    options: Mapping[str, Any]
    primary: Mapping[str, str]
    sites: list[Holding]
    history: list[RoundRecord]
    arrays: Mapping[str, list[str]]
    pooled: Mapping[int, Mapping[str, float]]
    seed: str | None
    versions: Mapping[str, str]

    def best_round(self) -> int | None:
        """Return the round with the highest pooled score, ``None`` without a score."""
        scores = {number: score for number, score in self.pooled_scores().items() if not math.isnan(score)}
        return max(scores, key=lambda number: scores[number]) if scores else None

    def pooled_scores(self) -> dict[int, float]:
        """Return the score over all sites by round, NaN where it is unknown."""
        return {number: metrics.get("val/score", math.nan) for number, metrics in self.pooled.items()}

    def reported_round(self) -> RoundRecord:
        """Return the best round, or the last one where no round has a score."""
        best = self.best_round()
        return next((entry for entry in self.history if entry.round == best), self.history[-1])

    def to_json(self) -> dict[str, Any]:
        """Return the content of ``report.json``; numbers that JSON lacks become ``null``."""
        values: dict[str, Any] = asdict(self)
        values |= {
            "state": {"state": self.state, "reason": self.reason},
            "rounds": {"done": len(self.history), "asked": self.rounds},
            "aggregator": {"class": self.aggregator.name, "options": dict(self.aggregator.options)},
            "history": [_round_json(record) for record in self.history],
            "pooled": [{"round": number + 1, "metrics": dict(one)} for number, one in sorted(self.pooled.items())],
        }
        plain: dict[str, Any] = _finite(values)
        return plain


def _round_json(record: RoundRecord) -> dict[str, Any]:
    """Return a round with its number from 1, as on the page."""
    sites = {}
    for name, site in record.sites.items():
        values: dict[str, Any] = asdict(site) | {"num_examples": site.examples()}
        del values["blocks"]
        privacy = PrivacySummary.of(site)
        values["privacy"] = asdict(privacy) if privacy else None
        sites[name] = values
    return asdict(record) | {"round": record.round + 1, "sites": sites}


def _finite(value: Any) -> Any:
    """Replace numbers that are not finite by ``None``, at any depth."""
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
