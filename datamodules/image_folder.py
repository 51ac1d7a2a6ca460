"""Images without labels for ``predict``: files and folder trees, read one by one, without table and cache."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
from torch.utils.data import DataLoader, Dataset

from datamodules.base import log_warning
from datamodules.cache.preprocessing import Preprocessing
from datamodules.cache.quarantine import IMAGE, Issue
from datamodules.images.presets import ChestPreset, PlainPreset, Preset
from datamodules.loading.arguments import height_width
from datamodules.loading.find_images import find_images
from datamodules.loading.negatives import NEGATIVE_CLASSES
from datamodules.loading.single_image import IN_HEADER, prepare_file, with_case
from datamodules.loading.white_level import PreparedImages, WhiteLevel, check_white_level
from datamodules.records import Record
from mtmedformer.batch import Batch, Sample, collate
from mtmedformer.errors import ConfigError
from mtmedformer.metrics.cases import CaseRule, Pooling, plain_name
from mtmedformer.storage.safe_text import printable

log = logging.getLogger(__name__)


class ImageFolderDataModule(PreparedImages, L.LightningDataModule):
    """Serve images for ``predict``, without a table and without labels.

    Each image is read when its batch is due and prepared as training images are (display chain, frame, size). Nothing
    is cached, so memory does not grow with the number of images. An image that cannot be read is added to ``failures``
    and the other images are served.

    Args:
        images: Files and folder trees: DICOM, PNG, JPEG, TIFF and the other formats of ``datamodules.images.pixels``.
            A multi-frame DICOM file gives one image per frame, ``file#frame`` one of them (from 1).
        image_size: ``[height, width]`` of the network's input in pixels, or one number for both; as in training.
        preset: Framing, as in training; ``null`` for the whole image.
        batch_size: Images per batch.
        num_workers: Processes that read; 0 reads in the main process.
        white_level: The value of white in 16-bit images; ``auto`` takes that of the training, else one that fits all
            images.
        case: Fields that name the case of a DICOM file: patient, study, view, laterality, from its header. ``null``: no
            results by case.
        case_pooling: How the scores of a case's images become one: ``max``, ``mean`` or ``noisy_or``.
        negative_classes: Names of the classes without a finding, as in training; ``null``: by their names.

    Attributes:
        records: The images, complete after ``setup``.
        failures: Images that could not be used so far, with reasons.

    Raises:
        ConfigError: ``image_size``, ``batch_size`` or ``num_workers`` is out of its range.
    """

    def __init__(
        self,
        images: list[Path],
        image_size: int | tuple[int, int] = 256,
        preset: Preset | None = ChestPreset(),  # noqa: B008  presets have no state
        batch_size: int = 1,
        num_workers: int = 2,
        white_level: WhiteLevel = "auto",
        case: list[str] | None = None,
        case_pooling: Pooling = "max",
        negative_classes: list[str] | None = None,
    ) -> None:
        super().__init__()
        self.case = tuple(case or ())
        self.case_batches = False
        self.negative_classes = negative_classes
        names = NEGATIVE_CLASSES if negative_classes is None else negative_classes
        self.case_rule = CaseRule(case_pooling, frozenset(map(plain_name, names)))
        if unknown := sorted(set(self.case) - set(IN_HEADER)):
            raise ConfigError(f"data.case: files have no {unknown[0]!r}; choose from {', '.join(IN_HEADER)}")
        self.images = images
        self.image_size = height_width(image_size)
        self.preset = preset
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.white_level = white_level
        check_white_level(white_level)
        if batch_size < 1 or num_workers < 0:
            raise ConfigError(f"data: batch_size={batch_size} must be at least 1 and num_workers={num_workers} 0")
        self.preprocessing = Preprocessing(preset or PlainPreset(), self.image_size)
        self.records: list[Record] = []
        self.failures: list[Issue] = []
        self._finished: Callable[[Mapping[str, Path]], Collection[str]] = lambda files: ()

    @property
    def settings(self) -> dict[str, Any]:
        """Size, name and plain arguments of the preprocessing, for the record kept beside the predictions."""
        preset = self.preprocessing.preset
        plain = {k: v for k, v in vars(preset).items() if isinstance(v, str | int | float | None)}
        level = self.preprocessing.white_level
        white = {} if level is None else {"white_level": level}
        cases = {"case": list(self.case), "case_pooling": self.case_rule.pooling} if self.case else {}
        own = {"image_size": list(self.image_size), "preset": {"name": type(preset).__name__, **plain}}
        return own | white | cases

    def setup(self, stage: str | None = None) -> None:
        """Find the image files; pixels are read only to find a white level that is not known.

        Raises:
            DataError: A path does not exist, or there is no image.
            ConfigError: The stage is not ``predict``.
        """
        if stage not in ("predict", None):
            raise ConfigError("ImageFolderDataModule has no labels; use it with predict only")
        found = find_images(self.images)
        for note in found.notes:
            log_warning(note)
        self.failures[:] = found.failures
        self.records = [
            Record(id=name, file=file, patient=name.removesuffix(f"#{frame}"), frame=frame)
            for name, (file, frame) in found.images.items()
        ]
        self.files_of_set = [record.file for record in self.records]
        self.settle_channels(self.trainer)
        self.settle_white_level("these images", compare=False)

    def skip_finished(self, finished: Callable[[Mapping[str, Path]], Collection[str]]) -> None:
        """Leave out the images whose results exist.

        Args:
            finished: Returns the ids of the finished images, given all image files by id. It is called before the first
                batch, after the model's weights are loaded.
        """
        self._finished = finished

    def predict_dataloader(self) -> ImageBatches:
        """Return the batches of the unfinished images; the processes of a distributed run share them."""
        given = (self._unfinished, self.preprocessing, self.batch_size, self.num_workers, self.failures, self.case)
        return ImageBatches(*given)

    def _unfinished(self) -> list[Record]:
        finished = set(self._finished(self.files))
        ranks, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        return [record for record in self.records if record.id not in finished][rank::ranks]


class ImageBatches:
    """Iterable of batches; images that cannot be read are added to a list of failures.

    Args:
        unfinished: Returns the records of the images; called once, at the first use. (A call inside
            ``predict_dataloader`` would run while Lightning has patched ``DataLoader``, and an error there would leave
            it patched.)
        preprocessing: How images are prepared.
        batch_size: Images per batch.
        num_workers: Processes that read.
        failures: Failures are appended to this list.
        case: Fields that name the case of a file.
    """

    def __init__(
        self,
        unfinished: Callable[[], list[Record]],
        preprocessing: Preprocessing,
        batch_size: int,
        num_workers: int,
        failures: list[Issue],
        case: Sequence[str] = (),
    ) -> None:
        self.unfinished, self.preprocessing, self.case = unfinished, preprocessing, case
        self.batch_size, self.num_workers, self.failures = batch_size, num_workers, failures

    @cached_property
    def reader(self) -> _Reader:
        """The images as a data set; made at the first use."""
        return _Reader(self.unfinished(), self.preprocessing, self.case)

    def __len__(self) -> int:
        return math.ceil(len(self.reader) / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        workers = min(self.num_workers, len(self.reader)) if len(self.reader) > 1 else 0
        loader: Any = DataLoader(self.reader, batch_size=None, num_workers=workers, collate_fn=_as_is)
        waiting: list[Sample] = []
        for item in loader:
            if isinstance(item, Issue):
                self.failures.append(item)
                continue
            waiting.append(item)
            if len(waiting) == self.batch_size:
                yield collate(waiting, {})
                waiting = []
        if waiting:
            yield collate(waiting, {})


class _Reader(Dataset[Sample | Issue]):
    """One prepared image, or the reason why there is none, per item."""

    def __init__(self, records: list[Record], preprocessing: Preprocessing, case: Sequence[str] = ()) -> None:
        self.records, self.preprocessing, self.case = records, preprocessing, case

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample | Issue:
        record = self.records[index]
        name = printable(record.file.name)
        if record.file.exists() and not record.file.is_file():  # reading a pipe might never end
            return Issue(record.id, name, IMAGE, "not a file", "a pipe, a device, a socket or a folder")
        try:
            return with_case(prepare_file(record, self.preprocessing), record.file, self.case)
        except Exception as error:  # a fault of the code in one image must not end the run; it is logged and listed
            log.exception("%s could not be prepared", name)
            return Issue(record.id, name, IMAGE, "image cannot be prepared", f"{type(error).__name__}")


def _as_is(item: object) -> object:
    return item
