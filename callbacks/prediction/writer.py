"""Writes predictions of ``mtmedformer predict`` in the frame of the original images, as they come."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console

import mtmedformer
from callbacks.prediction.dicom.identity import Identity
from callbacks.prediction.dicom.outputs import DicomOutputs
from callbacks.prediction.image_outputs import ImageOutputs, Source
from callbacks.prediction.prediction_files import PredictionFolder, predictions_root
from mtmedformer.batch import Batch, Task
from mtmedformer.calibration import plain
from mtmedformer.inference.results import NOTE, findings
from mtmedformer.storage.hashing import weights_digest

log = logging.getLogger(__name__)

LEAST = 0.4
"""Score from which a box counts where nothing says better."""


class PredictionWriter(Callback):
    """Writes each image's predictions as they come, and goes on where an earlier run was interrupted.

    ``masks/<task>/`` has one PNG an image and class, ``overlays/`` one picture an image, ``dicom/`` one DICOM
    segmentation and one report an image, ``images/`` one JSON an image, written last. ``predictions.csv`` (class
    probabilities, numbers of boxes, areas, uncertainty), ``boxes.json`` (COCO) and ``failed.csv`` are made of the JSON
    files at the end, after an interruption too.

    Images are skipped as done where the data set can leave them out (as ``--images`` has it); otherwise the folder's
    earlier predictions are replaced.

    Args:
        folder: Where everything goes; ``null`` is ``predictions`` in the run folder.
        score: Boxes below this score are left out altogether.
        threshold: Score from which a box counts in the CSV and the report, and is drawn. ``null`` takes for each class
            what the checkpoint's calibration found best (F1), or 0.4 where it says nothing.
        operating_point: The calibration's operating point at which a class counts as found in the CSV.
        overlays: Draw a picture an image.
        dicom: Write a segmentation and a report for images that are DICOM files.
        codes: Codes of classes in DICOM objects, ``{class: [value, scheme, meaning]}``, besides those known.

    Attributes:
        exit_code: What the command line returns: 3 where an image failed.
    """

    def __init__(
        self,
        folder: str | None = None,
        score: float = 0.05,
        threshold: float | None = None,
        operating_point: str = "youden",
        overlays: bool = False,
        dicom: bool = False,
        codes: dict[str, tuple[str, str, str]] | None = None,
    ) -> None:
        self.predictions_root, self.score, self.threshold = folder, score, threshold
        self.operating_point = operating_point
        self.overlays, self.dicom, self.codes = overlays, dicom, codes or {}
        self.exit_code = 0
        self._tasks: dict[str, Task] = {}
        self._files: dict[str, Path] = {}
        self._told = 0
        self._outputs: ImageOutputs | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have the data set ask for what is done, once the weights are loaded; that is only after all ``setup``."""
        self._outputs = None
        data: Any = getattr(trainer, "datamodule", None)
        if stage == "predict" and hasattr(data, "skip_finished"):
            data.skip_finished(lambda files: self._done(trainer, pl_module, files))

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace what the folder holds, where the data set does not ask for what is done."""
        if self._outputs is None:
            self._prepare(trainer, pl_module, resume=False)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int, *args: Any
    ) -> None:
        """Write a batch's predictions, and list what could not be read meanwhile."""
        assert self._outputs is not None
        for i, meta in enumerate(batch.meta):
            found = findings(outputs, i, meta, self._tasks, self.score)
            image = batch.image[i].float().mean(dim=0).cpu().numpy()
            self._outputs.write(found, image, self._source(trainer, meta.id))
        self._list_failures(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the tables, once every process is through."""
        if stage == "predict" and self._outputs is not None:
            self._list_failures(trainer)
            trainer.strategy.barrier("predictions written")
            self._make_tables(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Make the tables of what is there so far."""
        if self._outputs is not None:
            self._make_tables(trainer)

    def _done(self, trainer: Trainer, pl_module: LightningModule, files: Mapping[str, Path]) -> set[str]:
        outputs = self._prepare(trainer, pl_module, resume=True)
        done = outputs.folder.finished(files)
        if done and trainer.is_global_zero:
            log.warning("%d of %d images are done already", len(done), len(files))
        return done

    def _prepare(self, trainer: Trainer, pl_module: LightningModule, resume: bool) -> ImageOutputs:
        """Make the folder ready.

        Raises:
            ConfigError: It is to go on with predictions of another model, or made in another way.
        """
        data: Any = getattr(trainer, "datamodule", None)
        calibration = plain(getattr(pl_module, "calibration", {}))
        self._tasks = dict(cast("Mapping[str, Task]", pl_module.tasks))
        self._outputs = self._made(trainer, weights_digest(pl_module.state_dict()), calibration)
        self._files = dict(getattr(data, "files", {}))
        self.exit_code = self._told = 0
        if trainer.is_global_zero:
            self._outputs.folder.prepare(self._about(self._outputs, pl_module, data, calibration), resume)
        trainer.strategy.barrier("predictions prepared")
        return self._outputs

    def _made(self, trainer: Trainer, model: str, calibration: Any) -> ImageOutputs:
        boxes = {
            (name, c): LEAST if self.threshold is None else self.threshold
            for name, task in self._tasks.items()
            for c in task.classes
            if task.kind == "detection"
        }
        if self.threshold is None:
            boxes |= _thresholds(calibration, "f1", boxes)
        classes = {
            (name, c): 0.5 for name, task in self._tasks.items() for c in task.classes if task.kind == "classification"
        }
        return ImageOutputs(
            folder=PredictionFolder(predictions_root(trainer, self.predictions_root)),
            model=model,
            tasks=self._tasks,
            least=boxes,
            thresholds=_thresholds(calibration, self.operating_point, classes),
            overlays=self.overlays,
            dicom=DicomOutputs(Identity(model, self.codes), boxes) if self.dicom else None,
        )

    def _about(self, outputs: ImageOutputs, pl_module: LightningModule, data: Any, calibration: Any) -> dict[str, Any]:
        """Return what these predictions are known by: with other settings they would be others."""
        ways = {key: getattr(pl_module, key, None) for key in ("tile", "overlap", "flip_tta", "sampling")}
        own = {
            "score": self.score,
            "threshold": {f"{task}: {c}": value for (task, c), value in outputs.least.items()},
            "operating_point": self.operating_point,
            "overlays": self.overlays,
            "dicom": self.dicom,
            "codes": self.codes,
        }
        return {
            "note": NOTE,
            "software": f"MTMedFormer {mtmedformer.__version__}",
            "model": outputs.model,
            "tasks": {name: asdict(task) for name, task in self._tasks.items()},
            "settings": own | ways | getattr(data, "settings", {}) | {"calibration": calibration},
        }

    def _source(self, trainer: Trainer, image: str) -> Source | None:
        data: Any = getattr(trainer, "datamodule", None)
        file = self._files.get(image)
        return Source(file, data.is_dicom(file), data.original) if file is not None and file.is_file() else None

    def _list_failures(self, trainer: Trainer) -> None:
        """Note images that could not be read since the last call, so that the tables list them."""
        assert self._outputs is not None
        failures = getattr(getattr(trainer, "datamodule", None), "failures", [])
        for issue in failures[self._told :]:
            file = self._files.get(issue.id)  # readers quote whole paths, and folders may be called like patients
            detail = issue.detail.replace(f"{file.parent}/", "") if file else issue.detail
            about = {"failed": issue.reason, "detail": detail, "note": NOTE}
            self._outputs.folder.finish(issue.id, {"image": issue.id, "files": [], **about})
        self._told = len(failures)

    def _make_tables(self, trainer: Trainer) -> None:
        assert self._outputs is not None
        if not trainer.is_global_zero:
            return
        folder = self._outputs.folder
        failed = folder.write_tables({name: asdict(task) for name, task in self._tasks.items()})
        Console().print(f"Written: {folder.root}", highlight=False, soft_wrap=True)
        if failed:
            self.exit_code = 3
            log.warning("%d images failed; %s says which and why", failed, folder.root / "failed.csv")


def _thresholds(
    calibration: Mapping[str, Any], point: str, wanted: Mapping[tuple[str, str], float]
) -> dict[tuple[str, str], float]:
    """Return the calibration's thresholds at an operating point, for those tasks and classes it has any for."""
    found = {
        (task, c): points[point]
        for task, one in calibration.items()
        for c, points in one["thresholds"].items()
        if point in points
    }
    return {key: value for key, value in found.items() if key in wanted}
