"""A table of metrics a person can read, at the end of fit and of test, and ``test_metrics.json``."""

from __future__ import annotations

import json
import math
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table

from mtmedformer.metrics.task_metrics import TaskMetrics


class MetricsTable(Callback):
    """Prints each task's metrics after ``fit`` (the best epoch) and after ``validate``.

    Args:
        monitor: The metric that says which epoch is best; higher is better.
    """

    def __init__(self, monitor: str = "val/score") -> None:
        self.monitor = monitor
        self._best: dict[str, float] = {}
        self._epoch = 0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the best epoch's metrics; under ``validate`` print them."""
        if trainer.sanity_checking:
            return
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        if not trainer.training and trainer.is_global_zero and trainer.state.fn == "validate":
            print_metrics(metrics, "val", "Validation")
        score, best = metrics.get(self.monitor, math.nan), self._best.get(self.monitor, -math.inf)
        if not self._best or score >= best:
            self._best, self._epoch = metrics, trainer.current_epoch + 1

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the best epoch's metrics and where everything lies."""
        if self._best and trainer.is_global_zero and not trainer.fast_dev_run:
            print_metrics(self._best, "val", f"Validation, best epoch ({self._epoch} of {trainer.current_epoch})")

    def state_dict(self) -> dict[str, object]:
        """Return the best epoch so far, so that a resumed run remembers it."""
        return {"best": self._best, "epoch": self._epoch}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Take up the best epoch of the interrupted run."""
        self._best, self._epoch = dict(state_dict["best"]), int(state_dict["epoch"])  # type: ignore[call-overload]


class TestReport(Callback):
    """After ``test``: patient-level intervals, values per site and view, a table, and ``test_metrics.json``.

    Args:
        folder: The run folder.
        replicates: Bootstrap replicates over patients; 0 leaves the intervals out.
        seed: Seed of the bootstrap.
    """

    __test__ = False  # not a pytest class

    def __init__(self, folder: str | None = None, replicates: int = 1000, seed: int = 0) -> None:
        self.folder, self.replicates, self.seed = folder, replicates, seed

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute the report on every process, print and write it on the first."""
        report: dict[str, float] = {}
        metrics = {k: m for k, m in pl_module.test_metrics.items() if isinstance(m, TaskMetrics)}  # type: ignore[operator, union-attr]
        for task, metric in metrics.items():
            values = metric.report(replicates=self.replicates, seed=self.seed)
            report.update({f"test/{task}/{key}": value for key, value in values.items()})
        if trainer.is_global_zero and not trainer.fast_dev_run:
            file = Path(self.folder or trainer.log_dir or trainer.default_root_dir, "test_metrics.json")
            file.parent.mkdir(parents=True, exist_ok=True)
            finite = {key: None if math.isnan(value) else value for key, value in report.items()}  # JSON has no NaN
            file.write_text(json.dumps(finite, indent=2, sort_keys=True) + "\n")
            print_metrics(report, "test", "Test, with 95 % intervals over patients")
            Console().print(f"Written: {file}")


def print_metrics(metrics: dict[str, float], split: str, title: str) -> None:
    """Print one block a task: its metrics with their intervals, then the values by class, site and view."""
    table = Table(title=title, title_justify="left", title_style="bold", pad_edge=False)
    for column, justify in (("task", "left"), ("metric", "left"), ("value", "right"), ("95 % interval", "left")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    intervals = any(k.endswith("_ci_low") for k in metrics)
    if not intervals:
        table.columns.pop()
    tasks = dict.fromkeys(k.split("/")[1] for k in metrics if k.count("/") > 1)
    for task in tasks:
        prefix, name = f"{split}/{task}/", task
        for key, value in metrics.items():
            metric = key.removeprefix(prefix)
            if not key.startswith(prefix) or metric.endswith(("_ci_low", "_ci_high")):
                continue
            cells = [name, metric, _number(value)]
            low, high = metrics.get(f"{key}_ci_low"), metrics.get(f"{key}_ci_high")
            if intervals:
                cells.append(f"{_number(low)} – {_number(high)}" if low is not None and high is not None else "")
            table.add_row(*cells)
            name = ""
        table.add_section()
    if f"{split}/score" in metrics:
        table.add_row("all", "score", _number(metrics[f"{split}/score"]), *([""] if intervals else []))
    Console().print(table)


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"
