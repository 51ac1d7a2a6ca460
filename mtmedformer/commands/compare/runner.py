"""Runs cells side by side, each in a process of its own, and says how long it will take."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from rich.console import Console

from mtmedformer.commands.compare.cells import Cell, Split
from mtmedformer.processes import stop_all

GRACE = 60.0
"""Seconds a cell has to save itself after Ctrl-C."""


@dataclass
class Running:
    """A cell at work.

    Attributes:
        cell: The cell.
        process: Its process.
        slot: Place among the parallel ones, which decides its GPU.
        began: When it was started, in seconds of the monotonic clock.
    """

    cell: Cell
    process: subprocess.Popen[bytes]
    slot: int
    began: float = field(default_factory=time.monotonic)


@dataclass
class Progress:
    """How far a study is, and how long the rest will take.

    Attributes:
        total: Cells to run.
        jobs: How many run at once.
        done: Seconds of each cell that has ended.
    """

    total: int
    jobs: int
    done: list[float] = field(default_factory=list)

    def left(self, running: Sequence[tuple[float, float]]) -> float | None:
        """Return the seconds left, or ``None`` where nothing can be said yet.

        Args:
            running: Of each running cell the seconds it has run, and the share of its epochs that is done.
        """
        guesses = [elapsed / share for elapsed, share in running if share > 0.05]
        if not (self.done or guesses):
            return None
        whole = median(self.done or guesses)
        waiting = self.total - len(self.done) - len(running)
        rest = sum(max(whole - elapsed, 0.0) for elapsed, _ in running) + waiting * whole
        return rest / max(1, min(self.jobs, waiting + len(running)))


def run_cells(
    cells: Sequence[Cell],
    jobs: int,
    split: Split,
    console: Console,
    gpus: int = 0,
    any_code: bool = False,
    environment: Callable[[Cell], dict[str, str]] = lambda cell: {},
) -> list[Cell]:
    """Run cells, ``jobs`` at a time, and return those that failed; the others go on.

    The first Ctrl-C lets the running cells save themselves, the second ends them at once; either way the cells are
    taken up again by the next start of the study.

    Args:
        cells: Cells to run, in this order, prepared.
        jobs: How many run at once.
        split: What they are judged on.
        console: Where progress is told.
        gpus: GPUs that the cells are dealt out to; 0 leaves the choice to the configuration.
        any_code: See ``cells_of``.
        environment: Further environment variables of a cell.

    Raises:
        KeyboardInterrupt: After Ctrl-C, when no cell is left running.
    """
    waiting, failed = list(cells), list[Cell]()
    running: list[Running] = []
    progress = Progress(len(cells), jobs)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    try:
        with console.status("") as status:
            while waiting or running:
                while waiting and len(running) < jobs:
                    slot = min(set(range(jobs)) - {one.slot for one in running})
                    running.append(_start(waiting.pop(0), slot, split, threads, gpus, any_code, environment))
                time.sleep(0.2)
                for one in [r for r in running if r.process.poll() is not None]:
                    running.remove(one)
                    progress.done.append(time.monotonic() - one.began)
                    failed += [] if one.cell.finished(split) else [one.cell]
                    console.print(_told(one, progress, split), highlight=False, markup=False)
                status.update(_status(running, progress))
    except KeyboardInterrupt:
        console.print("\nCtrl-C: the running cells save themselves. Press again to stop at once.")
        stop_all([one.process for one in running], GRACE)
        raise
    return failed


def _start(
    cell: Cell,
    slot: int,
    split: Split,
    threads: int,
    gpus: int,
    any_code: bool,
    environment: Callable[[Cell], dict[str, str]],
) -> Running:
    command = [sys.executable, "-m", "mtmedformer.commands.compare.work", str(cell.folder), f"--split={split}"]
    here = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)), "PYTHONUNBUFFERED": "1"}
    if gpus:
        here["CUDA_VISIBLE_DEVICES"] = str(slot % gpus)
    inherited = {k: v for k, v in os.environ.items() if k not in {"LOCAL_RANK", "MTMEDFORMER_RUN_DIR"}}
    home = str(Path(__file__).resolve().parents[3])
    inherited["PYTHONPATH"] = os.pathsep.join([p for p in (home, inherited.get("PYTHONPATH")) if p])
    with (cell.folder / "log.txt").open("ab") as log:
        process = subprocess.Popen(
            [*command, *(["--any-code"] if any_code else [])],
            env={**inherited, **here, **environment(cell)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches the study alone, which passes it on
        )
    return Running(cell, process, slot)


def _status(running: Sequence[Running], progress: Progress) -> str:
    now = time.monotonic()
    shares = [epochs_done(one.cell) for one in running]
    left = progress.left([(now - one.began, share) for one, share in zip(running, shares, strict=True)])
    at_work = ", ".join(
        f"{one.cell.variant} {one.cell.run} {share:.0%}" for one, share in zip(running, shares, strict=True)
    )
    time_left = "" if left is None else f" · about {duration(left)} left"
    return f"{len(progress.done)}/{progress.total} cells{time_left} · {at_work}"


def _told(one: Running, progress: Progress, split: Split) -> str:
    left = progress.left([])
    words = [f"{len(progress.done)}/{progress.total}", f"{one.cell.variant} {one.cell.run}"]
    words.append(duration(progress.done[-1]))
    if not one.cell.finished(split):
        words.append(f"FAILED ({one.process.returncode}): {last_words(one.cell)}; see {one.cell.folder / 'log.txt'}")
    if left and progress.total > len(progress.done):
        words.append(f"about {duration(left)} left")
    return " · ".join(words)


def last_words(cell: Cell) -> str:
    """Return the last line that a cell wrote, or the paragraph of its mistake."""
    file = cell.folder / "log.txt"
    text = file.read_text(errors="replace") if file.is_file() else ""
    mistake = text.rfind("mtmedformer: ")
    lines = text.strip().splitlines()
    return " ".join(text[mistake:].split())[:400] if mistake >= 0 else lines[-1].strip()[:400] if lines else "no word"


def epochs_done(cell: Cell) -> float:
    """Return the share of a cell's epochs that it has logged."""
    total = cell.config["trainer"].get("max_epochs") or 0
    if total <= 0:
        return 0.0
    epochs = [int(row["epoch"]) for row in cell.logged() if row.get("epoch", "").isdigit()]
    return min(1.0, (max(epochs) + 1) / total) if epochs else 0.0


def duration(seconds: float) -> str:
    """Return a time for people: ``45 s``, ``3 min``, ``2 h 05 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
