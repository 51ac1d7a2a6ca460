"""Lines and tables of a federation on the console."""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.table import Table

from federation.partition import Holding
from federation.server.history import RoundRecord
from mtmedformer.metrics.base import known_mean
from mtmedformer.plots.terminal import SafeConsole


def show_sites(holdings: Sequence[Holding], notes: Sequence[str] = ()) -> None:
    """Print the patients, images and labels by task, one row per site, and notes below."""
    table = Table("site", "patients", "images", "validation", pad_edge=False, title="Sites, and what each has labelled")
    tasks = list(holdings[0].labels) if holdings else []
    for task in tasks:
        table.add_column(task)
    for column in table.columns[1:]:
        column.justify = "right"
    for h in holdings:
        counts = [str(h.labels[t] or "–") for t in tasks]
        table.add_row(h.site, str(h.patients), str(h.images), str(h.validation), *counts)
    SafeConsole().print(table)
    for note in notes:
        print(note)


def round_line(record: RoundRecord, rounds: int, seconds: float) -> str:
    """Return one line about a round: number of sites, faults, and the score of the mean and of the worst site.

    Args:
        record: The round's entry in the history.
        rounds: Number of rounds of the run.
        seconds: Duration of the round, validation included.
    """
    count = sum(site.contributed for site in record.sites.values())
    parts = [f"round {record.round + 1}/{rounds}", f"{count} site{'s' * (count != 1)}"]
    parts += [f"without {fault.site} ({fault.fault})" for fault in record.faults]
    scores = {k.split("/")[1]: v for k, v in record.validation.items() if k.endswith("/val/score")}
    known = {site: score for site, score in scores.items() if score == score}
    if known:
        worst = min(known, key=lambda site: known[site])
        parts.append(f"score {known_mean(known.values()):.3f}, worst {worst} {known[worst]:.3f}")
    return " · ".join([*parts, f"{seconds:.1f} s"])


def print_line(trainer: L.Trainer, line: str) -> None:
    """Print a line above the progress bar, where there is one."""
    bar = trainer.progress_bar_callback
    if isinstance(bar, ProgressBar):
        bar.print(line)
    else:
        print(line, flush=True)
