"""Report and model card after ``test``.

The report is ``report.html`` in the run folder. In the run folder of a federation, whose own report has that name, it
is ``test_report.html``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from callbacks.evaluation.case_results import metrics_by_case
from callbacks.evaluation.familiarity import Familiarity, TestDrift
from callbacks.reports.cases import Case, case_figure, prediction_quality, select_cases
from callbacks.reports.environment import versions
from callbacks.reports.metrics_table import MetricsReport
from callbacks.reports.model_card import model_card
from callbacks.reports.model_evaluation import DataDescription, ModelDescription, ModelEvaluation, TaskEvaluation
from callbacks.reports.model_page import model_page
from callbacks.reports.ranking_curves import TaskCurves, task_curves
from callbacks.reports.reliability_report import ReliabilityReport, TaskReliability
from callbacks.reports.shown_images import shown_classes
from mtmedformer.batch import Batch, collate
from mtmedformer.metrics.base import TaskMetrics, known_mean
from mtmedformer.module import MultiTaskModule
from mtmedformer.plots.html import Html, figure, write_page
from mtmedformer.plots.style import class_colours
from mtmedformer.plots.terminal import SafeConsole
from mtmedformer.protocols import DescribedData
from mtmedformer.storage.shared_config import without_paths


class ModelReport(Callback):
    """Writes ``report.html`` and ``model_card.md`` after ``test``.

    Contents: data and splits, leak check, metrics with intervals by task, class, site and view, curves, calibration,
    the best, median and worst images with truth and prediction, excluded items, configuration, versions, limitations.
    Images are named by their position in the test set, never by file or patient. **The pictures show test images**:
    check them for burned-in text before the page is passed on, or set ``cases`` to false.

    Args:
        folder: The run folder; ``None`` is the trainer's ``default_root_dir``.
        cases: Whether to show images.
    """

    def __init__(self, folder: str | None = None, cases: bool = True) -> None:
        self.folder, self.cases = folder, cases
        self._cases: dict[str, list[Case]] = {}
        self._images_seen = 0
        self._curves: dict[str, TaskCurves] = {}

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset cases and curves."""
        self._cases, self._images_seen, self._curves = {}, 0, {}

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int, *args: Any
    ) -> None:
        """Rate the prediction of each image; on several processes, of the images of the first one."""
        if not isinstance(pl_module, MultiTaskModule) or not trainer.is_global_zero:
            return
        for name, task in pl_module.tasks.items():
            for i in range(len(batch.meta)):
                quality = prediction_quality(task, outputs[name], batch.targets[name], i)
                if quality is not None:
                    shown = tuple(sorted(c for _, c in shown_classes(batch, i, {name: task})))
                    self._cases.setdefault(name, []).append(Case(quality, self._images_seen + i, shown))
        self._images_seen += len(batch.meta)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute the curves of every task, on every process."""
        for name, metric in _metrics(pl_module).items():
            with metric.gathered():
                self._curves[name] = task_curves(metric)
        for name, by_case in metrics_by_case(trainer).items():
            with by_case.gathered():
                self._curves[name] = task_curves(by_case.pooled())

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the report and the card, on the first process."""
        if not isinstance(pl_module, MultiTaskModule) or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folder = Path(self.folder or trainer.default_root_dir)
        evaluation = self.evaluation(trainer, pl_module)
        federated = (folder / "report.json").is_file()
        page = folder / ("test_report.html" if federated else "report.html")
        pictures = self._pictures(trainer, pl_module) if self.cases else {}
        write_page(page, model_page(evaluation, pictures, class_colours(pl_module.tasks.values())))
        write_page(folder / "model_card.md", model_card(evaluation, page.name))
        SafeConsole().print(f"Written: {page} and {folder / 'model_card.md'}", markup=False, soft_wrap=True)

    def evaluation(self, trainer: Trainer, module: MultiTaskModule) -> ModelEvaluation:
        """Return the results of the test that just ended."""
        metrics = _metrics(module)
        values = {name: _values(metric) for name, metric in metrics.items()}
        reliability: dict[str, TaskReliability] = {}
        printed: dict[str, float] = {}
        drift: TestDrift | None = None
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, MetricsReport) and callback.values:
                printed = callback.values
                values = {name: _of_task(printed, name) for name in metrics}
            elif isinstance(callback, ReliabilityReport):
                reliability = callback.tasks
            elif isinstance(callback, Familiarity):
                drift = callback.drift
        tasks = {
            name: TaskEvaluation(
                kind=module.tasks[name].kind,
                classes=module.tasks[name].classes,
                primary=metric.primary,
                values=values[name],
                curves=self._curves[name],
                reliability=reliability.get(name, TaskReliability()),
                unit=module.tasks[name].unit,
            )
            for name, metric in metrics.items()
        }
        for name, by_case in metrics_by_case(trainer).items():
            tasks[name] = TaskEvaluation(
                kind=by_case.task.kind,
                classes=by_case.task.classes,
                primary=by_case.metric.primary,
                values=_of_task(printed, name) or _values(by_case.metric),
                curves=self._curves[name],
                by_case=True,
                unit=by_case.task.unit,
            )
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        return ModelEvaluation(
            tasks=tasks,
            score=known_mean(tasks[name].value(metric.primary) for name, metric in metrics.items()),
            data=DataDescription.by_site(data.describe() if isinstance(data, DescribedData) else {}),
            model=_model_description(trainer, module),
            config=_config(Path(self.folder or trainer.default_root_dir)),
            versions=versions(),
            drift=drift,
        )

    def _pictures(self, trainer: Trainer, module: MultiTaskModule) -> dict[str, Html]:
        """Return the selected images of every task; they are read and predicted once more."""
        loader: Any = trainer.test_dataloaders
        pictures: dict[str, Html] = {}
        if not isinstance(loader, DataLoader) or loader.batch_sampler is None:  # a position must identify an image
            return pictures
        order = [index for indices in loader.batch_sampler for index in indices]
        for name, task in module.tasks.items():
            cases = select_cases(self._cases.get(name, []), task.classes)
            if not cases:
                continue
            samples = [loader.dataset[order[case.position]] for case in cases.values()]
            batches = [collate([sample], module.tasks) for sample in samples]
            with torch.inference_mode():
                predictions = [module.predict_whole(batch.image.to(module.device)) for batch in batches]
            drawn = case_figure(task, cases, batches, predictions, class_colours(module.tasks.values()))
            pictures[name] = figure(drawn, "", f"{', '.join(cases)} test image of {name}", raster=True)
        return pictures


def _metrics(module: LightningModule) -> dict[str, TaskMetrics]:
    if not isinstance(module, MultiTaskModule):
        return {}
    return {name: metric for name, metric in module.test_metrics.items() if isinstance(metric, TaskMetrics)}


def _values(metric: TaskMetrics) -> dict[str, float]:
    """Return the values of a metric without intervals."""
    return {key: float(value) for key, value in metric.compute().items()}


def _of_task(values: dict[str, float], task: str) -> dict[str, float]:
    start = f"test/{task}/"
    return {key.removeprefix(start): value for key, value in values.items() if key.startswith(start)}


def _model_description(trainer: Trainer, module: MultiTaskModule) -> ModelDescription:
    members = [module, *module.members]
    ensemble = f", ensemble of {len(members)}" if module.members else ""
    return ModelDescription(
        name=type(module).__name__ + ensemble,
        encoder=", ".join(dict.fromkeys(one.encoder.name for one in members)),
        parameters=sum(p.numel() for one in members for p in one.parameters()),
        checkpoint=Path(str(trainer.ckpt_path)).name if trainer.ckpt_path else "no checkpoint",
        calibrated=[name for name, one in module.calibration.items() if one.temperature is not None],
    )


def _config(folder: Path) -> str:
    """Return the configuration of the training, or else of the test, as text, without the paths of this computer."""
    for name in ("config.yaml", "config_test.yaml"):
        if (folder / name).is_file():
            config = yaml.safe_load((folder / name).read_text(encoding="utf-8"))
            return yaml.safe_dump(without_paths(config), sort_keys=False, allow_unicode=True)
    return ""
