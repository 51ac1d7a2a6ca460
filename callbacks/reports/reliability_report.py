"""Reliability of probabilities on the test images: ``reliability.json`` and a table on the screen."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.table import Table

from callbacks.evaluation.calibrate import labelled_scores
from mtmedformer.batch import Batch
from mtmedformer.calibration import box_performance, class_performance
from mtmedformer.metrics.base import TaskMetrics
from mtmedformer.metrics.calibration import CalibrationMetrics, Reliability
from mtmedformer.metrics.detection import DetectionMetrics
from mtmedformer.metrics.regression import RegressionMetrics
from mtmedformer.module import MultiTaskModule
from mtmedformer.plots.terminal import SafeConsole
from mtmedformer.storage.atomic_write import atomic_write


@dataclass(frozen=True)
class ThresholdResult:
    """Performance of a threshold on the test images.

    Attributes:
        threshold: The threshold, chosen on validation images.
        sensitivity: Share of positive images (lesions for detection) at or above it.
        specificity: Share of negative images below it; ``None`` for detection.
        fp_per_image: False alarms per image; ``None`` for classification.
    """

    threshold: float
    sensitivity: float
    specificity: float | None = None
    fp_per_image: float | None = None


@dataclass
class TaskReliability:
    """Calibration of one task on the test images.

    Attributes:
        errors: Expected calibration error (``ece``) and negative log-likelihood (``nll``) of the predictions.
        diagrams: Reliability diagram by class; classes that exclude each other share one under ``""``.
        raw_errors: ``errors`` without the temperature; empty where none is applied.
        raw_diagrams: ``diagrams`` without the temperature.
        temperature: Temperature fitted on validation images; ``None`` where the scores are not scaled.
        images: Labelled validation images behind temperature and thresholds; ``None`` without a calibration.
        thresholds: Performance of each threshold by class and operating point.
        margin: Half the width of the interval around a number, fitted on validation images; ``None`` without one.
        coverage: Share of images it was fitted to hold.
        observed_coverage: Share of test images it holds.
    """

    errors: dict[str, float] = field(default_factory=dict)
    diagrams: dict[str, Reliability] = field(default_factory=dict)
    raw_errors: dict[str, float] = field(default_factory=dict)
    raw_diagrams: dict[str, Reliability] = field(default_factory=dict)
    temperature: float | None = None
    images: int | None = None
    thresholds: dict[str, dict[str, ThresholdResult]] = field(default_factory=dict)
    margin: float | None = None
    coverage: float | None = None
    observed_coverage: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the entry in ``reliability.json``; NaN becomes ``null``."""
        entry: dict[str, Any] = dict(self.errors)
        if self.diagrams:
            entry["bins"] = {name: _lists(diagram) for name, diagram in self.diagrams.items()}
        entry |= {f"{name}_raw": value for name, value in self.raw_errors.items()}
        if self.raw_diagrams:
            entry["bins_raw"] = {name: _lists(diagram) for name, diagram in self.raw_diagrams.items()}
        if self.images is not None:
            entry |= {"temperature": self.temperature, "images": self.images}
            interval = {"margin": self.margin, "coverage": self.coverage, "coverage_test": self.observed_coverage}
            entry |= _without_none(interval)
            entry["thresholds"] = {
                name: {point: _without_none(asdict(result)) for point, result in points.items()}
                for name, points in self.thresholds.items()
            }
        plain: dict[str, Any] = _nan_to_none(entry)
        return plain


class ReliabilityReport(Callback):
    """Writes ``reliability.json`` after ``test`` and prints calibration errors before and after scaling.

    The file holds per task the temperature, the expected calibration error, the negative log-likelihood, the bins of
    the reliability diagram, and sensitivity and specificity of the thresholds that were chosen on validation images.

    Args:
        folder: The run folder; ``None`` is the trainer's ``default_root_dir``.
        bins: Bins of a reliability diagram.
    """

    def __init__(self, folder: str | None = None, bins: int = 15) -> None:
        self.folder, self.bins = folder, bins
        self.tasks: dict[str, TaskReliability] = {}
        """Results by task, after a test."""
        self._metrics: dict[str, CalibrationMetrics] = {}
        self._raw_metrics: dict[str, CalibrationMetrics] = {}

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the bins."""
        self._metrics, self._raw_metrics = {}, {}
        if isinstance(pl_module, MultiTaskModule):
            tasks = {name: task for name, task in pl_module.tasks.items() if task.probabilistic}
            self._metrics = {name: CalibrationMetrics(task, self.bins) for name, task in tasks.items()}
            scaled = [name for name, one in pl_module.calibration.items() if one.temperature is not None]
            self._raw_metrics = {name: CalibrationMetrics(tasks[name], self.bins) for name in scaled}

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int, *args: Any
    ) -> None:
        """Add the probabilities of a batch to the bins."""
        targets: dict[str, Any] = dict(batch.targets)
        for name, metric in self._metrics.items():
            metric.update(outputs[name], targets[name], batch.meta)
        for name, metric in self._raw_metrics.items():
            metric.update(outputs[f"raw/{name}"], targets[name], batch.meta)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute, log, print and write the results."""
        self.tasks = {}
        if not isinstance(pl_module, MultiTaskModule):
            return
        for name, metric in self._metrics.items():
            errors, diagrams = _results(metric)
            self.tasks[name] = TaskReliability(errors, diagrams)
            if metric.task.kind != "classification":  # classification metrics log these themselves
                pl_module.log_dict({f"test/{name}/{key}": value for key, value in errors.items()})
        for name, metric in self._raw_metrics.items():
            reliability = self.tasks[name]
            reliability.raw_errors, reliability.raw_diagrams = _results(metric)
            pl_module.log_dict({f"test/{name}/{key}_raw": value for key, value in reliability.raw_errors.items()})
        for name, calibration in pl_module.calibration.items():
            metrics = pl_module.test_metrics[name]
            assert isinstance(metrics, TaskMetrics)
            reliability = self.tasks.setdefault(name, TaskReliability())
            reliability.temperature, reliability.images = calibration.temperature, calibration.images
            reliability.margin, reliability.coverage = calibration.margin, calibration.coverage
            with metrics.gathered():
                if isinstance(metrics, RegressionMetrics) and calibration.margin is not None:
                    reliability.observed_coverage = _coverage(metrics, calibration.margin)
                    pl_module.log(f"test/{name}/coverage", reliability.observed_coverage)
                reliability.thresholds = threshold_results(metrics, calibration.thresholds)
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._write(Path(self.folder or trainer.default_root_dir, "reliability.json"))

    def _write(self, file: Path) -> None:
        with atomic_write(file) as part:
            entries = {name: reliability.to_json() for name, reliability in self.tasks.items()}
            part.write_text(json.dumps(entries, indent=1) + "\n")
        for name, one in self.tasks.items():
            if one.margin is not None and one.coverage is not None and one.observed_coverage is not None:
                shares = f"{100 * one.coverage:.0f} % (validation), {100 * one.observed_coverage:.0f} % (test)"
                SafeConsole().print(f"{name}: interval of ± {one.margin:.4g} holds {shares}", highlight=False)
        scaled = {name: reliability for name, reliability in self.tasks.items() if reliability.raw_errors}
        if not scaled:
            return
        table = Table("calibration", pad_edge=False, header_style="bold")
        for column in ("temperature", "ece raw", "ece", "nll raw", "nll"):
            table.add_column(column, justify="right")
        for name, one in scaled.items():
            values = [
                one.temperature,
                one.raw_errors["ece"],
                one.errors["ece"],
                one.raw_errors["nll"],
                one.errors["nll"],
            ]
            table.add_row(name, *(f"{value:.3f}" for value in values))
        SafeConsole().print(table)


def threshold_results(
    metric: TaskMetrics, thresholds: dict[str, dict[str, float]]
) -> dict[str, dict[str, ThresholdResult]]:
    """Measure thresholds on the images of a metric.

    Args:
        metric: The metric of a task; in distributed runs it has to be gathered.
        thresholds: Thresholds by class and operating point.

    Returns:
        Results by class and operating point.
    """
    results: dict[str, dict[str, ThresholdResult]] = {}
    for name, (scores, truth) in labelled_scores(metric).items():
        results[name] = {
            point: ThresholdResult(threshold, **class_performance(scores, truth, threshold))
            for point, threshold in thresholds.get(name, {}).items()
        }
    if isinstance(metric, DetectionMetrics):
        rows = metric.seen().rows
        for name, findings in zip(metric.classes, metric.findings(rows), strict=True):
            results[name] = {
                point: ThresholdResult(threshold, **box_performance(findings, len(rows), threshold))
                for point, threshold in thresholds.get(name, {}).items()
            }
    return results


def _coverage(metric: RegressionMetrics, margin: float) -> float:
    """Return the share of images whose truth lies within the margin of the prediction; NaN without an image."""
    predicted, truth = metric.pairs(metric.seen().rows)
    return float((np.abs(predicted - truth) <= margin).mean()) if len(truth) else math.nan


def _results(metric: CalibrationMetrics) -> tuple[dict[str, float], dict[str, Reliability]]:
    """Return errors and diagrams; every process has to call it."""
    with metric.gathered():
        return metric.overall(metric.seen().rows), dict(metric.diagrams())


def _lists(diagram: Reliability) -> dict[str, list[float]]:
    parts = {
        "edges": diagram.edges,
        "count": diagram.count,
        "confidence": diagram.confidence,
        "accuracy": diagram.accuracy,
    }
    return {name: [float(value) for value in part] for name, part in parts.items()}


def _without_none(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if value is not None}


def _nan_to_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _nan_to_none(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_nan_to_none(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value
