"""Run trials side by side, each ``mtmedformer fit`` in a process of its own, and read their results."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from mtmedformer.commands.child_runs import DONE, GRACE, failure_text, start
from mtmedformer.processes import stop_all
from mtmedformer.storage.atomic_write import atomic_write

RESULT = "result.json"
"""File with the result of a trial, in its folder."""


@dataclass
class RunningTrial:
    """A trial that is running.

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
class TrialResult:
    """The result of a trial that has ended.

    Attributes:
        number: Number of the trial.
        value: The sweep's metric in the best epoch; ``None`` for a trial that failed.
        metrics: All validation metrics of that epoch.
        epoch: That epoch, from 0.
        seconds: Time since the trial was last started.
        reason: Why it failed.
        parameters: Its parameters, by dotted key.
    """

    number: int
    value: float | None
    metrics: dict[str, float] = field(default_factory=dict)
    epoch: int = 0
    seconds: float = 0.0
    reason: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)


def run_trials(
    waiting: Iterator[tuple[int, list[str]]],
    folder_of: Callable[[int], Path],
    jobs: int,
    read: Callable[[RunningTrial], TrialResult],
) -> Generator[TrialResult]:
    """Run trials, ``jobs`` at a time, and yield their results in the order in which they end.

    When the caller is interrupted, the running trials save a checkpoint first, from which they are continued later.

    Args:
        waiting: Number and arguments of each trial; the next one is taken only when there is room for it.
        folder_of: Returns the run folder of a trial.
        jobs: Number of trials that run at once.
        read: Reads the result of a trial that has ended.
    """
    running: list[RunningTrial] = []
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
            for trial in [one for one in running if one.process.poll() is not None]:
                running.remove(trial)
                yield read(trial)
    finally:
        stop_all([one.process for one in running], GRACE)


def _start(number: int, arguments: list[str], folder: Path, jobs: int, slot: int) -> RunningTrial:
    last = folder / "checkpoints/last.ckpt"
    if last.is_file():
        arguments = [*arguments, f"--ckpt_path={last}"]
    elif folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    own = [f"--trainer.default_root_dir={folder}", "--trainer.enable_progress_bar=false"]
    process = start("mtmedformer", [*arguments, *own], folder / "log.txt", jobs, _variables(jobs, slot))
    return RunningTrial(number, folder, process, slot)


def _variables(jobs: int, slot: int) -> dict[str, str]:
    """Return environment variables of a trial: a GPU of its own, and no W&B unless the user has set its mode."""
    variables = {"WANDB_MODE": os.environ.get("WANDB_MODE", "disabled"), "WANDB_SILENT": "true"}
    if jobs > 1 and (gpus := torch.cuda.device_count()) and "CUDA_VISIBLE_DEVICES" not in os.environ:
        variables["CUDA_VISIBLE_DEVICES"] = str(slot % gpus)
    return variables


def read_result(trial: RunningTrial, metric: str, maximise: bool) -> TrialResult:
    """Read the result of a trial that has ended: the epoch with the best value of a metric, and its metrics."""
    seconds, code = time.monotonic() - trial.began, trial.process.returncode
    if code not in DONE:
        reason = f"{failure_text(trial.folder / 'log.txt')} (exit code {code})"
        return TrialResult(trial.number, None, seconds=seconds, reason=reason)
    rows = _rows(trial.folder / "metrics.csv")
    known = [row for row in rows if math.isfinite(row.get(metric, math.nan))]
    if not known:
        names = sorted({name for row in rows for name in row if name.startswith("val/") and name.count("/") < 2})
        others = f"; logged were {', '.join(names)} and metrics of tasks" if names else ""
        return TrialResult(trial.number, None, seconds=seconds, reason=f"no value of {metric} was logged{others}")
    best = max(known, key=lambda row: row[metric] if maximise else -row[metric])
    metrics = {name: value for name, value in best.items() if "val/" in name}
    return TrialResult(trial.number, best[metric], metrics, int(best.get("epoch", 0)), seconds)


def save_result(result: TrialResult, folder: Path) -> None:
    """Write the result of a trial into its folder."""
    with atomic_write(folder / RESULT) as part:
        part.write_text(json.dumps(asdict(result), indent=1) + "\n")


def load_result(folder: Path, number: int, value: float | None, parameters: dict[str, Any]) -> TrialResult:
    """Return the stored result of a trial; without its file, value and parameters only."""
    if not (folder / RESULT).is_file():
        return TrialResult(number, value, reason="" if value is not None else "failed", parameters=parameters)
    stored = json.loads((folder / RESULT).read_text())
    return TrialResult(**{**stored, "number": number, "value": value, "parameters": parameters})


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
