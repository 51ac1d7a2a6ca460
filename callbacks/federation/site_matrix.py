"""Who holds what: the table on screen, and ``sites.json`` and ``sites.png`` in the run folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from federation.partition import Holding, picture


def show_sites(holdings: Sequence[Holding]) -> None:
    """Print patients, images and labels by task, a row a site."""
    table = Table("site", "patients", "images", "validation", pad_edge=False, title="Sites, and what each has labelled")
    tasks = list(holdings[0].labels) if holdings else []
    for task in tasks:
        table.add_column(task)
    for column in table.columns[1:]:
        column.justify = "right"
    for h in holdings:
        counts = [str(h.labels[t] or "–") for t in tasks]
        table.add_row(h.site, str(h.patients), str(h.images), str(h.validation), *counts)
    Console().print(table)


def write_sites(holdings: Sequence[Holding], folder: Path) -> None:
    """Write the counts as JSON and as a picture."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sites.json").write_text(json.dumps([asdict(h) for h in holdings], indent=1) + "\n")
    picture(holdings).savefig(folder / "sites.png", dpi=110)
