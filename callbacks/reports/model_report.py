"""After ``test``: a report and a model card, so that somebody who was not there knows what the model can and cannot do.

The report is ``report.html`` in the run folder. Where a federation's report of that name lies, it is
``test_report.html`` beside it: neither takes the other's place.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console

from callbacks.evaluation.calibrate import ReliabilityReport
from callbacks.reports.cases import Case, case_figure, chosen, quality
from callbacks.reports.environment import versions
from callbacks.reports.metrics_table import MetricsReport
from callbacks.reports.model_card import model_card
from callbacks.reports.model_page import model_page
from callbacks.reports.ranking_curves import curves_of
from mtmedformer.batch import Batch, collate
from mtmedformer.metrics.base import TaskMetrics
from mtmedformer.plots.html import Html, figure, join, write_page

Facts = dict[str, Any]


class ModelReport(Callback):
    """Writes ``report.html`` and ``model_card.md`` after ``test``.

    Data and splits, leak check, metrics with intervals by task, class, site and view, curves, calibration, the best,
    median and worst images with truth and prediction, what was left out, configuration, versions, limits. Images are
    named by their place in the test set, never by a file or a patient. **The pictures are of test images**: look for
    burned-in text before the page leaves the house, or set ``cases`` to false.

    Args:
        folder: The run folder; ``None`` is the trainer's ``default_root_dir``.
        cases: Whether to show images.
    """

    def __init__(self, folder: str | None = None, cases: bool = True) -> None:
        self.folder, self.cases = folder, cases
        self._cases: dict[str, list[Case]] = {}
        self._seen = 0
        self._curves: Facts = {}

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start with no cases."""
        self._cases, self._seen, self._curves = {}, 0, {}

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int, *args: Any
    ) -> None:
        """Note how good the prediction of each image is; on several processes, of the first one's images."""
        if not isinstance(outputs, dict) or not trainer.is_global_zero:
            return
        for name, task in _tasks(pl_module).items():
            for i in range(len(batch.meta)):
                good = quality(task, outputs[name], batch.targets[name], i) if name in outputs else None
                if good is not None:
                    self._cases.setdefault(name, []).append((good, self._seen + i))
        self._seen += len(batch.meta)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the curves of every task; every process takes part."""
        for name, metric in _metrics(pl_module).items():
            with metric.gathered():
                self._curves[name] = curves_of(metric)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the report and the card, on the first process."""
        if not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False) or not _metrics(pl_module):
            return
        folder = Path(self.folder or trainer.default_root_dir)
        told = self.facts(trainer, pl_module)
        federated = (folder / "report.json").is_file()
        page = folder / ("test_report.html" if federated else "report.html")
        shown = self._pictures(trainer, pl_module) if self.cases else {}
        write_page(page, model_page(told, shown))
        write_page(folder / "model_card.md", model_card(told, page.name))
        Console().print(f"Written: {page} and {folder / 'model_card.md'}", markup=False, soft_wrap=True)

    def facts(self, trainer: Trainer, pl_module: LightningModule) -> Facts:
        """Return everything the report and the card tell, but for the pictures."""
        data: Any = getattr(trainer, "datamodule", None)
        described = data.describe() if hasattr(data, "describe") else {}
        metrics = _metrics(pl_module)
        table = next((c for c in _callbacks(trainer) if isinstance(c, MetricsReport)), None)
        values = dict(table.values) if table and table.values else _plain_values(metrics)
        calibration = next((c for c in _callbacks(trainer) if isinstance(c, ReliabilityReport)), None)
        return {
            "tasks": {
                name: {"kind": task.kind, "classes": list(task.classes), "primary": metrics[name].primary}
                for name, task in _tasks(pl_module).items()
                if name in metrics
            },
            "values": {key.removeprefix("test/"): value for key, value in values.items()},
            "score": _score(values, {name: metric.primary for name, metric in metrics.items()}),
            "curves": self._curves,
            "reliability": dict(calibration.facts) if calibration else {},
            "data": described.get("parts") or ({"": described} if described else {}),
            "model": _model(trainer, pl_module),
            "config": _config(Path(self.folder or trainer.default_root_dir)),
            "versions": versions(),
        }

    def _pictures(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Html]:
        """Return the cases of every task as pictures; images are read and predicted once more."""
        loader: Any = trainer.test_dataloaders
        shown: dict[str, Html] = {}
        if getattr(loader, "batch_sampler", None) is None:  # several loaders, or a stream: no place leads to an image
            return shown
        order = [index for indices in loader.batch_sampler for index in indices]
        for name, task in _tasks(pl_module).items():
            picked = chosen(self._cases.get(name, []))
            if not picked:
                continue
            samples = [loader.dataset[order[place]] for _, place in picked.values()]
            batches = [collate([sample], pl_module.tasks) for sample in samples]  # type: ignore[arg-type]
            with torch.inference_mode():
                predictions = [pl_module.predict_whole(b.image.to(pl_module.device)) for b in batches]  # type: ignore[operator]
            drawn = case_figure(task, picked, batches, predictions)
            shown[name] = figure(drawn, "", f"{', '.join(picked)} test image of {name}", raster=True)
        return {name: join(picture) for name, picture in shown.items()}


def _callbacks(trainer: Trainer) -> list[Callback]:
    return list(trainer.callbacks)  # type: ignore[attr-defined]


def _tasks(pl_module: LightningModule) -> dict[str, Any]:
    return dict(getattr(pl_module, "tasks", {}))


def _metrics(pl_module: LightningModule) -> dict[str, TaskMetrics]:
    metrics = getattr(pl_module, "test_metrics", {})
    return {name: metric for name, metric in metrics.items() if isinstance(metric, TaskMetrics)}


def _plain_values(metrics: dict[str, TaskMetrics]) -> dict[str, float]:
    """Return the metrics without intervals, where nobody made any."""
    return {f"test/{t}/{k}": float(v) for t, metric in metrics.items() for k, v in metric.compute().items()}


def _score(values: dict[str, float], primary: dict[str, str]) -> float:
    known = [values.get(f"test/{task}/{name}", math.nan) for task, name in primary.items()]
    known = [value for value in known if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _model(trainer: Trainer, pl_module: LightningModule) -> Facts:
    encoder = getattr(pl_module, "encoder", None)
    checkpoint = Path(str(trainer.ckpt_path)) if trainer.ckpt_path else None
    calibrated = [name for name, one in getattr(pl_module, "calibration", {}).items() if one.temperature is not None]
    return {
        "class": type(pl_module).__name__,
        "encoder": getattr(encoder, "name", type(encoder).__name__),
        "parameters": sum(p.numel() for p in pl_module.parameters()),
        "checkpoint": checkpoint.name if checkpoint else "none: the weights the module had",
        "calibrated": calibrated,
    }


def _config(folder: Path) -> str:
    """Return the configuration the model was trained with, or else tested with, as it was written."""
    for name in ("config.yaml", "config_test.yaml"):
        if (folder / name).is_file():
            return (folder / name).read_text()
    return ""
