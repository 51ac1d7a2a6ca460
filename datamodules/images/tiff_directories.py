"""Directories of TIFF files and EXIF blocks, checked before a library reads all values that they point to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from datamodules.images.codestreams import StreamError

_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
"""Size in bytes of one value of each field type."""

_NESTED = (34665, 34853, 40965)
"""Tags that point to further directories which libraries read: EXIF, GPS, interoperability."""

MAX_ENTRIES = 1024
"""Largest number of entries of a directory; real ones have fewer than a hundred."""


@dataclass(frozen=True)
class Directory:
    """One directory.

    Attributes:
        fields: By tag: the number of values, their size in bytes together, and the first value if it is an integer.
        following: Position of the next directory; 0 if there is none.
    """

    fields: dict[int, tuple[int, int, int]]
    following: int

    def number(self, tag: int, default: int = 0) -> int:
        """Return the first value of a tag."""
        return self.fields.get(tag, (0, 0, default))[2]

    def count(self, tag: int) -> int:
        """Return the number of values of a tag."""
        return self.fields.get(tag, (0, 0, 0))[0]


def tiff_start(content: bytes) -> int | None:
    """Return where the first directory of a TIFF file or EXIF block is, or ``None`` if it is neither."""
    order = _order(content)
    if order is None:
        return None
    if int.from_bytes(content[2:4], order) == 43:  # BigTIFF
        return int.from_bytes(content[8:16], order)
    return int.from_bytes(content[4:8], order)


def read_directory(content: bytes, start: int) -> Directory:
    """Read the entries of one directory, not the values that they point to.

    Raises:
        StreamError: The directory is damaged or has too many entries.
    """
    order = _order(content)
    assert order is not None
    big = int.from_bytes(content[2:4], order) == 43
    head, size, word = (8, 20, 8) if big else (2, 12, 4)
    number = int.from_bytes(content[start : start + head], order)
    at = start + head
    if not number or number > MAX_ENTRIES or at + number * size > len(content):
        raise StreamError(f"its TIFF or EXIF directory is damaged or has too many entries ({number})")
    fields = {}
    for entry in range(at, at + number * size, size):
        tag, kind = (int.from_bytes(content[entry + i : entry + i + 2], order) for i in (0, 2))
        count = int.from_bytes(content[entry + 4 : entry + 4 + word], order)
        each = _SIZES.get(kind, 1)
        value = content[entry + 4 + word : entry + 4 + 2 * word]
        if count * each > word:
            where = int.from_bytes(value, order)
            value = content[where : where + each]
        fields[tag] = (count, count * each, int.from_bytes(value[:each], order))
    at += number * size
    return Directory(fields, int.from_bytes(content[at : at + word], order))


def check_directories(content: bytes, start: int) -> None:
    """Check the first directory and those below it.

    Raises:
        StreamError: A directory is damaged, or its values are larger than the file.
    """
    total, waiting, seen = 0, [start], set[int]()
    while waiting:
        at = waiting.pop()
        if at in seen:
            raise StreamError("its TIFF or EXIF directories point to each other")
        seen.add(at)
        directory = read_directory(content, at)
        total += sum(size for _, size, _ in directory.fields.values())
        if total > len(content):
            raise StreamError("its TIFF or EXIF directory points to more values than the file has")
        waiting += [directory.number(tag) for tag in _NESTED if tag in directory.fields]


def _order(content: bytes) -> Literal["little", "big"] | None:
    if content[:4] in (b"II*\0", b"II+\0"):
        return "little"
    return "big" if content[:4] in (b"MM\0*", b"MM\0+") else None
