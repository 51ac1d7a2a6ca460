"""Calibration on validation images during training: a temperature or an interval per task, thresholds per class."""

from __future__ import annotations

from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer

from mtmedformer.batch import Batch
from mtmedformer.calibration import (
    OperatingPoint,
    TaskCalibration,
    box_threshold,
    class_threshold,
    conformal_margin,
    fit_temperature,
    tempered,
)
from mtmedformer.errors import ConfigError
from mtmedformer.heads.capabilities import Calibratable
from mtmedformer.metrics.base import TaskMetrics
from mtmedformer.metrics.calibration import LOG_TEMPERATURES, TemperatureSums
from mtmedformer.metrics.classification import ClassificationMetrics
from mtmedformer.metrics.curves import Floats
from mtmedformer.metrics.detection import DetectionMetrics
from mtmedformer.metrics.regression import RegressionMetrics
from mtmedformer.module import MultiTaskModule

POINTS = ("sensitivity=0.9", "youden", "f1", "fp_per_image=1")


class Calibrate(Callback):
    """Fits one temperature per task and thresholds per class after every validation, for the validated weights.

    Checkpoints written afterwards hold them; ``test`` and ``predict`` use them. Images without a label for a task are
    ignored for it. Classes, masks and grades get a temperature; box scores are only a ranking and get thresholds alone.
    Numbers get an interval of constant width (split conformal prediction).
    Temperatures are fitted to sums over images (``TemperatureSums``), so that sites of a federation share only sums.

    Args:
        operating_points: Operating points to find thresholds for. Classes: ``sensitivity=0.9``, ``specificity=0.95``,
            ``youden``, ``f1``. Boxes: ``sensitivity=0.9``, ``f1``, ``fp_per_image=1``. ``None`` is
            ``sensitivity=0.9``, ``youden``, ``f1`` and ``fp_per_image=1``.
        prior: Standard deviation of the Gaussian prior of the log temperature; ``None`` is no prior.
        coverage: Share of images whose true number the interval holds, in (0, 1).

    Raises:
        ConfigError: An operating point cannot be parsed, or ``coverage`` is out of its range.
    """

    def __init__(
        self, operating_points: list[str] | None = None, prior: float | None = 0.5, coverage: float = 0.9
    ) -> None:
        if not 0 < coverage < 1:
            raise ConfigError(f"Calibrate: coverage is {coverage}; it must be above 0 and below 1, for example 0.9")
        self.coverage = coverage
        self.operating_points = [OperatingPoint.parse(text) for text in operating_points or POINTS]
        self.prior = prior
        self._sums: dict[str, TemperatureSums] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a module that cannot be calibrated."""
        _calibrated(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remove the calibration, because the weights change."""
        _calibrated(pl_module).calibration = {}

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the sums."""
        tasks = _calibrated(pl_module).tasks
        self._sums = {name: TemperatureSums(task) for name, task in tasks.items() if task.probabilistic}

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int, *args: Any
    ) -> None:
        """Add the labelled images of a batch to the sums, by their logits at the size of the network input."""
        if not _fits(trainer):
            return
        size = (int(batch.image.shape[-2]), int(batch.image.shape[-1]))
        for name, sums in self._sums.items():
            head = _calibrated(pl_module).heads[name]
            if isinstance(head, Calibratable):
                sums.update(head.class_logits(outputs[name], size), batch.targets[name], batch.meta)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fit every task; log the temperature and the calibrated likelihood."""
        if not _fits(trainer):
            return
        module = _calibrated(pl_module)
        fitted = {name: self._fitted(module, name) for name in module.tasks}
        module.calibration = {name: one for name, one in fitted.items() if one.images}
        for name, one in module.calibration.items():
            if one.temperature is not None and one.nll is not None:
                module.log_dict({f"val/{name}/temperature": one.temperature, f"val/{name}/nll_calibrated": one.nll})

    def _fitted(self, module: MultiTaskModule, name: str) -> TaskCalibration:
        """Return the calibration of a task; every process has to call it."""
        metric = module.val_metrics[name]
        assert isinstance(metric, TaskMetrics)
        if name not in self._sums:
            with metric.gathered():
                rows = metric.seen().rows
                if isinstance(metric, RegressionMetrics):
                    predicted, truth = metric.pairs(rows)
                    margin = conformal_margin(predicted - truth, self.coverage)
                    return TaskCalibration(len(rows), margin=margin, coverage=None if margin is None else self.coverage)
                return TaskCalibration(len(rows), thresholds=_thresholds(metric, 1.0, self.operating_points))
        with self._sums[name].gathered(), metric.gathered():
            curve, decisions, images = self._sums[name].sums()
            if not decisions:
                return TaskCalibration(0)
            temperature, nll = fit_temperature(curve, decisions, images, self.prior)
            raw = float(curve[len(LOG_TEMPERATURES) // 2, 0] / decisions)
            return TaskCalibration(
                images,
                temperature,
                raw,
                nll,
                thresholds=_thresholds(metric, temperature, self.operating_points),
            )


def _calibrated(pl_module: LightningModule) -> MultiTaskModule:
    """Return the module as a ``MultiTaskModule``.

    Raises:
        ConfigError: It is of another class and has no calibration.
    """
    if not isinstance(pl_module, MultiTaskModule):
        raise ConfigError(f"Calibrate: a {type(pl_module).__name__} cannot be calibrated; use a MultiTaskModule")
    return pl_module


def _fits(trainer: Trainer) -> bool:
    return trainer.state.fn == "fit" and not trainer.sanity_checking


def _thresholds(metric: TaskMetrics, temperature: float, points: list[OperatingPoint]) -> dict[str, dict[str, float]]:
    """Return the thresholds of each class at every operating point that applies to the task."""
    thresholds: dict[str, dict[str, float]] = {}
    for k, (name, (scores, truth)) in enumerate(labelled_scores(metric, temperature).items()):
        values = {str(point): class_threshold(scores, truth, point) for point in points}
        thresholds[name] = {key: value for key, value in values.items() if value is not None}
        assert metric.classes[k] == name
    if isinstance(metric, DetectionMetrics):
        rows = metric.seen().rows
        for name, findings in zip(metric.classes, metric.findings(rows), strict=True):
            values = {str(point): box_threshold(findings, len(rows), point) for point in points}
            thresholds[name] = {key: value for key, value in values.items() if value is not None}
    return thresholds


def labelled_scores(metric: TaskMetrics, temperature: float = 1.0) -> dict[str, tuple[Floats, Any]]:
    """Return probabilities, scaled by a temperature, and truth of the labelled images of each class.

    Other kinds of tasks than classification give no entries.
    """
    if not isinstance(metric, ClassificationMetrics):
        return {}
    rows = metric.seen().rows
    raw = metric.table("probabilities").numpy()[rows].astype(np.float64)
    probabilities = raw if temperature == 1 else tempered(raw, temperature, not metric.multi_label)
    labels = metric.table("labels").numpy()[rows]
    known = ~np.isnan(labels)
    return {name: (probabilities[known[:, k], k], labels[known[:, k], k] == 1) for k, name in enumerate(metric.classes)}
