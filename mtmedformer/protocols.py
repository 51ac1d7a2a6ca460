"""Contracts between the packages: what the model, the data modules, the callbacks and the federation expect.

Any object with these members can be used, without inheriting from a class here. ``isinstance`` tests whether members
exist, not their types. A user's own class may provide some of them; the effect of a missing one is stated with each.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from mtmedformer.batch import Task


class PredictingModule(Protocol):
    """A trained module as a ``PredictionStrategy`` uses it.

    Attributes:
        tasks: Tasks by name.
        calibration: Calibration by task; ``temperature`` is ``None`` where there is none.
    """

    @property
    def tasks(self) -> dict[str, Task]: ...  # noqa: D102

    calibration: Any

    def predict(self, image: Tensor, raw: bool = False) -> dict[str, Any]:
        """Return the predictions of one forward pass by task."""


class PredictionStrategy(Protocol):
    """How ``test`` and ``predict`` compute the predictions of an image: directly, by tiles, from posterior samples.

    ``MultiTaskModule.predictor`` holds one; a callback may set another before prediction starts.

    Attributes:
        settings: Settings that change the predictions, for the record kept beside them: names to plain values.
    """

    @property
    def settings(self) -> Mapping[str, Any]: ...  # noqa: D102

    def predict(self, module: PredictingModule, image: Tensor, raw: bool = False) -> dict[str, Any]:
        """Return the predictions by task.

        Args:
            module: The module; its method ``predict`` computes the predictions of one forward pass.
            image: float (B, C, H, W) in [0, 1].
            raw: Add the predictions without calibration as ``raw/<task>``.
        """


@runtime_checkable
class StepSchedule(Protocol):
    """A learning-rate schedule over the optimizer steps of the whole training; others are stepped per epoch."""

    def spread(self, total_steps: int, endless: bool = False) -> None:
        """Set the optimizer steps of the whole training, or of the first epoch of one without an end."""


@runtime_checkable
class MonitoringSchedule(Protocol):
    """A learning-rate schedule that follows a logged metric (``lightning.pytorch.cli.ReduceLROnPlateau``).

    Attributes:
        monitor: Name of the logged metric.
    """

    monitor: str


@runtime_checkable
class HasChannels(Protocol):
    """A model or data module whose images have a fixed number of channels: 1 for grey, 3 for colour."""

    in_chans: int


@runtime_checkable
class CalibratedModel(Protocol):
    """A model with a calibration; predictions of other models are compared with default thresholds.

    Attributes:
        calibration: ``TaskCalibration`` by task; empty where nothing is calibrated.
    """

    calibration: dict[str, Any]


@runtime_checkable
class ValidatedModule(Protocol):
    """A module with validation metrics by task; without it a federation logs no metrics by site.

    Attributes:
        val_metrics: ``TaskMetrics`` by task, filled by the validation batches.
    """

    val_metrics: Any


@runtime_checkable
class ClassLabels(Protocol):
    """The classification truth of a record.

    Attributes:
        values: 1.0, 0.0 or NaN (unknown) per class.
    """

    @property
    def values(self) -> tuple[float, ...]: ...  # noqa: D102


@runtime_checkable
class ValueLabel(Protocol):
    """The regression truth of a record: its ``value`` is the number in the task's unit, or the index of the grade."""

    @property
    def value(self) -> float: ...  # noqa: D102


# --- data modules ----------------------------------------------------------------------------------------------------


@runtime_checkable
class TaskedData(Protocol):
    """A data module that declares its tasks. Without it the model's heads are not compared with the data.

    Attributes:
        tasks: Tasks by name, complete after ``setup``; before, all of them or none.
    """

    tasks: dict[str, Task]


@runtime_checkable
class PlannedData(TaskedData, Protocol):
    """A data module that can read its records before ``setup``, so that a mistake is found before anything is written.

    Its tasks are complete after ``plan``.
    """

    def plan(self) -> None:
        """Read the records; decode no pixel. Does nothing the second time."""

    def require(self, stage: str) -> None:
        """Raise a ``DataError``, after ``plan``, if there are no images for a stage of the Trainer."""

    def class_place(self, task: str, label: str) -> str:
        """Return where a table names a class, or an empty string."""


@runtime_checkable
class RecordData(Protocol):
    """A data module of records; only such a one can be cut into sites (``FederatedDataModule.by``, ``partition``).

    Attributes:
        tasks: Tasks by name.
        where: Values a record's fields must have to be used.
        only_patients: Patients to be used, set before ``plan``; ``None`` uses all. Splits count all patients.
        may_lack_labels: Whether a split without any label is no error, as at a site of a federation.
        records: Records in use, complete after ``plan``.
        splits: ``train``, ``val`` or ``test`` by record id.
        image_size: Height and width of the network's input in pixels.
    """

    image_size: tuple[int, int]
    tasks: dict[str, Task]
    where: Any
    only_patients: frozenset[str] | None
    may_lack_labels: bool
    records: Any
    splits: Any

    def plan(self) -> None:
        """Read the records and split them; decode no pixel."""

    def catalogue(self) -> Any:
        """Return the tasks and records of the data set's own files."""


@runtime_checkable
class NamedSites(Protocol):
    """A data module that has the names of its sites before its records are read.

    Attributes:
        sites: Sites by name; every site of a record is one of them.
    """

    sites: Mapping[str, Any]


@runtime_checkable
class LimitedData(Protocol):
    """A data module that a federation can limit for quick trials (``FederatedDataModule.limit``, ``num_workers``).

    Attributes:
        limit: Largest number of patients, set before ``setup``; ``None`` uses all.
        num_workers: Worker processes per loader.
    """

    limit: int | None
    num_workers: int


@runtime_checkable
class SplitData(Protocol):
    """A data module that keeps one data set per split.

    Attributes:
        datasets: Data set by split name; a split without images has no entry.
    """

    datasets: Mapping[str, Any]


@runtime_checkable
class RecordDataset(Protocol):
    """The images of one split with their records; without it a run cannot be identified by its data.

    Attributes:
        records: Records in order.
        keys: Key per record that changes with the content of its file and its preprocessing.
        tasks: Tasks of a sample.
    """

    records: Sequence[Any]
    keys: Sequence[str]
    tasks: dict[str, Task]


@runtime_checkable
class DescribedData(Protocol):
    """A data module that describes itself for reports."""

    def describe(self) -> dict[str, Any]:
        """Return counts and plain text about the data, once set up: no names, ids or paths."""


@runtime_checkable
class QuarantiningData(Protocol):
    """A data module that lists the items it could not use.

    Attributes:
        quarantine: The list so far.
    """

    quarantine: Any


@runtime_checkable
class OriginalImages(Protocol):
    """A data module that gives access to its image files, for overlays and DICOM outputs.

    Attributes:
        files: Image file by record id.
        frames: Frame by record id, from 1, of records of multi-frame files.
    """

    files: dict[str, Path]
    frames: dict[str, int]

    def original(self, file: Path, frame: int | None = None) -> NDArray[np.float32]:
        """Return the whole image, or a frame, as displayed: float32 (H, W) or (H, W, 3) in [0, 1]."""

    def is_dicom(self, file: Path) -> bool:
        """Return whether a file is DICOM."""


@runtime_checkable
class ResumablePrediction(Protocol):
    """A data module for ``predict`` that skips finished images and lists the unreadable ones.

    Attributes:
        failures: Images that could not be read so far; each has ``id``, ``reason`` and ``detail``.
    """

    failures: list[Any]

    @property
    def settings(self) -> dict[str, Any]: ...  # noqa: D102

    def skip_finished(self, finished: Callable[[Mapping[str, Path]], Collection[str]]) -> None:
        """Set the function that returns the ids of the finished images, given all files by id."""


@runtime_checkable
class SiteData(Protocol):
    """The data module of one site of a federation.

    Attributes:
        site: Name of the site.
    """

    site: str


# --- callbacks -------------------------------------------------------------------------------------------------------


@runtime_checkable
class RunsRounds(Protocol):
    """A callback that trains in federated rounds: each epoch of the trainer is one round over the sites.

    Attributes:
        runs_rounds: Whether it does.
    """

    runs_rounds: bool


@runtime_checkable
class StopsTraining(Protocol):
    """A callback that may end a round early.

    Attributes:
        stopping: Whether training should end now.
    """

    @property
    def stopping(self) -> bool: ...  # noqa: D102


@runtime_checkable
class WritesPredictions(Protocol):
    """A callback that writes predictions; other callbacks put their files beside them.

    Attributes:
        predictions_root: Configured folder; ``None`` is ``predictions`` in the run folder.
    """

    predictions_root: str | None


@runtime_checkable
class HasExitCode(Protocol):
    """A callback that decides the exit code of the command; the largest one counts.

    Attributes:
        exit_code: 0 for success.
    """

    @property
    def exit_code(self) -> int: ...  # noqa: D102
