"""The record of a round: counts, norms and metrics of every site, for checkpoints and reports; no weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from federation.exchange.update import Update, norms_of
from federation.server.admission import Fault


@dataclass
class SiteRecord:
    """One site in one round.

    Attributes:
        metrics: Validation metrics of the site's own model on its own data, ``<task>/<metric>``, where it has one.
        trained: The same of the site's model after its local training, before the merge.
        samples: Labelled training samples by task.
        steps: Optimizer steps.
        seconds: Wall time of the local training.
        rounding: Number format of the update's changes.
        blocks: By block that was sent, ``num_examples``; nothing by tensor, which would make checkpoints large.
        norms: L2 norm of the change by block.
        bytes: Size of the update's arrays.
        moved: Share of the units that alignment permuted, by group of units; empty if none was.
        privacy: Account of the site's privacy policy; empty without one.
        cosine: Cosine of the site's change to the merged one; ``None`` where nothing was merged.
        share: By block, the site's mean weight in the merge, in [0, 1]; empty where the merge has no weights.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    trained: dict[str, float] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0
    rounding: str = "none"
    blocks: dict[str, dict[str, Any]] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)
    bytes: int = 0
    moved: dict[str, float] = field(default_factory=dict)
    privacy: dict[str, Any] = field(default_factory=dict)
    cosine: float | None = None
    share: dict[str, float] = field(default_factory=dict)

    @property
    def contributed(self) -> bool:
        """Whether an update of the site was merged; otherwise only its own model was validated."""
        return bool(self.blocks)

    def examples(self) -> dict[str, int]:
        """Return ``num_examples`` by block: the labelled training images behind the change."""
        return {name: block["num_examples"] for name, block in self.blocks.items()}

    @classmethod
    def of(
        cls, update: Update, moved: dict[str, float], privacy: dict[str, Any], trained: dict[str, float]
    ) -> SiteRecord:
        """Return the record of an update."""
        return cls(
            trained=trained,
            metrics=dict(update.metrics),
            samples=dict(update.samples),
            steps=update.steps,
            seconds=update.seconds,
            rounding=update.rounding,
            blocks={name: {"num_examples": block.num_examples} for name, block in update.blocks.items()},
            norms=norms_of(update),
            bytes=update.nbytes(),
            moved=moved,
            privacy=privacy,
        )


@dataclass
class RoundRecord:
    """One round of the federation.

    Attributes:
        round: Number of the round, from 0.
        sites: Record of every admitted site, by name.
        faults: Sites without an admitted update.
        seconds: Wall time of training and merging.
        validation: Metrics of the global model after the round, by their logged names.
    """

    round: int
    sites: dict[str, SiteRecord] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    seconds: float = 0.0
    validation: dict[str, float] = field(default_factory=dict)

    def compact(self, primary: Mapping[str, str]) -> None:
        """Drop what reports show of the last round only; the loggers have it (``metrics.csv``).

        Kept are the scores and the main metrics by site.

        Args:
            primary: Main metric by task.
        """
        main = {"score", *(f"{task}/{metric}" for task, metric in primary.items())}
        for site in self.sites.values():
            site.metrics = {key: value for key, value in site.metrics.items() if key in main}
            site.trained = {key: value for key, value in site.trained.items() if key in main}
        by_site = {key: key.removeprefix("val/").partition("/site=") for key in self.validation}
        kept = {key for key, (metric, found, _) in by_site.items() if not found or metric in main}
        self.validation = {key: value for key, value in self.validation.items() if key in kept}

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain containers, for a checkpoint or a JSON file."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RoundRecord:
        """Return the record from the result of ``to_dict``."""
        sites = {name: SiteRecord(**site) for name, site in values["sites"].items()}
        return cls(**{**values, "sites": sites, "faults": [Fault(**fault) for fault in values["faults"]]})


def compact(history: Sequence[RoundRecord], primary: Mapping[str, str]) -> None:
    """Make all records but the last small, once the last one is complete: they are in every checkpoint.

    Of the names of the arrays that a site sent under a privacy policy, only the last list is kept, and before it the
    number.

    Args:
        history: The rounds in order; changed in place.
        primary: Main metric by task.
    """
    if len(history) > 1:
        history[-2].compact(primary)
    for name, site in history[-1].sites.items() if history else ():
        for earlier in (record.sites[name] for record in history[:-1] if name in record.sites):
            if site.privacy and isinstance(earlier.privacy.get("names"), list):
                earlier.privacy = earlier.privacy | {"names": len(earlier.privacy["names"])}


def faults_text(history: Sequence[RoundRecord]) -> str:
    """Return the number of rounds, and how often each site was missing, in one sentence."""
    counts = Counter(fault.site for record in history for fault in record.faults)
    missing = ", ".join(f"{site} in {count}" for site, count in sorted(counts.items()))
    return f"{len(history)} rounds; missing: {missing}" if missing else f"{len(history)} rounds, no fault"
