"""Recognise a full or read-only disk, and other limits of the system, in the exceptions of any library."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from pathlib import Path

_FULL = {errno.ENOSPC: "no space left", errno.EDQUOT: "the disk quota is used up", errno.EFBIG: "the file is too large"}
_LIMITS = _FULL | {
    errno.EIO: "the disk failed",
    errno.EMFILE: "too many open files (raise the limit with 'ulimit -n', or use fewer num_workers)",
    errno.ENFILE: "too many open files on this computer",
}
_CLOSED = {
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "operation not permitted",
    errno.ENOTDIR: "a part of the path is a file and not a folder",
    errno.EISDIR: "it is a folder",
    errno.EEXIST: "something else with this name is there",
    errno.ENAMETOOLONG: "the path is too long",
    errno.ELOOP: "too many symbolic links",
}

_TEXTS = (
    (r"No space left on device|database or disk is full|shared memory.*No space", _FULL[errno.ENOSPC]),
    (r"Too many open files|received \d+ items of ancdata", _LIMITS[errno.EMFILE]),
    (r"out of shared memory|insufficient shared memory", "no shared memory left (/dev/shm; use fewer num_workers)"),
    (
        r"PytorchStreamWriter failed|inline_container\.cc.*unexpected pos|\d+ requested and \d+ written",
        "a write failed",
    ),
    (r"Read-only file system|attempt to write a readonly database", _CLOSED[errno.EROFS]),
    (r"unable to open database file", _CLOSED[errno.EACCES]),
)
"""Messages of libraries that raise no ``OSError`` with a number: torch, safetensors, NumPy, SQLite."""

_SELDOM = ("RuntimeError", "SafetensorError", "OperationalError", "OSError")
"""Classes of the exceptions that carry such messages."""

_NAME = "written_file"
"""Attribute that ``name_file`` gives to exceptions that have none for the name of a file."""


def system_error(error: BaseException) -> tuple[str, int] | None:
    """Return what the system refused, and the exit code of a command that it ends; ``None`` for any other error.

    The causes of an exception count too: libraries wrap what they met.

    Args:
        error: The exception.

    Returns:
        One sentence without a full stop, with the file where it is known. The code is 1 where the same command can be
        continued later (a full disk), and 2 where a path must be changed first (a folder that is not writable).
    """
    chain = list(_chain(error))
    for one in chain:
        if isinstance(one, OSError) and one.errno in _LIMITS | _CLOSED:
            return f"{_where(one)}{(_LIMITS | _CLOSED)[one.errno]}", 1 if one.errno in _LIMITS else 2
    for one in chain:
        if type(one).__name__ in _SELDOM:
            for pattern, words in _TEXTS:
                if re.search(pattern, str(one)):
                    return f"{_where(one)}{words}", 2 if words in _CLOSED.values() else 1
    return None


def name_file(error: BaseException, file: Path) -> None:
    """Add the name of a file to the exceptions of a failed write among the causes of an exception.

    The system names no file where a write fails, and torch and safetensors name none at all.
    """
    for one in _chain(error):
        if isinstance(one, OSError) and one.errno is not None:
            one.filename = str(file) if one.filename is None else one.filename
        elif type(one).__name__ in _SELDOM:
            setattr(one, _NAME, getattr(one, _NAME, str(file)))


def _where(error: BaseException) -> str:
    name = getattr(error, "filename", None) or getattr(error, _NAME, None)
    return "" if name is None else f"{name}: "


def ends_every_write(error: BaseException) -> bool:
    """Return whether an exception comes from the disk or the system, so that the next file would fail as well."""
    found = system_error(error)
    return found is not None and (found[1] == 1 or found[0].endswith(_CLOSED[errno.EROFS]))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
