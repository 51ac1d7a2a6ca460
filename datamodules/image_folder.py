"""Images without labels for ``predict``: files and folder trees, read one by one, without table and cache."""

from __future__ import annotations

import logging
import math
import os
import stat
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
from pydicom import dcmread
from pydicom.uid import UID
from torch.utils.data import DataLoader, Dataset

from datamodules.base import log_warning
from datamodules.cache.preprocessing import Preprocessing
from datamodules.cache.quarantine import IMAGE, Issue
from datamodules.images.dicom_parsing import is_dicom
from datamodules.images.pixels import SUFFIXES, is_litter
from datamodules.images.presets import ChestPreset, PlainPreset, Preset
from datamodules.loading.arguments import height_width
from datamodules.loading.negatives import NEGATIVE_CLASSES
from datamodules.loading.single_image import IN_HEADER, prepare_file, with_case
from datamodules.loading.white_level import PreparedImages, WhiteLevel, check_white_level
from datamodules.records import Record
from mtmedformer.batch import Batch, Sample, collate
from mtmedformer.errors import ConfigError, DataError
from mtmedformer.inference.results import ABOUT, NOTE
from mtmedformer.metrics.cases import CaseRule, Pooling, plain_name
from mtmedformer.storage.safe_text import printable

log = logging.getLogger(__name__)

_JSON, _PICTURES = "images", ("overlays", "explanations", "uncertainty")
"""Subfolders of a folder of predictions: of one JSON per image, and of one picture per image."""


class ImageFolderDataModule(PreparedImages, L.LightningDataModule):
    """Serve images for ``predict``, without a table and without labels.

    Each image is read when its batch is due and prepared as training images are (display chain, frame, size). Nothing
    is cached, so memory does not grow with the number of images. An image that cannot be read is added to ``failures``
    and the other images are served.

    Args:
        images: Files and folder trees: DICOM, PNG, JPEG, TIFF and the other formats of ``datamodules.images.pixels``.
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
        self.records = [Record(id=name, file=file, patient=name) for name, file in found.images.items()]
        self.files_of_set = list(found.images.values())
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


class FoundImages(NamedTuple):
    """Images among given files and folders.

    Attributes:
        images: Their files by id, in a stable order. An id is the path below the given folder, or the file's name;
            where several paths were given, the folder's name comes first. Unprintable characters are escaped.
        notes: Sentences on what was skipped.
        failures: Folders that cannot be read.
    """

    images: dict[str, Path]
    notes: list[str]
    failures: list[Issue]


def find_images(paths: Sequence[Path]) -> FoundImages:
    """Find the images among files and in folder trees.

    A file is always taken. Of a folder, files are taken that are DICOM images by content or have the suffix of an
    image. Skipped and counted are DICOM objects that are no images (reports, segmentations, presentation states,
    directories), what ``predict`` wrote, pipes and devices, and links to folders; hidden files of operating systems are
    skipped without a count.

    Args:
        paths: Files and folders.

    Raises:
        DataError: A path does not exist, or there is no image.
    """
    images_by_id: dict[str, Path] = {}
    taken: set[Path] = set()
    skipped: Counter[str] = Counter()
    failures: list[Issue] = []
    for path in dict.fromkeys(Path(os.path.abspath(Path(p).expanduser())) for p in paths):
        if not path.exists():
            raise DataError(f"--images {path}: no such file or folder")
        for file, why in _files(path, skipped, failures) if path.is_dir() else [(path, "")]:
            if why:
                skipped[why] += 1
            elif file not in taken:
                taken.add(file)
                images_by_id[_free(images_by_id, _name(file, path, len(paths) > 1))] = file
    listing = ", ".join(f"{count} × {why}" for why, count in skipped.most_common())
    if not images_by_id:
        where, closed = ", ".join(str(p) for p in paths), f"{len(failures)} × folder that cannot be read"
        listing = ", ".join(filter(None, (listing, closed if failures else "")))
        raise DataError(
            f"--images {where}: no image found ({listing or 'the folder is empty'}); give DICOM, PNG, JPEG or TIFF "
            "files, or folders of them"
        )
    return FoundImages(images_by_id, [f"Skipped files that are no images: {listing}"] if skipped else [], failures)


def _files(path: Path, skipped: Counter[str], failures: list[Issue]) -> Iterator[tuple[Path, str]]:
    """Yield the files below a folder, each with the kind of a file that is no image, or an empty string."""

    def unreadable(error: OSError) -> None:
        name = f"{printable(Path(error.filename).relative_to(path.parent).as_posix())}/"
        failures.append(Issue(name, name, IMAGE, "folder cannot be read", error.strerror or type(error).__name__))

    of_predictions: list[Path] = []
    for where, folders, names in os.walk(path, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not is_litter(name))
        skipped.update("link to a folder" for name in folders if os.path.islink(os.path.join(where, name)))
        if ABOUT in names:
            of_predictions.append(Path(where))
        root = next((one for one in of_predictions if Path(where).is_relative_to(one)), None)
        for name in sorted(names):
            if not is_litter(name):
                file = Path(where, name)
                yield file, (_written(file, root) if root else "") or _not_an_image(file)


def _written(file: Path, root: Path) -> str:
    """Return a text where ``predict`` wrote a file into its folder ``root``; pictures are recognised by their note."""
    kind, _, image = file.relative_to(root).as_posix().partition("/")
    of_image = kind in _PICTURES and (root / _JSON / image).with_suffix(".json").is_file()
    return "file of earlier predictions" if of_image or file.suffix.lower() in (".json", ".csv", ".yaml") else ""


def _not_an_image(file: Path) -> str:
    """Return what kind of file this is, or an empty string where it is or should be an image."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            return "pipe, device or socket"
        with file.open("rb") as stream:
            head = stream.read(1024)
    except OSError:
        return ""  # reading it later gives the reason
    if is_dicom(head):
        return _other_object(file)
    if head.startswith(b"\x89PNG") and NOTE.encode() in head:  # the description in a mask or an overlay
        return "file of earlier predictions"
    return "" if file.suffix.lower() in SUFFIXES else f"{printable(file.suffix.lower()) or 'no'} file"


def _other_object(file: Path) -> str:
    """Return the kind of a DICOM object that is no image; a damaged or unknown one may be an image."""
    try:
        header = dcmread(file, force=True, stop_before_pixels=True, specific_tags=["SOPClassUID"])
        kind = UID(str(header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID") or ""))
    except Exception:  # a broken file may raise anything in the parser; reading it later gives the reason
        return ""
    known = kind.name != str(kind)
    return f"DICOM {kind.name.removesuffix(' Storage')}" if known and "Image" not in kind.name else ""


def _name(file: Path, given: Path, several: bool) -> str:
    if file == given:
        return printable(file.name)
    below = file.relative_to(given).as_posix()
    return printable(f"{given.name}/{below}" if several else below)


def _free(taken: dict[str, Path], name: str) -> str:
    place, number = name, 2
    while place in taken:
        place, number = f"{name}_{number}", number + 1
    return place
