"""``metrics.csv`` in the run folder: one row per logged step."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from mtmedformer.storage.atomic_write import atomic_write


class RunLogger(Logger):
    """Writes ``metrics.csv`` into the run folder; a resumed run appends to the rows that are there.

    Epochs are counted from 1. The file is created with its first row. Columns are sorted by name; a new metric adds a
    column.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder
        self.file = Path(folder, "metrics.csv")
        self._columns: list[str] = []

    @property
    def name(self) -> str:
        """No name: there is one such file per run folder."""
        return ""

    @property
    def version(self) -> str:
        """No version, for the same reason."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return self.folder

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a row.

        Args:
            metrics: Numbers or one-element tensors by name.
            step: Step of the trainer.
        """
        row: dict[str, Any] = {
            name: getattr(value, "item", lambda value=value: value)() for name, value in metrics.items()
        }
        if step is not None:
            row["step"] = step
        if "epoch" in row:
            row["epoch"] += 1  # Lightning counts from 0
        if not row.keys() <= set(self._columns):
            self._rewrite(row)
        with self.file.open("a", newline="", encoding="utf-8") as stream:
            csv.DictWriter(stream, self._columns).writerow(row)

    @rank_zero_only
    def log_hyperparams(self, params: Any = None, *args: Any, **kwargs: Any) -> None:
        """Do nothing: ``config.yaml`` holds every hyperparameter."""

    def _rewrite(self, row: Mapping[str, Any]) -> None:
        """Write the rows that are in the file again, with the columns of a new row added."""
        rows = _rows(self.file)
        self._columns = sorted({*self._columns, *row, *(name for earlier in rows for name in earlier)})
        with atomic_write(self.file) as part, part.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, self._columns)
            writer.writeheader()
            writer.writerows(rows)


def _rows(file: Path) -> list[dict[str, str]]:
    """Return the complete rows of the file; a killed run may have left half of a last line."""
    if not file.is_file():
        return []
    complete, _, _ = file.read_text(encoding="utf-8").rpartition("\n")
    return [
        {name: value for name, value in row.items() if value != ""} for row in csv.DictReader(complete.splitlines())
    ]
