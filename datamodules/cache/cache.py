"""The decode cache: framed images, masks and boxes as memory-mapped files, named by content, each decoded once.

An entry is written to a temporary file and renamed, so that several workers, ranks or runs may fill one folder at the
same time, and a killed one leaves no incomplete entry.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

import filelock
import torch
from safetensors import SafetensorError
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from datamodules.cache.entries import CacheEntry, Report, load_entry, load_report, save_entry
from datamodules.cache.preprocessing import Preprocessing
from datamodules.cache.quarantine import Issue
from datamodules.records import Record
from mtmedformer.errors import DataError
from mtmedformer.storage.atomic_write import atomic_write

log = logging.getLogger(__name__)

T = TypeVar("T")

GB = 1e9
_STARTED = time.time()  # entries used since then belong to this run and are not evicted


class Cache:
    """Store decoded images in a folder, or in memory.

    Args:
        folder: Folder of the entries; ``None`` keeps them in memory.
        max_gb: Largest size of all entries in GB of 10⁹ bytes. Above it, the entries unused for longest are removed;
            entries of the present run are never removed.
    """

    def __init__(self, folder: Path | None, max_gb: float = 20.0) -> None:
        self.folder = None if folder is None else Path(folder).expanduser().absolute()
        self.max_gb = max_gb
        self.memory: dict[str, CacheEntry] = {}
        self._bytes = 0

    def path(self, key: str) -> Path:
        """Return the file of an entry, whether or not it exists."""
        assert self.folder is not None
        return self.folder / key[:2] / f"{key}.safetensors"

    def load(self, key: str) -> CacheEntry | None:
        """Return an entry, or ``None`` where it is missing or damaged."""
        return self.memory.get(key) if self.folder is None else self._read(load_entry, key)

    def report(self, key: str) -> Report | None:
        """Return the report of an entry (issues and remarks), or ``None`` where the entry is missing or damaged."""
        if self.folder is None:
            return self.memory[key].report() if key in self.memory else None
        return self._read(load_report, key)

    def save(self, key: str, entry: CacheEntry) -> None:
        """Store an entry, completely or not at all.

        Raises:
            DataError: The disk is full or the folder cannot be written.
        """
        if self.folder is None:
            self.memory[key] = entry
            return
        try:
            with atomic_write(self.path(key)) as part:
                save_entry(entry, part)
        except OSError as error:
            raise self._refusal(error) from error

    def fetch(self, key: str, record: Record, preprocessing: Preprocessing) -> CacheEntry:
        """Return an entry, and decode it again where it has disappeared since ``fill``.

        Raises:
            DataError: The entry has disappeared and the image can no longer be decoded.
        """
        entry = self.load(key)
        if entry is None:
            made = preprocessing.apply(record)
            if isinstance(made, Issue):
                raise DataError(
                    f"{record.file}: {made.reason} {made.detail}. It could be read when training started: the file or "
                    f"the cache folder {self.folder} has changed since. Start again to leave it out."
                )
            entry = made
            self.save(key, entry)
        return entry

    def fill(
        self, records: Sequence[Record], keys: Sequence[str], preprocessing: Preprocessing, workers: int = 0
    ) -> list[Report]:
        """Decode the images that have no entry yet, with a progress bar.

        Args:
            records: The images.
            keys: The name of each entry (``preprocessing.keys(records)``).
            preprocessing: How images are decoded and framed.
            workers: Processes that decode; 0 decodes in this process.

        Returns:
            The report of each record. An unusable image has an issue but no entry; the next run decodes it again.
            Records of equal content share an entry, but an issue names the files of its own record.

        Raises:
            DataError: The entries exceed ``max_gb``, or the disk is full.
        """
        needed = dict(zip(keys, records, strict=True))
        reports = self._present(needed)
        if len(reports) < len(needed):
            with self._locked():
                reports = self._present(needed)  # another process may have filled it meanwhile
                missing = {key: record for key, record in needed.items() if key not in reports}
                self._make_room(needed, missing, preprocessing)
                reports |= self._decode(missing, preprocessing, workers, set(needed))
        return [
            reports[key] if record is needed[key] or not reports[key].transient else preprocessing.report(record)
            for key, record in zip(keys, records, strict=True)
        ]

    def _present(self, keys: Iterable[str]) -> dict[str, Report]:
        reports = {key: report for key in keys if (report := self.report(key)) and not report.transient}
        if self.folder is not None:
            for key in reports:
                with suppress(OSError):  # another user's entry: its time of use cannot be set
                    os.utime(self.path(key))
        return reports

    def _decode(
        self, missing: Mapping[str, Record], preprocessing: Preprocessing, workers: int, keep: set[str]
    ) -> dict[str, Report]:
        jobs = _Jobs(list(missing.items()), preprocessing, self)
        loader: Any = DataLoader(
            jobs,
            batch_size=None,
            num_workers=min(workers, len(jobs)),
            collate_fn=_as_is,
            generator=torch.Generator().manual_seed(0),  # else a cold cache would move the global random stream
        )
        reports = {}
        for key, result, size in tqdm(
            loader, f"Decoding {len(jobs)} images once", len(jobs), leave=False, unit="image"
        ):
            if isinstance(result, DataError):
                raise result
            if isinstance(result, CacheEntry):
                self.memory[key] = result
                result = result.report()
            reports[key] = result
            self._grow(size, keep)
        return reports

    def _make_room(
        self, needed: Mapping[str, Record], missing: Mapping[str, Record], preprocessing: Preprocessing
    ) -> None:
        """Raise before decoding if the entries cannot fit; otherwise evict old entries until they do."""
        least = sum(preprocessing.smallest_bytes(record) for record in needed.values())
        if least > self.max_gb * GB:
            raise DataError(self._too_small(len(needed), least))
        if self.folder is None:
            self._bytes = sum(entry.nbytes for entry in self.memory.values())
            return
        for part in self.folder.glob("*/.*.part"):  # of a killed process
            if part.stat().st_mtime < time.time() - 3600:
                part.unlink(missing_ok=True)
        self._bytes = sum(path.stat().st_size for path in self._entries())
        expected = sum(preprocessing.smallest_bytes(record) for record in missing.values())
        self._grow(expected, set(needed))
        self._bytes -= expected

    def _grow(self, size: int, keep: set[str]) -> None:
        """Add ``size`` bytes to the count and evict the entries unused for longest until the total fits."""
        self._bytes += size
        if self._bytes > self.max_gb * GB and self.folder is not None:
            old = {p: p.stat() for p in self._entries() if p.stem not in keep}
            for path, stat in sorted(old.items(), key=lambda item: item[1].st_mtime):
                if stat.st_mtime >= _STARTED or self._bytes <= self.max_gb * GB:
                    break
                path.unlink(missing_ok=True)
                self._bytes -= stat.st_size
        if self._bytes > self.max_gb * GB:
            raise DataError(self._too_small(len(keep), self._bytes))

    def _entries(self) -> list[Path]:
        assert self.folder is not None
        return list(self.folder.glob("[0-9a-f][0-9a-f]/*.safetensors"))

    def _read(self, reader: Callable[[Path], T], key: str) -> T | None:
        try:
            return reader(self.path(key))
        except FileNotFoundError:
            return None
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            log.warning("Cache entry %s is damaged (%s); its image is decoded again", self.path(key), error)
            return None

    def _too_small(self, count: int, size: float) -> str:
        where = "in memory (cache_dir: null)" if self.folder is None else f"in {self.folder}"
        return (
            f"{count} decoded images take at least {size / GB:.3g} GB {where}, more than cache_max_gb={self.max_gb:g} "
            "allows. Raise data.init_args.cache_max_gb, or lower image_size."
        )

    def _refusal(self, error: OSError) -> DataError:
        elsewhere = "data.init_args.cache_dir to another folder, or set it to null to keep decoded images in memory."
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return DataError(
                f"The disk of the cache folder {self.folder} is full. Free space there, or point {elsewhere}"
            )
        return DataError(f"The cache folder {self.folder} cannot be written ({error}). Point {elsewhere}")

    def _locked(self) -> AbstractContextManager[object]:
        """Return a context in which no other process fills this folder; the lock of a killed process is free."""
        if self.folder is None:
            return nullcontext()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self.folder / "filling.lock")
            try:
                return lock.acquire(blocking=False)
            except filelock.Timeout:
                log.warning("Another process is decoding into %s; waiting for it", self.folder)
                return lock.acquire()
        except OSError as error:
            raise self._refusal(error) from error


class _Jobs(Dataset[tuple[str, object, int]]):
    """Decodes and stores one record per item; an error is returned as a value, so that its message is not wrapped."""

    def __init__(self, jobs: list[tuple[str, Record]], preprocessing: Preprocessing, cache: Cache) -> None:
        self.jobs, self.preprocessing, self.cache = jobs, preprocessing, cache

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, index: int) -> tuple[str, CacheEntry | Report | DataError, int]:
        """Return the key; the entry (in memory), its report (on disk) or an error; and the size in bytes."""
        key, record = self.jobs[index]
        try:
            made = self.preprocessing.apply(record)
            if isinstance(made, Issue):
                return key, Report((made,)), 0
            if self.cache.folder is None:
                return key, made, made.nbytes
            self.cache.save(key, made)
        except DataError as error:
            return key, error, 0
        return key, made.report(), self.cache.path(key).stat().st_size


def _as_is(item: object) -> object:
    return item
