"""Keeps what ``test`` and ``validate`` saw of each image, for comparisons of runs patient by patient."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from mtmedformer.batch import Batch
from mtmedformer.metrics.base import TaskMetrics
from mtmedformer.metrics.calibration import CalibrationMetrics
from mtmedformer.metrics.referral import ReferralMetrics
from mtmedformer.metrics.rows import save_rows

KEPT = (
    ("calibration", "{}", ("classification", "segmentation"), CalibrationMetrics),
    ("raw", "raw/{}", ("classification", "segmentation"), CalibrationMetrics),
    ("referral", "{}", ("segmentation",), ReferralMetrics),
)
"""What is kept of each image's probabilities: its name, the output it is of, the kinds of task, the metric."""


class PerImageResults(Callback):
    """Writes ``test_rows.npz`` after ``test`` and ``val_rows.npz`` after ``validate`` into the run folder.

    The files hold scores and keyed hashes, neither pixels nor names; ``mtmedformer.metrics.rows`` reads them. After
    ``test`` there are also, of every task with probabilities, the bins and likelihoods of what was predicted
    (``<task>~calibration``), of what it would have been without a temperature where one was applied (``<task>~raw``),
    and of every mask how much it was in doubt (``<task>~referral``).

    Args:
        salt_file: File with the key of the hashes of images and patients, which stays out of configurations; runs to be
            compared need the same. ``None`` hashes without a key.
        folder: Where the files go; ``None`` is the trainer's ``default_root_dir``.
    """

    def __init__(self, salt_file: str | None = None, folder: str | None = None) -> None:
        self.salt_file, self.folder = salt_file, folder
        self._probabilities: dict[str, TaskMetrics] = {}

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start with empty tables."""
        self._probabilities = {}

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int, *args: Any
    ) -> None:
        """Keep how likely the truth was held, image by image."""
        if not isinstance(outputs, dict):
            return
        for name, task in getattr(pl_module, "tasks", {}).items():
            for kind, found, kinds, made in KEPT:
                if task.kind in kinds and found.format(name) in outputs:
                    key = f"{name}~{kind}"
                    if key not in self._probabilities:
                        self._probabilities[key] = made(task)
                    self._probabilities[key].update(outputs[found.format(name)], batch.targets[name], batch.meta)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the rows of the test images."""
        metrics: Mapping[str, Any] = pl_module.test_metrics  # type: ignore[assignment]
        self._write(trainer, "test", {**dict(metrics.items()), **self._probabilities})

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the rows of the validation images, under ``validate`` alone."""
        if trainer.state.fn == "validate":
            self._write(trainer, "val", pl_module.val_metrics)  # type: ignore[arg-type]

    def _write(self, trainer: Trainer, split: str, metrics: Mapping[str, Any]) -> None:
        """Gather the rows of all processes, and write them on the first."""
        known = {task: metric for task, metric in metrics.items() if isinstance(metric, TaskMetrics)}
        with ExitStack() as stack:
            for metric in known.values():
                stack.enter_context(metric.gathered())
            if trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False):
                salt = Path(self.salt_file).read_text() if self.salt_file else ""
                save_rows(known, Path(self.folder or trainer.default_root_dir, f"{split}_rows.npz"), salt)
