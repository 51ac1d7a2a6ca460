"""Images without labels, to be predicted: files and folder trees as they are, read one by one and kept nowhere."""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
from pydicom import dcmread
from pydicom.uid import UID
from torch.utils.data import DataLoader, Dataset

from datamodules.base import log_warning
from datamodules.cache.preprocessing import Preprocessing
from datamodules.cache.quarantine import IMAGE, Issue
from datamodules.images.dicom import is_dicom
from datamodules.images.pixels import Originals
from datamodules.images.presets import ChestPreset, PlainPreset, Preset
from datamodules.loading.single_image import prepare_file
from datamodules.public.layout import is_litter
from datamodules.records import Record
from mtmedformer.batch import Batch, Sample, collate
from mtmedformer.errors import ConfigError, DataError
from mtmedformer.inference.results import ABOUT

log = logging.getLogger(__name__)

SUFFIXES = (".dcm", ".dicom", ".png", ".jpg", ".jpeg", ".tif", ".tiff", ".pgm", ".bmp", ".gif", ".webp", ".jp2")
"""Files of these names are meant to be images: one that cannot be read has failed and is not just something else."""


class ImageFolderDataModule(Originals, L.LightningDataModule):
    """Images to predict, without a table and without labels.

    Each image is read when its turn comes, on the road training images take (display chain, frame, size), and let go
    after it: memory does not grow with their number, nothing is cached, and results come at once. An image that cannot
    be read is listed in ``failures`` and the rest goes on.

    Args:
        images: Files and folder trees; DICOM, PNG, JPEG, TIFF and what else ``datamodules.images.pixels`` reads.
        image_size: ``[height, width]`` of the network's input in pixels, or one number for both; as in training.
        preset: How images are framed; as in training. ``null`` for the whole image.
        batch_size: Images a batch.
        num_workers: Processes that read; 0 reads in this process.

    Attributes:
        records: The images, once set up.
        failures: Images that could not be used, with reasons, so far as they have been read.
    """

    def __init__(
        self,
        images: list[Path],
        image_size: int | tuple[int, int] = 256,
        preset: Preset | None = ChestPreset(),  # noqa: B008  presets have no state
        batch_size: int = 1,
        num_workers: int = 2,
    ) -> None:
        super().__init__()
        self.images = images
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        self.preset = preset
        self.batch_size = batch_size
        self.num_workers = num_workers
        if len(self.image_size) != 2 or min(self.image_size) < 16:
            raise ConfigError(f"data.init_args.image_size is {image_size}; give [height, width], at least 16 each")
        if batch_size < 1 or num_workers < 0:
            raise ConfigError(f"data: batch_size={batch_size} must be at least 1 and num_workers={num_workers} 0")
        self.preprocessing = Preprocessing(preset or PlainPreset(), (self.image_size[0], self.image_size[1]))
        self.records: list[Record] = []
        self.failures: list[Issue] = []
        self._done: Callable[[Mapping[str, Path]], Collection[str]] = lambda files: ()

    @property
    def settings(self) -> dict[str, Any]:
        """What decides how an image is prepared, as text and numbers."""
        preset = self.preprocessing.preset
        plain = {k: v for k, v in vars(preset).items() if isinstance(v, str | int | float | None)}
        return {"image_size": list(self.image_size), "preset": {"name": type(preset).__name__, **plain}}

    def setup(self, stage: str | None = None) -> None:
        """Find the images; nothing is read yet.

        Raises:
            DataError: There is none, or a path is not there.
            ConfigError: The Trainer wants to do anything but predict.
        """
        if stage not in ("predict", None):
            raise ConfigError("ImageFolderDataModule has no labels: it serves predict alone")
        found, notes = find_images(self.images)
        for note in notes:
            log_warning(note)
        self.records = [Record(id=name, file=file, patient=name) for name, file in found.items()]

    def ask_for_done(self, done: Callable[[Mapping[str, Path]], Collection[str]]) -> None:
        """Leave out images that are done.

        Args:
            done: Takes the image files by id and returns the ids of those that are done. It is called when the first
                batch is due, which is after the model's weights are loaded.
        """
        self._done = done

    def predict_dataloader(self) -> ImageBatches:
        """Return the batches of what is not done; several processes share the images."""
        return ImageBatches(self._todo, self.preprocessing, self.batch_size, self.num_workers, self.failures)

    def _todo(self) -> list[Record]:
        left = set(self._done(self.files))
        ranks, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        return [record for record in self.records if record.id not in left][rank::ranks]


class ImageBatches:
    """Batches of what can be read; what cannot goes into a list of failures.

    Args:
        todo: Returns the images; called once, when they are needed. (Lightning patches ``DataLoader`` while it asks
            for loaders and, after an error there, leaves it patched.)
        preprocessing: How they are prepared.
        batch_size: Images a batch.
        num_workers: Processes that read.
        failures: Where failures are added.
    """

    def __init__(
        self,
        todo: Callable[[], list[Record]],
        preprocessing: Preprocessing,
        batch_size: int,
        num_workers: int,
        failures: list[Issue],
    ) -> None:
        self.todo, self.preprocessing = todo, preprocessing
        self.batch_size, self.num_workers, self.failures = batch_size, num_workers, failures

    @cached_property
    def reader(self) -> _Reader:
        """The images, once they are needed."""
        return _Reader(self.todo(), self.preprocessing)

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
    """Reads and frames one image an item."""

    def __init__(self, records: list[Record], preprocessing: Preprocessing) -> None:
        self.records, self.preprocessing = records, preprocessing

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample | Issue:
        record = self.records[index]
        try:
            return prepare_file(record, self.preprocessing)
        except Exception as error:  # a fault of the code in one image must not end the run; it is logged and listed
            log.exception("%s could not be prepared", record.file.name)
            return Issue(record.id, record.file.name, IMAGE, "image cannot be prepared", f"{type(error).__name__}")


def _as_is(item: object) -> object:
    return item


def find_images(paths: Sequence[Path]) -> tuple[dict[str, Path], list[str]]:
    """Return the images in files and folder trees.

    A file is taken as it is. Of a folder, everything is taken that is a DICOM image by content or has the name of an
    image; DICOM objects that are no images (reports, segmentations, presentation states, directories), what an
    operating system left behind and folders of predictions are passed over.

    Args:
        paths: Files and folders.

    Returns:
        The images by id, in a stable order: the path below the given folder, or the file's name; with the given
        folder's name before it where several were given. And sentences on what was passed over.

    Raises:
        DataError: A path is not there, or there is no image.
    """
    found: dict[str, Path] = {}
    taken: set[Path] = set()
    passed: Counter[str] = Counter()
    for path in dict.fromkeys(Path(os.path.abspath(Path(p).expanduser())) for p in paths):
        if not path.exists():
            raise DataError(f"--images {path}: there is no such file or folder")
        for file in _files(path):
            if path.is_file() or not (why := _not_an_image(file)):
                if file not in taken:
                    taken.add(file)
                    found[_free(found, _name(file, path, len(paths) > 1))] = file
            else:
                passed[why] += 1
    listing = ", ".join(f"{count} × {why}" for why, count in passed.most_common())
    if not found:
        where = ", ".join(str(p) for p in paths)
        raise DataError(
            f"--images {where}: no image found ({listing or 'nothing is there'}); give DICOM, PNG, JPEG or TIFF files, "
            "or folders of them"
        )
    return found, [f"Passed over what is no image: {listing}"] if passed else []


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    for where, folders, names in os.walk(path):
        if ABOUT in names:
            folders.clear()  # predictions of an earlier run, not images
            continue
        folders[:] = sorted(name for name in folders if not is_litter(name))
        yield from (Path(where, name) for name in sorted(names) if not is_litter(name))


def _not_an_image(file: Path) -> str:
    """Say what a file in a folder is, or nothing where it is an image or meant to be one."""
    try:
        with file.open("rb") as stream:
            head = stream.read(132)
    except OSError:
        return ""  # reading it later says why
    if is_dicom(head):
        return _other_object(file)
    return "" if file.suffix.lower() in SUFFIXES else f"{file.suffix.lower() or 'no'} file"


def _other_object(file: Path) -> str:
    """Name the kind of a DICOM object that is no image; a damaged or unknown one may be an image."""
    try:
        header = dcmread(file, force=True, stop_before_pixels=True, specific_tags=["SOPClassUID"])
        kind = UID(str(header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID") or ""))
    except Exception:  # whatever a broken file makes of the parser: reading it later says why
        return ""
    known = kind.name != str(kind)
    return f"DICOM {kind.name.removesuffix(' Storage')}" if known and "Image" not in kind.name else ""


def _name(file: Path, given: Path, several: bool) -> str:
    if file == given:
        return file.name
    below = file.relative_to(given).as_posix()
    return f"{given.name}/{below}" if several else below


def _free(found: dict[str, Path], name: str) -> str:
    place, number = name, 2
    while place in found:
        place, number = f"{name}_{number}", number + 1
    return place
