"""How records become cache entries, and how an entry is named: by a digest of everything that decides its content.

The name covers the bytes of the image and mask files, boxes and polygons, the framed size, the white level, the
preset's framing, the code that decodes and draws (``PIXEL_CODE``) and the versions of the libraries that decode
(``DECODERS``). So a changed file, a corrected box or another crop is decoded again; a copied folder or a changed
comment is not.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, is_dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import cv2

from datamodules.cache.entries import CacheEntry, Report
from datamodules.cache.quarantine import Issue
from datamodules.cache.rasterize import rasterize
from datamodules.images.presets import Preset
from datamodules.records import BoxTruth, MaskTruth, Record
from mtmedformer.storage.hashing import source_digest

PIXEL_CODE = (
    "datamodules/cache",
    "datamodules/images",
    "datamodules/records.py",
    "mtmedformer/batch.py",
    "mtmedformer/errors.py",
    "mtmedformer/geometry.py",
    "mtmedformer/storage/safe_text.py",
)
"""Folders and files whose code can change an entry. A change in any of them decodes every image again.

A test follows the imports of ``read_image`` and ``rasterize`` and fails if they reach a module that is not covered.
"""

DECODERS = ("pydicom", "pylibjpeg", "pylibjpeg-openjpeg", "pylibjpeg-rle", "pyjpegls", "python-gdcm", "pillow")
"""Libraries whose versions are part of an entry's name, in addition to OpenCV's.

A new version of a decoder may correct the pixels (signed JPEG 2000, bit depths, colour conversion), and if a decoder is
not installed another one is used. Upgrades are rare and decoding again takes minutes, but wrong pixels of an old
version would stay in use unnoticed. NumPy and SciPy are not listed: their versions differ by rounding at most.
"""

WHOLE_BYTES = 4 * 2**20
"""Files up to this size in bytes are digested completely."""

SAMPLED_BYTES, SAMPLES = 2**16, 16
"""Size in bytes and number of the blocks that are digested of larger files."""


@dataclass(frozen=True)
class Preprocessing:
    """Decode and frame images; name their cache entries.

    Attributes:
        preset: Computes the frame.
        size: ``(height, width)`` of the network's input in pixels.
        white_level: The value of white in all 16-bit images of the set; ``None`` if it has none.
        channels: Channels of the network's input: 1 for grey, 3 for red, green and blue.
    """

    preset: Preset
    size: tuple[int, int]
    white_level: int | None = None
    channels: int = 1

    def apply(self, record: Record) -> CacheEntry | Issue:
        """Decode an image and draw its masks and boxes (see ``datamodules.cache.rasterize.rasterize``)."""
        return rasterize(record, self.preset, self.size, self.white_level, self.channels == 3)

    def report(self, record: Record) -> Report:
        """Decode an image for its issues and remarks alone."""
        made = self.apply(record)
        return Report((made,)) if isinstance(made, Issue) else made.report()

    def keys(self, records: Sequence[Record]) -> list[str]:
        """Return the name of each record's entry: 40 hexadecimal digits. Files are read and digested, not decoded."""
        settings = {
            "code": _code(),
            "preset": _describe_preset(self.preset),
            "size": self.size,
            "white": self.white_level,
            "channels": self.channels,
        }
        common = json.dumps(settings, sort_keys=True, default=str)
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(lambda record: _key(common, record), records))

    def smallest_bytes(self, record: Record) -> int:
        """Return a lower bound of the size of a record's entry in bytes: an 8-bit image and its masks."""
        channels = sum(len(t.channels) for t in record.truth.values() if isinstance(t, MaskTruth))
        return self.size[0] * self.size[1] * (1 + channels)


def _key(common: str, record: Record) -> str:
    drawn = {name: truth for name, truth in record.truth.items() if isinstance(truth, BoxTruth | MaskTruth)}
    labels = [record.laterality, record.size, bool(record.inverted), _describe(drawn)]
    parts = [_describe(record.file), record.frame, *labels]
    return hashlib.blake2b((common + json.dumps(parts, sort_keys=True)).encode(), digest_size=20).hexdigest()


def _describe(value: Any) -> Any:
    """Return a description for JSON in which a file is replaced by the digest of its content."""
    if isinstance(value, Path):
        return digest(value)
    if is_dataclass(value):
        return {name: _describe(item) for name, item in vars(value).items()}
    if isinstance(value, dict):
        return {key: _describe(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_describe(item) for item in value]
    return value


def digest(file: Path) -> str:
    """Return a digest of a file's content, ``missing`` where there is no file.

    Of a file above 4 MiB the digest covers its size, its modification time and 16 blocks spread over it, so that full
    mammograms need not be read twice.
    """
    try:
        stat = file.stat()
        return _digest(file, stat.st_size, stat.st_mtime_ns)
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return "missing"


@lru_cache(maxsize=65536)
def _digest(file: Path, size: int, changed: int) -> str:
    hasher = hashlib.blake2b(digest_size=16)
    with file.open("rb") as stream:
        if size <= WHOLE_BYTES:
            hasher.update(stream.read())
        else:
            hasher.update(f"{size} {changed}".encode())
            for block in range(SAMPLES):
                stream.seek(block * (size - SAMPLED_BYTES) // (SAMPLES - 1))
                hasher.update(stream.read(SAMPLED_BYTES))
    return hasher.hexdigest()


def _describe_preset(preset: Preset) -> dict[str, Any]:
    """Return what the frame depends on: the preset's code and plain attributes (nested ones configure augmentation)."""
    kind = type(preset)
    plain = {name: value for name, value in vars(preset).items() if isinstance(value, str | int | float | None)}
    return {"frame": _preset_code(kind), **plain}


@lru_cache(maxsize=64)
def _preset_code(kind: type[Preset]) -> str:
    """Return the class's name and a digest of the file that defines it; the user may have written the preset."""
    try:
        file = Path(inspect.getfile(kind)).resolve()
        return f"{kind.__qualname__} {source_digest([file], file.parent)}"
    except (OSError, TypeError):  # defined in a console
        return kind.__qualname__


@lru_cache(maxsize=1)
def _code() -> str:
    """Return a digest of the code and the libraries that turn files into entries."""
    root = Path(__file__).resolve().parents[2]
    return " ".join([source_digest(pixel_code(root), root), f"cv2 {cv2.__version__}", *map(_version, DECODERS)])


def pixel_code(root: Path) -> list[Path]:
    """Return the files of ``PIXEL_CODE``.

    Args:
        root: Folder that contains the packages.
    """
    places = [root / name for name in PIXEL_CODE]
    return [file for place in places for file in (place.rglob("*.py") if place.is_dir() else [place])]


def _version(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"{name} absent"
