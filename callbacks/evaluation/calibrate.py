"""Calibrates a model on its validation set while it trains, and tells after ``test`` how far that carries."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table

from mtmedformer.batch import Batch
from mtmedformer.calibration import TaskCalibration, fit_temperature, tempered
from mtmedformer.errors import ConfigError
from mtmedformer.heads.base import TaskHead
from mtmedformer.metrics.base import TaskMetrics
from mtmedformer.metrics.calibration import CalibrationMetrics, Reliability
from mtmedformer.metrics.classification import ClassificationMetrics
from mtmedformer.metrics.curves import Floats
from mtmedformer.metrics.detection import DetectionMetrics
from mtmedformer.metrics.temperature import LOG_TEMPERATURES, TemperatureSums
from mtmedformer.module import MultiTaskModule
from mtmedformer.storage.atomic_write import whole
from mtmedformer.thresholds import OperatingPoint, box_performance, box_threshold, class_performance, class_threshold

POINTS = ("sensitivity=0.9", "youden", "f1", "fp_per_image=1")


class Calibrate(Callback):
    """Fits a temperature a task and thresholds a class at the end of every validation, for the weights it saw.

    A checkpoint written then holds them; ``test`` and ``predict`` use them. Images that are not labelled for a task
    have no say in it. Classes and masks get a temperature; box scores are a ranking and are left alone, with thresholds
    only. What images contribute to a temperature are sums (``TemperatureSums``), so that sites of a federation need
    share no more than those.

    Args:
        operating_points: Thresholds to find: ``sensitivity=0.9``, ``specificity=0.95``, ``youden``, ``f1`` for classes,
            and of these ``sensitivity=…`` and ``f1``, and ``fp_per_image=1``, for boxes. ``None`` is
            ``sensitivity=0.9``, ``youden``, ``f1`` and ``fp_per_image=1``.
        prior: Standard deviation of the log temperature before any image is seen; ``None`` trusts the images alone.

    Raises:
        ConfigError: When an operating point is none.
    """

    def __init__(self, operating_points: list[str] | None = None, prior: float | None = 0.5) -> None:
        self.operating_points = [OperatingPoint.parse(text) for text in operating_points or POINTS]
        self.prior = prior
        self._sums: dict[str, TemperatureSums] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a module that cannot be calibrated."""
        _calibrated(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Drop the calibration of weights that are about to change."""
        _calibrated(pl_module).calibration = {}

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start with no sums."""
        tasks = _calibrated(pl_module).tasks
        self._sums = {name: TemperatureSums(task) for name, task in tasks.items() if task.kind != "detection"}

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int, *args: Any
    ) -> None:
        """Add a batch's labelled images, as the heads saw them, to the sums."""
        if not _fits(trainer):
            return
        size = (int(batch.image.shape[-2]), int(batch.image.shape[-1]))
        for name, sums in self._sums.items():
            head = _calibrated(pl_module).heads[name]
            assert isinstance(head, TaskHead)
            logits = head.class_logits(outputs[name], size)
            if logits is not None:
                sums.update(logits, batch.targets[name], batch.meta)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fit every task, and log its temperature and what it gains."""
        if not _fits(trainer):
            return
        module = _calibrated(pl_module)
        found = {name: self._fitted(module, name) for name in module.tasks}
        module.calibration = {name: one for name, one in found.items() if one.images}
        for name, one in module.calibration.items():
            if one.temperature is not None and one.nll is not None:
                module.log_dict({f"val/{name}/temperature": one.temperature, f"val/{name}/nll_calibrated": one.nll})

    def _fitted(self, module: MultiTaskModule, name: str) -> TaskCalibration:
        """Return the calibration of a task; every process has to ask."""
        metric = module.val_metrics[name]
        assert isinstance(metric, TaskMetrics)
        if name not in self._sums:
            with metric.gathered():
                rows = metric.seen().rows
                return TaskCalibration(len(rows), thresholds=_thresholds(metric, 1.0, self.operating_points))
        with self._sums[name].gathered(), metric.gathered():
            curve, decisions, images = self._sums[name].sums()
            if not decisions:
                return TaskCalibration(0)
            temperature, nll = fit_temperature(curve, decisions, images, self.prior)
            raw = float(curve[len(LOG_TEMPERATURES) // 2, 0] / decisions)
            return TaskCalibration(
                images, temperature, raw, nll, _thresholds(metric, temperature, self.operating_points)
            )


class ReliabilityReport(Callback):
    """After ``test``: how far probabilities mean what they say, raw and calibrated: a table and ``reliability.json``.

    The file holds a task's temperature, its expected calibration error and negative log-likelihood, the bins of its
    reliability diagram, and what sensitivity and specificity the thresholds chosen on validation reach here.

    Args:
        folder: The run folder; ``None`` is the trainer's ``default_root_dir``.
        bins: Bins of a reliability diagram.
    """

    def __init__(self, folder: str | None = None, bins: int = 15) -> None:
        self.folder, self.bins = folder, bins
        self.facts: dict[str, dict[str, Any]] = {}
        """What the file holds, once a test has ended."""
        self._metrics: dict[str, CalibrationMetrics] = {}

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start with empty bins."""
        self._metrics = {}
        if isinstance(pl_module, MultiTaskModule):
            tasks = {name: task for name, task in pl_module.tasks.items() if task.kind != "detection"}
            self._metrics = {name: CalibrationMetrics(task, self.bins) for name, task in tasks.items()}
            scaled = [name for name, one in pl_module.calibration.items() if one.temperature is not None]
            self._metrics |= {f"raw/{name}": CalibrationMetrics(tasks[name], self.bins) for name in scaled}

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int, *args: Any
    ) -> None:
        """Bin a batch's probabilities."""
        for name, metric in self._metrics.items():
            target: Any = batch.targets[name.removeprefix("raw/")]
            metric.update(outputs[name], target, batch.meta)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log, print and write what was found."""
        self.facts = {}
        for name, metric in self._metrics.items():
            task, raw = name.removeprefix("raw/"), "_raw" if name.startswith("raw/") else ""
            with metric.gathered():
                values = metric.overall(metric.seen().rows)
                bins = {label: _plain(diagram) for label, diagram in metric.diagrams().items()}
            facts = self.facts.setdefault(task, {})
            facts |= {f"{key}{raw}": value for key, value in values.items()} | {f"bins{raw}": bins}
            if raw or metric.task.kind != "classification":  # the other's are logged with its metrics
                logged = {f"test/{task}/{key}{raw}": value for key, value in values.items()}
                pl_module.log_dict(logged)
        for name, one in getattr(pl_module, "calibration", {}).items():
            metrics = pl_module.test_metrics[name]  # type: ignore[index]
            assert isinstance(metrics, TaskMetrics)
            with metrics.gathered():
                reached = _reached(metrics, one.thresholds)
            self.facts.setdefault(name, {}).update(temperature=one.temperature, images=one.images, thresholds=reached)
        if trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False):
            self._write(Path(self.folder or trainer.default_root_dir, "reliability.json"))

    def _write(self, file: Path) -> None:
        with whole(file) as part:
            part.write_text(json.dumps(_without_nan(self.facts), indent=1) + "\n")
        rows = {name: facts for name, facts in self.facts.items() if "ece_raw" in facts}
        if not rows:
            return
        table = Table("calibration", pad_edge=False, header_style="bold")
        for column in ("temperature", "ece raw", "ece", "nll raw", "nll"):
            table.add_column(column, justify="right")
        for name, facts in rows.items():
            numbers = [facts[key] for key in ("temperature", "ece_raw", "ece", "nll_raw", "nll")]
            table.add_row(name, *(f"{number:.3f}" for number in numbers))
        Console().print(table)


def _calibrated(pl_module: LightningModule) -> MultiTaskModule:
    """Return the module as one that has a place for a calibration.

    Raises:
        ConfigError: When it has none.
    """
    if not isinstance(pl_module, MultiTaskModule):
        raise ConfigError(f"Calibrate: a {type(pl_module).__name__} cannot be calibrated; use a MultiTaskModule")
    return pl_module


def _fits(trainer: Trainer) -> bool:
    return trainer.state.fn == "fit" and not trainer.sanity_checking


def _thresholds(metric: TaskMetrics, temperature: float, points: list[OperatingPoint]) -> dict[str, dict[str, float]]:
    """Return the thresholds of each class at every operating point that applies to the task."""
    found: dict[str, dict[str, float]] = {}
    for k, (name, chosen) in enumerate(_scores(metric, temperature).items()):
        values = {str(point): class_threshold(*chosen, point) for point in points}
        found[name] = {key: value for key, value in values.items() if value is not None}
        assert metric.classes[k] == name
    if isinstance(metric, DetectionMetrics):
        rows = metric.seen().rows
        for name, findings in zip(metric.classes, metric.findings(rows), strict=True):
            values = {str(point): box_threshold(findings, len(rows), point) for point in points}
            found[name] = {key: value for key, value in values.items() if value is not None}
    return found


def _reached(metric: TaskMetrics, thresholds: dict[str, dict[str, float]]) -> dict[str, dict[str, dict[str, float]]]:
    """Return each threshold with what it reaches on the images of a metric."""
    reached: dict[str, dict[str, dict[str, float]]] = {}
    for name, chosen in _scores(metric, 1.0).items():
        reached[name] = {
            p: {"threshold": t} | class_performance(*chosen, t) for p, t in thresholds.get(name, {}).items()
        }
    if isinstance(metric, DetectionMetrics):
        rows = metric.seen().rows
        for name, findings in zip(metric.classes, metric.findings(rows), strict=True):
            points = thresholds.get(name, {})
            reached[name] = {p: {"threshold": t} | box_performance(findings, len(rows), t) for p, t in points.items()}
    return reached


def _scores(metric: TaskMetrics, temperature: float) -> dict[str, tuple[Floats, Any]]:
    """Return the (tempered) probabilities and the truth of the labelled images of each class of a classification."""
    if not isinstance(metric, ClassificationMetrics):
        return {}
    rows = metric.seen().rows
    raw = metric.table("probabilities").numpy()[rows].astype(np.float64)
    probabilities = raw if temperature == 1 else tempered(raw, temperature, not metric.multi_label)
    labels = metric.table("labels").numpy()[rows]
    known = ~np.isnan(labels)
    return {name: (probabilities[known[:, k], k], labels[known[:, k], k] == 1) for k, name in enumerate(metric.classes)}


def _plain(diagram: Reliability) -> dict[str, list[float]]:
    parts = {name: getattr(diagram, name) for name in ("edges", "count", "confidence", "accuracy")}
    return {name: [float(value) for value in part] for name, part in parts.items()}


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value
