"""Run trainings side by side, each in a process of its own, and show the progress and the time left."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

from rich.console import Console

from mtmedformer.commands.child_runs import GRACE, failure_text, start
from mtmedformer.commands.compare.trainings import Split, Training
from mtmedformer.processes import stop_all


@dataclass
class RunningTraining:
    """A training that is running.

    Attributes:
        training: The training.
        process: Its process.
        slot: Its place among the parallel ones, which decides its GPU.
        began: When it was started, in seconds of the monotonic clock.
    """

    training: Training
    process: subprocess.Popen[bytes]
    slot: int
    began: float = field(default_factory=time.monotonic)


@dataclass
class Progress:
    """Progress of a study, to estimate the time left.

    Attributes:
        total: Number of trainings to run.
        jobs: Number of trainings that run at once.
        done: Seconds of each training that has ended.
    """

    total: int
    jobs: int
    done: list[float] = field(default_factory=list)

    def left(self, running: Sequence[tuple[float, float]]) -> float | None:
        """Return the seconds left, or ``None`` if there is nothing to estimate them from yet.

        Args:
            running: For each running training the seconds it has run and the share of its epochs that is done.
        """
        guesses = [elapsed / share for elapsed, share in running if share > 0.05]
        if not (self.done or guesses):
            return None
        duration = median(self.done or guesses)
        waiting = self.total - len(self.done) - len(running)
        rest = sum(max(duration - elapsed, 0.0) for elapsed, _ in running) + waiting * duration
        return rest / max(1, min(self.jobs, waiting + len(running)))


def run_trainings(
    trainings: Sequence[Training],
    jobs: int,
    split: Split,
    console: Console,
    gpus: int = 0,
    any_code: bool = False,
    environment: Callable[[Training], dict[str, str]] = lambda training: {},
) -> list[Training]:
    """Run trainings, ``jobs`` at a time; a failed one does not stop the others.

    After the first Ctrl-C the running trainings save themselves, after the second they are ended at once. Either way
    the next start of the study continues them.

    Args:
        trainings: Prepared trainings, in the order to run them.
        jobs: Number of trainings that run at once.
        split: Split to evaluate on.
        console: Where progress is printed.
        gpus: Number of GPUs to distribute the trainings to; 0 leaves the device to the configuration.
        any_code: See ``trainings_of``.
        environment: Returns further environment variables of a training.

    Returns:
        The trainings that failed.

    Raises:
        KeyboardInterrupt: After Ctrl-C, when no training is running any more.
    """
    waiting, failed = list(trainings), list[Training]()
    running: list[RunningTraining] = []
    progress = Progress(len(trainings), jobs)
    options = [f"--split={split}", *(["--any-code"] if any_code else [])]

    def begin(training: Training, slot: int) -> RunningTraining:
        gpu = {"CUDA_VISIBLE_DEVICES": str(slot % gpus)} if gpus else {}
        worker, log = "mtmedformer.commands.compare.worker", training.folder / "log.txt"
        process = start(worker, [str(training.folder), *options], log, jobs, {**gpu, **environment(training)})
        return RunningTraining(training, process, slot)

    try:
        with console.status("") as status:
            while waiting or running:
                while waiting and len(running) < jobs:
                    slot = min(set(range(jobs)) - {one.slot for one in running})
                    running.append(begin(waiting.pop(0), slot))
                time.sleep(0.2)
                for one in [r for r in running if r.process.poll() is not None]:
                    running.remove(one)
                    progress.done.append(time.monotonic() - one.began)
                    failed += [] if one.training.finished(split) else [one.training]
                    console.print(_line(one, progress, split), highlight=False, markup=False)
                status.update(_status_line(running, progress))
    except KeyboardInterrupt:
        console.print("\nCtrl-C: the running trainings save themselves. Press again to stop at once.")
        stop_all([one.process for one in running], GRACE)
        raise
    return failed


def _status_line(running: Sequence[RunningTraining], progress: Progress) -> str:
    now = time.monotonic()
    shares = [epochs_done(one.training) for one in running]
    left = progress.left([(now - one.began, share) for one, share in zip(running, shares, strict=True)])
    current = ", ".join(
        f"{one.training.variant} {one.training.run} {share:.0%}" for one, share in zip(running, shares, strict=True)
    )
    time_left = "" if left is None else f" · about {duration(left)} left"
    return f"{len(progress.done)}/{progress.total} trainings{time_left} · {current}"


def _line(one: RunningTraining, progress: Progress, split: Split) -> str:
    training, left = one.training, progress.left([])
    words = [f"{len(progress.done)}/{progress.total}", f"{training.variant} {training.run}"]
    words.append(duration(progress.done[-1]))
    if not training.finished(split):
        log = training.folder / "log.txt"
        words.append(f"FAILED ({one.process.returncode}): {failure_text(log)}; see {log}")
    if left and progress.total > len(progress.done):
        words.append(f"about {duration(left)} left")
    return " · ".join(words)


def epochs_done(training: Training) -> float:
    """Return the share of a training's epochs that it has logged."""
    total = training.config["trainer"].get("max_epochs") or 0
    if total <= 0:
        return 0.0
    epochs = [int(row["epoch"]) for row in training.logged() if row.get("epoch", "").isdigit()]
    return min(1.0, max(epochs) / total) if epochs else 0.0


def duration(seconds: float) -> str:
    """Return a duration as text: ``45 s``, ``3 min``, ``2 h 05 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
