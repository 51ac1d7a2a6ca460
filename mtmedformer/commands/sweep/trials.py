"""Runs trials side by side, each ``mtmedformer fit`` in a process of its own, and reads what came out."""

from __future__ import annotations

import csv
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mtmedformer.processes import stop_all

DONE = (0, 3)
"""Exit codes of a training that has come to its end; 3 says that some of the data could not be used."""

GRACE = 60.0
"""Seconds a trial has to save itself after Ctrl-C."""


@dataclass
class Job:
    """A trial at work.

    Attributes:
        number: Number of the trial.
        folder: Its run folder.
        process: Its process.
        slot: Its place among the parallel ones, which decides its GPU.
        began: When it was started, in seconds of the monotonic clock.
    """

    number: int
    folder: Path
    process: subprocess.Popen[bytes]
    slot: int = 0
    began: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Outcome:
    """How a trial ended.

    Attributes:
        number: Number of the trial.
        value: What it reached in its best epoch; ``None`` where it failed.
        metrics: Everything validated in that epoch.
        epoch: That epoch, from 0.
        seconds: How long it took, since it was last started.
        reason: Why it failed.
    """

    number: int
    value: float | None
    metrics: dict[str, float] = field(default_factory=dict)
    epoch: int = 0
    seconds: float = 0.0
    reason: str = ""


def run_trials(
    waiting: Iterator[tuple[int, list[str]]],
    folder_of: Callable[[int], Path],
    jobs: int,
    read: Callable[[Job], Outcome],
) -> Iterator[Outcome]:
    """Run trials, ``jobs`` at a time, and yield how each ended, in the order they end.

    Where the caller is interrupted, the running trials save themselves first; they are continued when they come again.

    Args:
        waiting: Number and arguments of each trial; asked for one only when there is room for it.
        folder_of: The run folder of a trial.
        jobs: How many run at once.
        read: Reads how a trial ended.
    """
    running: list[Job] = []
    more = True
    try:
        while more or running:
            while more and len(running) < jobs:
                slot = min(set(range(jobs)) - {one.slot for one in running})
                following = next(waiting, None)
                if following is None:
                    more = False
                else:
                    running.append(_start(*following, folder_of(following[0]), jobs, slot))
            time.sleep(0.1)
            for job in [one for one in running if one.process.poll() is not None]:
                running.remove(job)
                yield read(job)
    finally:
        stop_all([one.process for one in running], GRACE)


def _start(number: int, arguments: list[str], folder: Path, jobs: int, slot: int) -> Job:
    last = folder / "checkpoints/last.ckpt"
    if last.is_file():
        arguments = [*arguments, f"--ckpt_path={last}"]
    elif folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    own = [f"--trainer.default_root_dir={folder}", "--trainer.enable_progress_bar=false"]
    with (folder / "log.txt").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mtmedformer", *arguments, *own],
            env=_environment(jobs, slot),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches the sweep alone, which passes it on
        )
    return Job(number, folder, process, slot)


def _environment(jobs: int, slot: int) -> dict[str, str]:
    """Return the environment of a trial: a share of the cores, a GPU, and W&B silent unless it was asked for."""
    import torch

    kept = {key: value for key, value in os.environ.items() if key not in {"LOCAL_RANK", "MTMEDFORMER_RUN_DIR"}}
    home = str(Path(__file__).resolve().parents[3])
    kept["PYTHONPATH"] = os.pathsep.join([path for path in (home, kept.get("PYTHONPATH")) if path])
    kept.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    kept.setdefault("WANDB_MODE", "disabled")
    if jobs > 1 and (gpus := torch.cuda.device_count()) and "CUDA_VISIBLE_DEVICES" not in kept:
        kept["CUDA_VISIBLE_DEVICES"] = str(slot % gpus)
    return kept | {"WANDB_SILENT": "true", "PYTHONUNBUFFERED": "1"}


def outcome(job: Job, metric: str, maximise: bool) -> Outcome:
    """Return how a trial ended: the epoch in which a metric was best, and everything validated in it."""
    seconds, code = time.monotonic() - job.began, job.process.returncode
    if code not in DONE:
        return Outcome(job.number, None, seconds=seconds, reason=f"{last_words(job.folder)} (exit code {code})")
    rows = _rows(job.folder / "metrics.csv")
    seen = [row for row in rows if math.isfinite(row.get(metric, math.nan))]
    if not seen:
        names = sorted({name for row in rows for name in row if name.startswith("val/") and name.count("/") < 2})
        there = f"; there are {', '.join(names)} and more" if names else ""
        return Outcome(job.number, None, seconds=seconds, reason=f"no value of {metric} was logged{there}")
    best = max(seen, key=lambda row: row[metric] if maximise else -row[metric])
    metrics = {name: value for name, value in best.items() if "val/" in name}
    return Outcome(job.number, best[metric], metrics, int(best.get("epoch", 0)), seconds)


def _rows(file: Path) -> list[dict[str, float]]:
    if not file.is_file():
        return []
    with file.open(newline="") as lines:
        return [{key: float(value) for key, value in row.items() if _is_number(value)} for row in csv.DictReader(lines)]


def _is_number(text: str | None) -> bool:
    try:
        float(text or "")
    except ValueError:
        return False
    return True


def last_words(folder: Path) -> str:
    """Return the paragraph of a trial's mistake, or the last line it wrote."""
    file = folder / "log.txt"
    text = file.read_text(errors="replace").strip() if file.is_file() else ""
    mistake = text.rfind("mtmedformer: ")
    words = text[mistake:] if mistake >= 0 else text.rpartition("\n")[2]
    return " ".join(words.split())[:400] or "no word"
