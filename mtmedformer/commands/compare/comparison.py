"""The result of a study as plain data, and its JSON and CSV files."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mtmedformer.commands.compare.statistics import Estimate, Summary, Verdict
from mtmedformer.commands.compare.study import Average, Checkpoint
from mtmedformer.commands.compare.trainings import Models, Split, write_json
from mtmedformer.storage.atomic_write import atomic_write
from mtmedformer.storage.safe_text import cell

NAN = float("nan")


@dataclass(frozen=True)
class Difference(Estimate):
    """The difference between two variants.

    Attributes:
        p_holm: p-value after Holm's correction for the number of differences of its kind.
        verdict: Whether the difference is larger than chance explains.
    """

    p_holm: float = NAN
    verdict: Verdict = "not determined"


@dataclass(frozen=True)
class VariantValue:
    """One metric of one variant.

    Attributes:
        mean: Mean over runs and sites (or images).
        worst: The worst site.
        worst_site: Its name; ``None`` if no site has a value.
        by_site: Mean over the runs by site.
        by_run: Value of each run.
        by_run_and_site: Value of each run at each site.
        share: Value as a share of the yardstick's on the runs that both have; NaN without a yardstick.
    """

    mean: Estimate
    worst: Estimate
    worst_site: str | None
    by_site: dict[str, float]
    by_run: dict[str, float]
    by_run_and_site: dict[str, dict[str, float]]
    share: float = NAN


@dataclass(frozen=True)
class MetricComparison:
    """One metric of all variants.

    Attributes:
        higher_is_better: Whether more of the metric is better.
        values: Values by variant.
        differences: Differences from the reference by variant, of the mean and of the worst site.
        pairs: Differences of the means of every pair, by ``first|second``.
    """

    higher_is_better: bool
    values: dict[str, VariantValue]
    differences: dict[str, dict[Summary, Difference]]
    pairs: dict[str, Difference]


@dataclass(frozen=True)
class VariantSummary:
    """A variant.

    Attributes:
        about: Its description.
        trainings: Number of finished trainings.
        tried: Number of settings tried on validation images; ``None`` if the study does not state it.
        evaluated: Which models were evaluated; ``None`` if none was.
    """

    about: str
    trainings: int
    tried: int | None
    evaluated: Models | None


@dataclass(frozen=True)
class Costs:
    """Mean costs of a variant's trainings; ``None`` where they are not known.

    Attributes:
        weights: Number of parameters.
        seconds: Seconds of training.
        processor_seconds: Seconds of processor time.
        rounds: Rounds of the federation.
        bytes: Bytes that all sites sent.
        bytes_down: Bytes that were sent to the sites.
        rounds_to_95: Rounds until the first metric on validation images reached 95 % of the yardstick's last value.
        bytes_to_95: Bytes that all sites sent until then.
        seconds_to_95: Seconds until then.
    """

    weights: float | None = None
    seconds: float | None = None
    processor_seconds: float | None = None
    rounds: float | None = None
    bytes: float | None = None
    bytes_down: float | None = None
    rounds_to_95: float | None = None
    bytes_to_95: float | None = None
    seconds_to_95: float | None = None


@dataclass(frozen=True)
class TrainingCount:
    """Number of finished trainings, and of all trainings of a study."""

    finished: int
    all: int


@dataclass(frozen=True)
class Comparison:
    """The result of a study; NaN for what is not known.

    Attributes:
        study: Name of the study.
        question: Its question.
        form: Its form.
        split: Split of the images.
        reference: The variant that the others are compared with.
        yardstick: The variant trained on all data in one place, if there is one.
        average: What means are taken over.
        checkpoint: Which weights were evaluated.
        replicates: Number of resamples.
        runs: Names of the runs.
        patients: Number of patients by site.
        trainings: Number of trainings.
        variants: The variants by name.
        metrics: The metrics by name, the deciding one first.
        costs: Costs by variant.
        remarks: Limits of the comparison, one sentence per limit.
        code: Versions of the code.
    """

    study: str
    question: str
    form: str
    split: Split
    reference: str
    yardstick: str | None
    average: Average
    checkpoint: Checkpoint
    replicates: int
    runs: list[str]
    patients: dict[str, int]
    trainings: TrainingCount
    variants: dict[str, VariantSummary]
    metrics: dict[str, MetricComparison]
    costs: dict[str, Costs]
    remarks: list[str]
    code: list[str]


def write_json_report(comparison: Comparison, file: Path) -> None:
    """Write a comparison as JSON, with null for NaN."""
    write_json(_plain(asdict(comparison)), file)


def write_csv(comparison: Comparison, file: Path) -> None:
    """Write one row per metric and variant: value, worst site, difference from the reference, verdict."""
    rows = [_csv_row(comparison, metric, name) for metric, one in comparison.metrics.items() for name in one.values]
    with atomic_write(file) as part, part.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, _COLUMNS)
        writer.writeheader()
        writer.writerows(
            {key: cell(one) if isinstance(one, str) else one for key, one in _plain(row).items()} for row in rows
        )


_COLUMNS = ["metric", "variant", "evaluated", "runs", "mean", "mean_low", "mean_high", "share", "worst_site", "worst"]
_COLUMNS += ["difference", "low", "high", "p", "p_holm", "verdict"]
_COLUMNS += ["worst_difference", "worst_low", "worst_high", "worst_verdict"]


def _csv_row(comparison: Comparison, metric: str, name: str) -> dict[str, Any]:
    value = comparison.metrics[metric].values[name]
    row: dict[str, Any] = {
        "metric": metric,
        "variant": name,
        "evaluated": comparison.variants[name].evaluated,
        "runs": len(value.by_run),
        "mean": value.mean.value,
        "mean_low": value.mean.low,
        "mean_high": value.mean.high,
        "share": value.share,
        "worst_site": value.worst_site,
        "worst": value.worst.value,
    }
    for of, one in comparison.metrics[metric].differences.get(name, {}).items():
        prefix = "worst_" if of == "worst" else ""
        row |= {f"{prefix}difference": one.value, f"{prefix}low": one.low, f"{prefix}high": one.high}
        row |= {f"{prefix}verdict": one.verdict} | ({} if prefix else {"p": one.p, "p_holm": one.p_holm})
    return row


def _plain(value: Any) -> Any:
    """Return plain containers with ``None`` for NaN and infinity."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
