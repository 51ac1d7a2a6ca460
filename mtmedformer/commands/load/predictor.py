"""``mtmedformer.load``: a trained model as one object that predicts from an image. Research use only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datamodules.audit.header_facts import header_facts
from datamodules.cache.preprocessing import Preprocessing
from datamodules.cache.quarantine import Issue
from datamodules.images.frames import named_frame
from datamodules.images.presets import ChestPreset, PlainPreset, Preset
from datamodules.loading.single_image import prepare_array, prepare_file
from datamodules.records import Record
from mtmedformer.batch import Sample, Task
from mtmedformer.calibration import TaskCalibration
from mtmedformer.commands.load.stored_model import PRESET_HOMES, build, build_model, read_model
from mtmedformer.encoders.familiarity import Assessment
from mtmedformer.errors import ConfigError, DataError
from mtmedformer.inference.results import NOTE, FoundBox, FoundValue, image_result
from mtmedformer.module import MultiTaskModule

LARGEST_SIDE = 16384
"""Largest side of the network's input in pixels: a larger one is a damaged description."""


@dataclass(frozen=True)
class Prediction:
    """The prediction for one image, in pixels of that image. Research use only.

    Attributes:
        size: ``(height, width)`` of the image.
        spacing: ``(row, column)`` spacing of its pixels in mm, if the file states it.
        classes: Probability of each class by its name, by classification task; of each grade, by task of grades.
        boxes: Boxes with ``name``, ``score`` and ``xyxy``, the best first, by detection task.
        masks: bool (height, width) by class, by segmentation task: probability of at least 0.5.
        uncertainty: Entropy in nats by task; of an ensemble also ``disagreement``. Larger is less certain.
        calibrated: Tasks whose probabilities were calibrated with a temperature fitted on validation images.
        note: The permitted use of these numbers.
        values: Number with its unit and interval, or grade, by regression task.
        familiarity: ``distance`` from the training images as a multiple of the limit, and ``reasons`` why the image is
            unlike them, empty for a familiar image; ``None`` where the model has no such limit.
    """

    size: tuple[int, int]
    spacing: tuple[float, float] | None
    classes: dict[str, dict[str, float]]
    boxes: dict[str, list[FoundBox]]
    masks: dict[str, dict[str, NDArray[np.bool_]]]
    uncertainty: dict[str, dict[str, float]]
    calibrated: tuple[str, ...] = ()
    note: str = NOTE
    values: dict[str, FoundValue] = field(default_factory=dict)
    familiarity: Assessment | None = None


class Predictor:
    """A model and the preparation of its images.

    Args:
        module: The model, in evaluation mode.
        image_size: ``(height, width)`` of its input, or ``None`` if it is not known.
        preset: How images are framed.
        white_level: The value of white in 16-bit images of its training; ``None`` if there were none.

    Attributes:
        module: The model; ``module(image)`` gives raw outputs.
        image_size: As given.
        preset: As given.
        white_level: As given.
    """

    def __init__(
        self,
        module: MultiTaskModule,
        image_size: tuple[int, int] | None,
        preset: Preset,
        white_level: int | None = None,
    ) -> None:
        self.module, self.image_size, self.preset, self.white_level = module, image_size, preset, white_level

    @property
    def tasks(self) -> dict[str, Task]:
        """The tasks of the model, with the names of their classes."""
        return self.module.tasks

    @property
    def calibration(self) -> dict[str, TaskCalibration]:
        """Temperatures and thresholds by task, fitted on validation images; empty without a ``Calibrate`` callback."""
        return self.module.calibration

    @torch.inference_mode()
    def predict(
        self, image: NDArray[Any] | str | Path, laterality: Literal["L", "R"] | None = None, score: float = 0.05
    ) -> Prediction:
        """Predict from one image.

        Args:
            image: A file (DICOM, PNG, JPEG, TIFF …; ``file#frame`` of a multi-frame file), or grey values (H, W) with 0
                as black, or (H, W, 3) for a model of colour images: float in [0, 1], uint8, or uint16, divided by the
                white level of the training, as files are.
            laterality: ``L`` or ``R``, the side of a mammogram, if it is known and not in the file.
            score: Minimum score of a box.

        Raises:
            DataError: The image cannot be read or used.
            ConfigError: The preparation of the images is not known.
        """
        sample = self._prepared(image, laterality)
        batch = sample.image[None].to(self.module.device)
        outputs = self.module.predict_whole(batch)
        meta = sample.meta
        result = image_result(outputs, 0, meta, self.tasks, score, self.calibration)
        calibrated = (name for name, one in self.calibration.items() if one.temperature is not None)
        return Prediction(
            meta.original_size,
            meta.spacing,
            result.classes,
            result.boxes,
            {name: {c: mask.astype(bool) for c, mask in masks.items()} for name, masks in result.masks.items()},
            result.uncertainty,
            tuple(calibrated),
            values=result.values,
            familiarity=self._familiarity(batch, image, meta.view),
        )

    def _familiarity(self, batch: Tensor, image: NDArray[Any] | str | Path, view: str | None) -> Assessment | None:
        if self.module.familiarity is None:
            return None
        facts = header_facts(None if isinstance(image, np.ndarray) else Path(image), view)
        return self.module.familiarity.assess(self.module.features(batch), [facts])[0]

    def _prepared(self, image: NDArray[Any] | str | Path, laterality: Literal["L", "R"] | None) -> Sample:
        """Return the network's input (C, H, W) in [0, 1], and where it lies in the image."""
        if self.image_size is None:
            raise ConfigError(
                "the preparation of this model's images is not known, because the config.yaml of its run is missing or "
                "its sites prepare them differently; use load(path, image_size=(HEIGHT, WIDTH), preset=...)"
            )
        preprocessing = Preprocessing(self.preset, self.image_size, self.white_level, self.module.in_chans)
        if isinstance(image, np.ndarray):
            return prepare_array(image, preprocessing, laterality)
        file, frame = named_frame(Path(image))
        record = Record(id=file.name, file=file, patient=file.name, laterality=laterality, frame=frame)
        sample = prepare_file(record, preprocessing)
        if isinstance(sample, Issue):
            raise DataError(f"{file.name}: {sample.reason}; {sample.detail}")
        return sample


def load(
    path: str | Path | Sequence[str | Path],
    device: str = "cpu",
    image_size: int | tuple[int, int] | None = None,
    preset: Preset | None = None,
    trusted: bool = False,
) -> Predictor:
    """Load a model from a checkpoint of ``fit`` or the folder of ``mtmedformer export``, to predict.

    No code in the file is run: weights are read as tensors only, and classes of other projects are refused.

    Args:
        path: The checkpoint or the folder; several make an ensemble, whose predictions are averaged.
        device: Device to predict on: ``cpu``, ``cuda``.
        image_size: ``(height, width)`` of its input, or one number for both; by default that of its training.
        preset: How images are framed; by default that of its training.
        trusted: Allow classes of other projects that the file names; importing them runs their code.

    Raises:
        ConfigError: The file is missing or damaged, or names a class that is not allowed.
    """
    stored = read_model(path)
    module = build_model(stored, trusted)
    size = image_size if image_size is not None else stored.preparation.get("image_size")
    own: Preset = ChestPreset()  # the default of every data set
    if isinstance(described := stored.preparation.get("preset", own), Mapping):
        own = build(described, Preset, PRESET_HOMES, trusted, str(stored.source))  # type: ignore[type-abstract]
    elif described is None:
        own = PlainPreset()
    elif described is not own:
        raise ConfigError(f"{stored.source}: its preset is {described!r}; give load(path, preset=...)")
    white = stored.preparation.get("white_level")
    return Predictor(module.to(device), _height_width(size), preset or own, white if isinstance(white, int) else None)


def _height_width(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    sides = list(size) if isinstance(size, list | tuple) else [size, size]
    if len(sides) != 2 or not all(isinstance(side, int) and 16 <= side <= LARGEST_SIDE for side in sides):
        raise ConfigError(
            f"image_size is {size}; give (height, width) in pixels, at least 16 and at most {LARGEST_SIDE} each"
        )
    return sides[0], sides[1]
