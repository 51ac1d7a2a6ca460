"""Tables of metrics on the screen after ``fit``, ``validate`` and ``test``, and ``test_metrics.json``."""

from __future__ import annotations

import json
import math
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.table import Table

from callbacks.evaluation.case_results import metrics_by_case
from callbacks.reports.subgroups import remarks, subgroups, with_interval
from mtmedformer.metrics.base import TaskMetrics
from mtmedformer.plots.terminal import SafeConsole

HIDDEN = ("sensitivity_at_", "map75", "n_")
"""Beginnings of the names of metrics that are logged and written, but not shown on the screen."""

HEADLINES = ("auroc", "balanced_accuracy", "map50", "froc", "dice", "hd95", "mae", "r2", "kappa")
"""Metrics of the table by site, view and group."""


class MetricsTable(Callback):
    """Prints the metrics of each task after ``fit`` (of the best epoch) and after ``validate``.

    Args:
        monitor: Metric that selects the best epoch; higher is better.
    """

    def __init__(self, monitor: str = "val/score") -> None:
        self.monitor = monitor
        self._best: dict[str, float] = {}
        self._epoch = 0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the metrics of the best epoch; in ``validate`` print them."""
        if trainer.sanity_checking:
            return
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        if not trainer.training and trainer.is_global_zero and trainer.state.fn == "validate":
            print_metrics(metrics, "val", "Validation")
        score, best = metrics.get(self.monitor, math.nan), self._best.get(self.monitor, -math.inf)
        if not self._best or score >= best:
            self._best, self._epoch = metrics, trainer.current_epoch + 1

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the metrics of the best epoch and the run folder."""
        if self._best and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            print_metrics(self._best, "val", f"Validation, best epoch ({self._epoch} of {trainer.current_epoch})")
            SafeConsole().print(f"Run folder: {trainer.default_root_dir}")

    def state_dict(self) -> dict[str, object]:
        """Return the best epoch so far, for a resumed run."""
        return {"best": self._best, "epoch": self._epoch}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Restore the best epoch of the interrupted run."""
        self._best, self._epoch = dict(state_dict["best"]), int(state_dict["epoch"])  # type: ignore[call-overload]


class MetricsReport(Callback):
    """Prints metrics after ``test`` with intervals over patients, also by group, and writes ``test_metrics.json``.

    Args:
        folder: The run folder.
        replicates: Bootstrap replicates over patients; 0 leaves the intervals out.
        seed: Seed of the bootstrap.
    """

    def __init__(self, folder: str | None = None, replicates: int = 1000, seed: int = 0) -> None:
        self.folder, self.replicates, self.seed = folder, replicates, seed
        self.values: dict[str, float] = {}
        """Content of the file, after a test."""

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute the values on every process; print and write them on the first one."""
        report: dict[str, float] = {}
        metrics = {k: m for k, m in pl_module.test_metrics.items() if isinstance(m, TaskMetrics)}  # type: ignore[operator, union-attr]
        for task, metric in metrics.items():
            values = metric.report(replicates=self.replicates, seed=self.seed)
            report.update({f"test/{task}/{key}": value for key, value in values.items()})
        for title, by_case in metrics_by_case(trainer).items():
            values = by_case.report(replicates=self.replicates, seed=self.seed)
            report.update({f"test/{title}/{key}": value for key, value in values.items()})
        self.values = report
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            file = Path(self.folder or trainer.default_root_dir, "test_metrics.json")
            file.parent.mkdir(parents=True, exist_ok=True)
            finite = {key: None if math.isnan(value) else value for key, value in report.items()}  # JSON has no NaN
            file.write_text(json.dumps(finite, indent=2, sort_keys=True) + "\n")
            print_metrics(report, "test", "Test, with 95 % intervals over patients")
            SafeConsole().print(f"Written: {file}")


def print_metrics(metrics: dict[str, float], split: str, title: str) -> None:
    """Print one table per task: one row per metric; columns for all classes, the interval, and each class.

    A second table has the values by site, view and group, where there are any. A task without a labelled image has a
    line instead of a table.

    Args:
        metrics: Values by ``<split>/<task>/<metric>[/<class> or /site=<site> or /view=<view>]``, with intervals under
            ``_ci_low`` and ``_ci_high``.
        split: ``val`` or ``test``.
        title: Printed above.
    """
    console = SafeConsole()
    console.print(f"\n{title}", style="bold")
    for task in dict.fromkeys(k.split("/")[1] for k in metrics if k.count("/") > 1):
        values = {k.split("/", 2)[2]: v for k, v in metrics.items() if k.startswith(f"{split}/{task}/")}
        if 0 in (values.get("n_images"), values.get("n_cases")):
            console.print(f"{task}: no image has a label for it; not measured")
            continue
        if "n_cases" in values:
            unlabelled = f", {values['n_unlabelled']:.0f} more without a label" if values.get("n_unlabelled") else ""
            counts = f"{values['n_images']:.0f} images, {values['n_cases']:.0f} labelled cases{unlabelled}"
            console.print(f"{task}: {counts}", highlight=False)
        console.print(_task_table(task, {k: v for k, v in values.items() if "=" not in k}))
        _print_groups(console, task, values)
    if f"{split}/score" in metrics:
        console.print(f"score (mean of the tasks' primary metrics): {_number(metrics[f'{split}/score'])}")


def _task_table(task: str, values: dict[str, float]) -> Table:
    plain = {k: v for k, v in values.items() if not k.endswith(("_ci_low", "_ci_high"))}
    rows = [k for k in dict.fromkeys(k.split("/")[0] for k in plain) if not k.startswith(HIDDEN)]
    groups = list(dict.fromkeys(k.split("/", 1)[1] for k in plain if "/" in k and k.split("/")[0] in rows))
    intervals = any(k.endswith("_ci_low") for k in values)
    table = Table(pad_edge=False, header_style="bold")
    table.add_column(task, style="bold")
    for column in ("all", *(["95 % interval"] if intervals else []), *groups):
        table.add_column(column, justify="right")
    for row in rows:
        cells = [_number(plain.get(row))]
        if intervals:
            low, high = values.get(f"{row}_ci_low"), values.get(f"{row}_ci_high")
            cells.append("" if low is None or high is None else f"{_number(low)} to {_number(high)}")
        table.add_row(row, *cells, *(_number(plain.get(f"{row}/{group}")) for group in groups))
    return table


def _print_groups(console: SafeConsole, task: str, values: dict[str, float]) -> None:
    """Print the values by group, and remarks on groups that are small or have one class only."""
    groups = subgroups(values)
    if not groups:
        return
    rows = [k for k in dict.fromkeys(k.split("/")[0] for k in values if "=" in k) if not k.startswith(HIDDEN)]
    rows = [row for row in rows if not row.endswith(("_ci_low", "_ci_high"))]
    shown = [row for row in rows if row in HEADLINES] or rows[:4]
    table = Table(pad_edge=False, header_style="bold")
    table.add_column(f"{task} by", style="bold")
    classes = list(dict.fromkeys(name for group in groups for name in group.counts))
    counted = len(classes) > 1
    unit = "cases" if "n_cases" in values else "images"
    sized = any(group.images is not None for group in groups)
    for column in [*[unit, "patients"] * sized, *[" / ".join(classes)] * counted, *shown]:
        table.add_column(column, justify="right")
    for group in groups:
        counts = [" / ".join(str(group.counts.get(name, 0)) for name in classes)] * counted
        first = [with_interval(values, row, group) for row in shown[:1]]
        rest = [_number(values.get(f"{row}{group.key}", math.nan)) for row in shown[1:]]
        sizes = ["–" if n is None else str(n) for n in (group.images, group.patients)] * sized
        table.add_row(str(group), *sizes, *counts, *first, *rest)
    console.print(table)
    for remark in remarks(groups, values):
        console.print(f"{task}: {remark}", highlight=False)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return "–" if math.isnan(value) else f"{value:.3f}"
