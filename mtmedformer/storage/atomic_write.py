"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """Yield a path beside ``file`` to write to; it takes the place of ``file`` once the block has ended well.

    The folder is made where it is missing. After an exception what was written so far is removed, and what was there
    before is still there. A process that is killed leaves a hidden ``.<name>.<process>.part`` behind, which nothing
    reads.

    Args:
        file: The file that is to be there in the end.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name[-80:]}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
