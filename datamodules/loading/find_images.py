"""Find the images among files and in folder trees: by content or by name, with every frame of a multi-frame file."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from pydicom import dcmread
from pydicom.uid import UID

from datamodules.cache.quarantine import IMAGE, Issue
from datamodules.images.dicom_parsing import is_dicom
from datamodules.images.frames import frame_count, named_frame
from datamodules.images.pixels import SUFFIXES, is_litter
from mtmedformer.errors import DataError
from mtmedformer.inference.results import ABOUT, NOTE
from mtmedformer.storage.safe_text import printable

_JSON, _PICTURES = "images", ("overlays", "explanations", "uncertainty")
"""Subfolders of a folder of predictions: of one JSON per image, and of one picture per image."""


class FoundImages(NamedTuple):
    """Images among given files and folders.

    Attributes:
        images: Their files by id, in a stable order, each with the number of its frame, ``None`` in files of one
            image. An id is the path below the given folder, or the file's name, and ``#frame`` in multi-frame files;
            where several paths were given, the folder's name comes first. Unprintable characters are escaped.
        notes: Sentences on what was skipped.
        failures: Folders that cannot be read.
    """

    images: dict[str, tuple[Path, int | None]]
    notes: list[str]
    failures: list[Issue]


def find_images(paths: Sequence[Path]) -> FoundImages:
    """Find the images among files and in folder trees.

    A file is always taken, a multi-frame file as one image per frame. Of a folder, files are taken that are DICOM
    images by content or have the suffix of an image. Skipped and counted are DICOM objects that are no images (reports,
    segmentations, presentation states, directories), what ``predict`` wrote, pipes and devices, and links to folders;
    hidden files of operating systems are skipped without a count.

    Args:
        paths: Files, frames of files (``file#frame``) and folders.

    Raises:
        DataError: A path does not exist, or there is no image.
    """
    images_by_id: dict[str, tuple[Path, int | None]] = {}
    taken: set[tuple[Path, int | None]] = set()
    skipped: Counter[str] = Counter()
    failures: list[Issue] = []
    for path in dict.fromkeys(Path(os.path.abspath(Path(p).expanduser())) for p in paths):
        given, frame = named_frame(path)
        if not given.exists():
            raise DataError(f"--images {path}: no such file or folder")
        for file, why in _files(path, skipped, failures) if path.is_dir() else [(given, "")]:
            if why:
                skipped[why] += 1
                continue
            for image in _images(file, frame):
                if image not in taken:
                    taken.add(image)
                    images_by_id[_free(images_by_id, _name(image, given, len(paths) > 1))] = image
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


def _images(file: Path, frame: int | None) -> list[tuple[Path, int | None]]:
    """Return a file with the number of each of its frames, or of the given one; ``None`` for a file of one image."""
    count = frame_count(file) if frame is None and file.is_file() else 1
    return [(file, number) for number in range(1, count + 1)] if count > 1 else [(file, frame)]


def _name(image: tuple[Path, int | None], given: Path, several: bool) -> str:
    file, frame = image
    number = "" if frame is None else f"#{frame}"
    if file == given:
        return printable(f"{file.name}{number}")
    below = file.relative_to(given).as_posix()
    return printable(f"{given.name}/{below}{number}" if several else f"{below}{number}")


def _free(taken: Collection[str], name: str) -> str:
    place, number = name, 2
    while place in taken:
        place, number = f"{name}_{number}", number + 1
    return place
