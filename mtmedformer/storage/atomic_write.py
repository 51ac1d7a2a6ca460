"""Write files atomically: a reader sees the old file or the new one, never a part."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mtmedformer.storage.write_errors import name_file


@contextmanager
def atomic_write(file: Path) -> Iterator[Path]:
    """Yield a path beside ``file`` to write to; it replaces ``file`` once the block has ended without an exception.

    The new content and its name are on the disk (fsync) when this returns, so that a power failure cannot leave an
    empty file. A missing folder is created. After an exception the partial file is removed and the old file is still
    there. A killed process leaves a hidden ``.<name>.<process>.part`` behind, which nothing reads
    (see ``remove_partial_files``).

    Args:
        file: The file to write.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name[-80:]}.{os.getpid()}.part")
    try:
        yield part
        _flush(part, os.O_RDWR)
        os.replace(part, file)
        if os.name == "posix":  # other systems do not open folders
            _flush(file.parent, os.O_RDONLY)
    except Exception as error:
        name_file(error, file)
        raise
    finally:
        part.unlink(missing_ok=True)


def remove_partial_files(folder: Path) -> None:
    """Remove what killed processes left of ``atomic_write`` in a folder.

    Args:
        folder: A folder that no other process writes to; it may be missing.
    """
    for part in folder.glob(".*.part"):
        part.unlink(missing_ok=True)


def _flush(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
