"""Results of ``test`` by case: the scores of the images of an exam or a breast are pooled, then measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from mtmedformer.batch import Batch
from mtmedformer.heads.base import TaskHead
from mtmedformer.heads.capabilities import GroupsImages
from mtmedformer.metrics.cases import CasedData, CaseMetrics, CaseRule
from mtmedformer.module import MultiTaskModule

BY_CASE = "{} by case"
"""Name of the results of a task by case, beside those by image."""


class CaseResults(Callback):
    """Measures classifications and regressions by case in ``test``, where ``data.case`` names the cases.

    `MetricsReport` prints and writes the results under ``<task> by case``, and the report shows them; they are logged
    as ``test/<task> by case/<metric>``.

    Attributes:
        metrics: Metrics by name, for the tasks of the model that are pooled.
    """

    def __init__(self) -> None:
        self.metrics: dict[str, CaseMetrics] = {}

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make fresh metrics."""
        self.metrics = {}
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(pl_module, MultiTaskModule) and isinstance(data, CasedData) and data.case:
            for name, task in pl_module.tasks.items():
                head = pl_module.heads[name]
                if task.kind in ("classification", "regression") and isinstance(head, TaskHead):
                    rule = CaseRule("mean") if isinstance(head, GroupsImages) else data.case_rule
                    labels = replace(rule, negative=data.case_rule.negative)
                    self.metrics[name] = CaseMetrics(task, labels, head.metrics())

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int, *args: Any
    ) -> None:
        """Add the images of a batch, labelled or not."""
        for name, metric in self.metrics.items():
            metric.update(outputs[name], batch.targets[name], batch.meta)  # type: ignore[arg-type]

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the values, on every process."""
        for name, metric in self.metrics.items():
            with metric.gathered():
                values = metric.pooled().compute()
            title = BY_CASE.format(name)
            pl_module.log_dict({f"test/{title}/{key}": value for key, value in values.items()}, sync_dist=False)


def metrics_by_case(trainer: Trainer) -> dict[str, CaseMetrics]:
    """Return the metrics by case of a test that has ended, by ``<task> by case``; empty where there are no cases."""
    found = (one for one in trainer.callbacks if isinstance(one, CaseResults))  # type: ignore[attr-defined]
    return {BY_CASE.format(name): metric for one in found for name, metric in one.metrics.items()}
