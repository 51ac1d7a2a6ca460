"""Callback that writes the predictions of ``mtmedformer predict``, in pixels of the original images."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer

import mtmedformer
from callbacks.prediction.case_files import write_cases
from callbacks.prediction.dicom.model_identity import ModelIdentity
from callbacks.prediction.dicom.objects import DicomObjects
from callbacks.prediction.familiarity_of_images import ImageFiles, assessed
from callbacks.prediction.image_writer import ImageSource, ImageWriter, file_state
from callbacks.prediction.prediction_folder import PredictionFolder, predictions_root
from datamodules.image_folder import ImageFolderDataModule
from datamodules.loading.negatives import negative_names
from mtmedformer.batch import Batch, Task
from mtmedformer.calibration import TaskCalibration, plain
from mtmedformer.encoders.familiarity import NO_FAMILIARITY, Assessment
from mtmedformer.errors import ConfigError, DataError
from mtmedformer.heads.capabilities import GroupsImages
from mtmedformer.inference.results import NOTE, image_result
from mtmedformer.metrics.cases import CasedData
from mtmedformer.module import MultiTaskModule
from mtmedformer.plots.style import picture_of
from mtmedformer.plots.terminal import SafeConsole
from mtmedformer.protocols import CalibratedModel, OriginalImages, ResumablePrediction
from mtmedformer.storage.hashing import weights_digest
from mtmedformer.storage.safe_text import printable
from mtmedformer.storage.write_errors import ends_every_write

log = logging.getLogger(__name__)

SCORE_THRESHOLD = 0.4
"""Minimum score of a box that counts, for classes without a calibrated threshold."""

ByClass = dict[tuple[str, str], float]
"""Values by task and class."""


class PredictionWriter(Callback):
    """Writes the predictions of each image as they are computed, and continues an interrupted run.

    Files: ``masks/<task>/`` (one PNG per image and class), ``overlays/`` (one picture per image), ``dicom/`` (one DICOM
    segmentation and one structured report per image) and ``images/`` (one JSON per image, written last). The tables
    ``predictions.csv`` (class probabilities, numbers with their intervals, numbers of boxes, areas, uncertainty),
    ``boxes.json`` (COCO) and ``failed.csv`` are made from the JSON files at the end, also after an interruption.

    Finished images are skipped where the data module supports it (``--images`` does); otherwise earlier predictions in
    the folder are replaced.

    Args:
        folder: Output folder; ``null`` is ``predictions`` in the run folder.
        score: Boxes below this score are dropped.
        threshold: Minimum score of a box that counts in the CSV and the structured report and is drawn. ``null`` uses
            the calibrated F1 threshold of each class, and 0.4 for classes without one.
        operating_point: Operating point of the calibration that decides whether a class counts as found in the CSV.
        overlays: Draw one picture per image.
        dicom: Write a segmentation and a structured report for images that are DICOM files.
        codes: Codes of classes in DICOM objects, ``{class: [value, scheme, meaning]}``, besides the built-in ones.
        gsps: Write a presentation state with boxes, outlines and probabilities for images that are DICOM files.
        secondary_capture: Write an RGB image with the predictions drawn into it for images that are DICOM files.
        refuse_unfamiliar: Write no prediction of an image that is unlike the training images (see ``Familiarity``); it
            is listed in ``failed.csv``. Otherwise its prediction is written with a warning.

    Attributes:
        exit_code: Exit code of the command: 3 if an image failed.
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
        refuse_unfamiliar: bool = False,
        gsps: bool = False,
        secondary_capture: bool = False,
    ) -> None:
        self.predictions_root, self.score, self.threshold = folder, score, threshold
        self.operating_point = operating_point
        self.overlays, self.dicom, self.codes = overlays, dicom, codes or {}
        self.refuse_unfamiliar = refuse_unfamiliar
        self.gsps, self.secondary_capture = gsps, secondary_capture
        self.exit_code = 0
        self._tasks: dict[str, Task] = {}
        self._calibration: dict[str, TaskCalibration] = {}
        self._files: dict[str, Path] = {}
        self._frames: dict[str, int] = {}
        self._states: dict[str, tuple[int, int] | None] = {}
        self._listed_failures = 0
        self._writer: ImageWriter | None = None
        self._facts: ImageFiles | None = None
        self._unfamiliar = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the data module skip finished images; it calls back later, when the weights are loaded.

        Raises:
            ConfigError: Images to predict lie in the output folder.
        """
        self._writer = None
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if stage == "predict" and isinstance(data, OriginalImages):
            _refuse_among_images(predictions_root(trainer, self.predictions_root), data.files.values())
        if stage == "predict" and isinstance(data, ResumablePrediction):
            data.skip_finished(lambda files: self._finished(trainer, pl_module, files))

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove earlier predictions, where the data module cannot skip finished images."""
        if self._writer is None:
            self._prepare(trainer, pl_module, resume=False)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int, *args: Any
    ) -> None:
        """Write the predictions of a batch, and list the images that could not be read so far."""
        assert self._writer is not None
        assert self._facts is not None
        measured = assessed(pl_module, batch, self._facts)
        familiarity: list[Assessment | None] = [*measured] or [None] * len(batch)
        self._unfamiliar += sum(one.unfamiliar for one in familiarity if one is not None)
        for i, meta in enumerate(batch.meta):
            try:
                result = image_result(outputs, i, meta, self._tasks, self.score, self._calibration)
                result = replace(result, familiarity=familiarity[i])
                self._writer.write(result, picture_of(batch.image[i]), self._source(trainer, meta.id))
            except (DataError, OSError) as error:
                if ends_every_write(error):
                    raise
                self._list_failure(meta.id, "not predicted", _reason(error))
        self._list_failures(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the tables, once every process has finished."""
        if stage == "predict" and self._writer is not None:
            self._list_failures(trainer)
            trainer.strategy.barrier("predictions written")
            self._write_tables(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the tables of the images predicted so far, unless nothing can be written."""
        if self._writer is not None and not ends_every_write(exception):
            self._write_tables(trainer)

    def _finished(self, trainer: Trainer, pl_module: LightningModule, files: Mapping[str, Path]) -> set[str]:
        """Prepare the folder and return the ids of the finished images."""
        writer = self._prepare(trainer, pl_module, resume=True)
        finished = writer.folder.finished(files)
        if finished and trainer.is_global_zero:
            log.warning("%d of %d images are already finished", len(finished), len(files))
        return finished

    def _prepare(self, trainer: Trainer, pl_module: LightningModule, resume: bool) -> ImageWriter:
        """Prepare the folder.

        Raises:
            ConfigError: It holds predictions of another model or with other settings, and the run would continue them.
        """
        self._check_familiarity(pl_module)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self._calibration = pl_module.calibration if isinstance(pl_module, CalibratedModel) else {}
        calibration = plain(self._calibration)
        self._tasks = dict(cast("Mapping[str, Task]", pl_module.tasks))
        self._writer = self._image_writer(trainer, _digest(pl_module), calibration)
        self._facts, self._unfamiliar = ImageFiles(trainer), 0
        self._files = dict(data.files) if isinstance(data, OriginalImages) else {}
        self._frames = dict(data.frames) if isinstance(data, OriginalImages) else {}
        self._states = {image: file_state(file) for image, file in self._files.items()}
        self.exit_code = self._listed_failures = 0
        if trainer.is_global_zero:
            self._writer.folder.prepare(self._about(self._writer, pl_module, data, calibration), resume)
        trainer.strategy.barrier("predictions prepared")
        return self._writer

    def _check_familiarity(self, pl_module: LightningModule) -> None:
        """Refuse to sort out unfamiliar images with a model that has no familiarity.

        Raises:
            ConfigError: It has none.
        """
        if self.refuse_unfamiliar and not (isinstance(pl_module, MultiTaskModule) and pl_module.familiarity):
            raise ConfigError(NO_FAMILIARITY)

    def _image_writer(self, trainer: Trainer, model: str, calibration: Mapping[str, Any]) -> ImageWriter:
        classes = {kind: _classes(self._tasks, kind) for kind in ("classification", "detection")}
        if self.threshold is None:
            boxes = dict.fromkeys(classes["detection"], SCORE_THRESHOLD)
            boxes |= _calibrated_thresholds(calibration, "f1", classes["detection"])
        else:
            boxes = dict.fromkeys(classes["detection"], self.threshold)
        units = {name: task.unit for name, task in self._tasks.items()}
        kinds = (("seg", "sr") if self.dicom else ()) + (("gsps",) if self.gsps else ())
        kinds += ("sc",) if self.secondary_capture else ()
        objects = DicomObjects(ModelIdentity(model, self.codes), boxes, units, self._tasks, kinds)
        return ImageWriter(
            folder=PredictionFolder(predictions_root(trainer, self.predictions_root)),
            model=model,
            tasks=self._tasks,
            box_thresholds=boxes,
            class_thresholds=_calibrated_thresholds(calibration, self.operating_point, classes["classification"]),
            overlays=self.overlays,
            dicom=objects if kinds else None,
            refuse_unfamiliar=self.refuse_unfamiliar,
        )

    def _about(
        self, writer: ImageWriter, pl_module: LightningModule, data: Any, calibration: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return model and settings; predictions are continued only with the same ones."""
        ways = dict(pl_module.predictor.settings) if isinstance(pl_module, MultiTaskModule) else {}
        familiarity = pl_module.familiarity if isinstance(pl_module, MultiTaskModule) else None
        own = {
            "score": self.score,
            "threshold": {f"{task}: {c}": value for (task, c), value in writer.box_thresholds.items()},
            "operating_point": self.operating_point,
            "overlays": self.overlays,
            "dicom": self.dicom,
            "codes": self.codes,
            **({"gsps": True} if self.gsps else {}),
            **({"secondary_capture": True} if self.secondary_capture else {}),
            "refuse_unfamiliar": self.refuse_unfamiliar,
            "familiarity": familiarity.settings() if familiarity else None,
        }
        of_data = data.settings if isinstance(data, ResumablePrediction) else {}
        return {
            "note": NOTE,
            "software": f"MTMedFormer {mtmedformer.__version__}",
            "model": writer.model,
            "tasks": {name: asdict(task) for name, task in self._tasks.items()},
            "settings": own | ways | of_data | {"calibration": calibration},
        }

    def _source(self, trainer: Trainer, image: str) -> ImageSource | None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        file = self._files.get(image)
        if file is None:
            return None
        return ImageSource(file, data.is_dicom(file), data.original, self._frames.get(image), self._states[image])

    def _list_failures(self, trainer: Trainer) -> None:
        """Write an entry for every image that could not be read since the last call, for ``failed.csv``."""
        assert self._writer is not None
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        failures = data.failures if isinstance(data, ResumablePrediction) else []
        for issue in failures[self._listed_failures :]:
            file = self._files.get(issue.id)  # messages contain whole paths, and folders may be named after patients
            detail = issue.detail.replace(f"{file.parent}/", "") if file else issue.detail
            self._list_failure(issue.id, issue.reason, detail)
        self._listed_failures = len(failures)

    def _list_failure(self, image: str, reason: str, detail: str) -> None:
        assert self._writer is not None
        entry = {"image": image, "files": [], "failed": reason, "detail": detail, "note": NOTE}
        self._writer.folder.finish(image, entry)

    def _write_tables(self, trainer: Trainer) -> None:
        assert self._writer is not None
        if not trainer.is_global_zero:
            return
        folder = self._writer.folder
        failed = folder.write_tables({name: asdict(task) for name, task in self._tasks.items()})
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        by_name = isinstance(data, ImageFolderDataModule) and data.negative_classes is None
        if isinstance(data, CasedData) and data.case:
            heads: Any = trainer.lightning_module.heads
            whole = [name for name, head in heads.items() if isinstance(head, GroupsImages)]
            rule = replace(data.case_rule, negative=negative_names(self._tasks)[0]) if by_name else data.case_rule
            for problem in write_cases(folder, self._tasks, rule, whole, self._writer.dicom, self._files):
                log.warning("a case has no structured report: %s", problem)
        SafeConsole().print(f"Written: {folder.root}", highlight=False, soft_wrap=True)
        if self._unfamiliar:
            log.warning(
                "%d images are unlike the training images; see the column unfamiliar:why of predictions.csv",
                self._unfamiliar,
            )
        if failed:
            self.exit_code = 3
            log.warning("%d images failed; the reasons are in %s", failed, folder.root / "failed.csv")


def _refuse_among_images(root: Path, files: Iterable[Path]) -> None:
    """Refuse an output folder in which images to predict lie; results between films are taken for films.

    Raises:
        ConfigError: There is such an image.
    """
    output = Path(os.path.realpath(root))
    if any(Path(os.path.realpath(folder)).is_relative_to(output) for folder in {file.parent for file in files}):
        raise ConfigError(
            f"--output={printable(str(root))}: images to predict lie in this folder; choose another one, for example "
            f"{printable(str(root / 'predictions'))}"
        )


def _digest(module: LightningModule) -> str:
    return module.digest() if isinstance(module, MultiTaskModule) else weights_digest(module.state_dict())


def _reason(error: Exception) -> str:
    """Return an error without the path of a file, since folders may be named after patients."""
    return error.strerror or type(error).__name__ if isinstance(error, OSError) else str(error)


def _classes(tasks: Mapping[str, Task], kind: str) -> list[tuple[str, str]]:
    """Return task and class of every class of the tasks of a kind."""
    return [(name, c) for name, task in tasks.items() if task.kind == kind for c in task.classes]


def _calibrated_thresholds(calibration: Mapping[str, Any], point: str, classes: list[tuple[str, str]]) -> ByClass:
    """Return the calibrated thresholds at an operating point, for those of the classes that have one."""
    thresholds = {
        (task, c): points[point]
        for task, one in calibration.items()
        for c, points in one["thresholds"].items()
        if point in points
    }
    return {key: value for key, value in thresholds.items() if key in classes}
