"""Results of each image of ``test`` and ``validate``, for comparisons of runs by patient."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from mtmedformer.batch import Batch, Task
from mtmedformer.metrics.base import TaskMetrics
from mtmedformer.metrics.calibration import CalibrationMetrics
from mtmedformer.metrics.referral import ReferralMetrics
from mtmedformer.metrics.rows import save_rows

ADDITIONAL = (
    ("calibration", "{}", ("classification", "segmentation", "regression"), CalibrationMetrics),
    ("raw", "raw/{}", ("classification", "segmentation", "regression"), CalibrationMetrics),
    ("referral", "{}", ("segmentation",), ReferralMetrics),
)
"""Additional results per image of probabilistic tasks: name, key of the prediction, kinds of task, metric."""


class PerImageResults(Callback):
    """Writes ``test_rows.npz`` after ``test`` and ``val_rows.npz`` after ``validate`` into the run folder.

    The files hold scores and keyed hashes, neither pixels nor names; ``mtmedformer.metrics.rows`` reads them. After
    ``test`` they also hold, for every task with probabilities, calibration bins and likelihoods
    (``<task>~calibration``), the same without the temperature where one is applied (``<task>~raw``), and uncertainties
    of every mask (``<task>~referral``).

    Args:
        salt_file: File with the key of the hashes of images and patients; a file, because the key must not be in a
            configuration. Runs that are compared need the same key. ``None`` hashes without a key.
        folder: Folder of the files; ``None`` is the trainer's ``default_root_dir``.
    """

    def __init__(self, salt_file: str | None = None, folder: str | None = None) -> None:
        self.salt_file, self.folder = salt_file, folder
        self._probabilities: dict[str, TaskMetrics] = {}

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the tables."""
        self._probabilities = {}

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int, *args: Any
    ) -> None:
        """Add the probabilities of a batch."""
        tasks: Mapping[str, Task] = pl_module.tasks  # type: ignore[assignment]
        for name, task in tasks.items():
            for kind, prediction, kinds, metric_class in ADDITIONAL:
                if task.probabilistic and task.kind in kinds and prediction.format(name) in outputs:
                    key = f"{name}~{kind}"
                    if key not in self._probabilities:
                        self._probabilities[key] = metric_class(task)
                    self._probabilities[key].update(outputs[prediction.format(name)], batch.targets[name], batch.meta)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the results of the test images."""
        metrics: Mapping[str, Any] = pl_module.test_metrics  # type: ignore[assignment]
        self._write(trainer, "test", {**dict(metrics.items()), **self._probabilities})

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the results of the validation images, only in ``validate``."""
        if trainer.state.fn == "validate":
            self._write(trainer, "val", pl_module.val_metrics)  # type: ignore[arg-type]

    def _write(self, trainer: Trainer, split: str, metrics: Mapping[str, Any]) -> None:
        """Gather the results of all processes, and write them on the first one."""
        known = {task: metric for task, metric in metrics.items() if isinstance(metric, TaskMetrics)}
        with ExitStack() as stack:
            for metric in known.values():
                stack.enter_context(metric.gathered())
            if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
                salt = Path(self.salt_file).read_text() if self.salt_file else ""
                save_rows(known, Path(self.folder or trainer.default_root_dir, f"{split}_rows.npz"), salt)
