"""Find the images among files and in folder trees, by what is in them rather than by their names."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydicom import dcmread
from pydicom.uid import UID

from datamodules.images.dicom import is_dicom
from datamodules.public.layout import is_litter
from mtmedformer.errors import DataError
from mtmedformer.inference.results import ABOUT

SUFFIXES = (".dcm", ".dicom", ".png", ".jpg", ".jpeg", ".tif", ".tiff", ".pgm", ".bmp", ".gif", ".webp", ".jp2")
"""Files of these names are meant to be images: one that cannot be read has failed and is not just something else."""


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
