"""``mtmedformer sweep``: run a W&B sweep file without W&B, and say what it found."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout
from rich.console import Console

from mtmedformer.commands.parser import ToolParser
from mtmedformer.commands.sweep.results import Objective, Row, draw, objectives, points_of, show, write_csv
from mtmedformer.commands.sweep.study import front, next_trial, open_study, unfinished
from mtmedformer.commands.sweep.sweep_file import Sweep, read_sweep
from mtmedformer.commands.sweep.trials import Outcome, outcome, run_trials
from mtmedformer.errors import ConfigError

if TYPE_CHECKING:
    import optuna

HOPELESS = 3
"""Trials that fail, and none that does not, after which a sweep is given up."""


def main(argv: Sequence[str]) -> int:
    """Run a sweep as far as it is not done, and write ``results.csv`` and ``pareto.png``.

    Returns:
        0; 1 when a trial failed or Ctrl-C was pressed: the same command goes on where it stopped.
    """
    options, more = _parser().parse_known_args(argv)
    if odd := [word for word in more if not re.fullmatch(r"--\w+(\.\w+)+=.*", word, re.DOTALL)]:
        raise ConfigError(
            f"sweep: {odd[0]} is no option; settings of the trials are written --data.init_args.root=PATH"
        )
    _require()
    if options.jobs < 1 or (options.trials is not None and options.trials < 1):
        raise ConfigError(f"--jobs {options.jobs} and --trials {options.trials} must be 1 or more")
    sweep = read_sweep(options.config).with_settings(more)
    asked = [Objective.parse(text) for text in options.metrics.split(",")] if options.metrics else []
    output = options.output or Path("runs/sweeps") / sweep.name
    output.mkdir(parents=True, exist_ok=True)
    console = Console()
    try:
        with FileLock(output / "sweep.lock", timeout=0):
            study = open_study(sweep, output)
            interrupted = _run(study, sweep, options, output, console)
            return _tell(study, sweep, asked, output, console) or int(interrupted)
    except Timeout as error:
        raise ConfigError(f"--output {output}: a sweep is running there already; choose another folder") from error


def _parser() -> ToolParser:
    parser = ToolParser(
        "mtmedformer sweep",
        description="Run a W&B sweep file without W&B, by Optuna. Settings such as --data.root=PATH go to every trial.",
    )
    parser.add_argument("--config", type=Path, required=True, help="the sweep, as in configs/sweeps")
    parser.add_argument("--trials", type=int, help="trials in all; the file's run_cap by default")
    parser.add_argument("--jobs", type=int, default=1, help="trials at once; on several GPUs each gets one")
    parser.add_argument("--output", type=Path, help="folder of the trials; runs/sweeps/<name> by default")
    parser.add_argument("--seed", type=int, default=0, help="seed of what is tried")
    parser.add_argument(
        "--metrics", metavar="A,B", help="what to weigh in pareto.png; each task's own metric by default; NAME:min"
    )
    return parser


def _require() -> None:
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise ConfigError("mtmedformer sweep needs Optuna; pip install 'mtmedformer[sweep]'") from error


def _run(study: optuna.Study, sweep: Sweep, options: argparse.Namespace, output: Path, console: Console) -> bool:
    """Run what is left and return whether it was interrupted."""
    total = sweep.trials if options.trials is None else options.trials
    if sweep.method == "grid":
        total = min(total, sweep.trials)
    begun = {trial.number: trial for trial in unfinished(study)}
    ended = len(study.get_trials(deepcopy=False)) - len(begun)
    console.print(
        f"{sweep.name}: {total} trials by {sweep.method}, {ended} ended before"
        + (f", {len(begun)} begun" if begun else ""),
        highlight=False,
    )

    def waiting() -> Iterator[tuple[int, list[str]]]:
        for number, trial in begun.items():
            yield number, sweep.arguments(trial.params)
        while len(study.get_trials(deepcopy=False)) < total and not _hopeless(study):
            trial = next_trial(study, sweep, options.seed)
            yield trial.number, sweep.arguments(trial.params)

    def folder_of(number: int) -> Path:
        return output / "trials" / f"{number:04d}"

    ends = run_trials(waiting(), folder_of, options.jobs, lambda job: outcome(job, sweep.metric, sweep.maximise))
    try:
        with console.status(f"{ended}/{total} trials, Ctrl-C stops and keeps them") as status:
            for end in ends:
                _record(study, end)
                ended += 1
                status.update(f"{ended}/{total} trials, Ctrl-C stops and keeps them")
                console.print(f"{ended}/{total}  {_told(end, sweep.metric)}", highlight=False, markup=False)
    except KeyboardInterrupt:
        ends.close()  # type: ignore[attr-defined]
        console.print("Interrupted; the same command goes on from here.")
        return True
    return False


def _hopeless(study: optuna.Study) -> bool:
    states = [trial.state.name for trial in study.get_trials(deepcopy=False)]
    return states.count("FAIL") >= HOPELESS and "COMPLETE" not in states


def _record(study: optuna.Study, end: Outcome) -> None:
    """Keep how a trial ended in the study."""
    from optuna.trial import TrialState

    trial = next(one for one in study.get_trials(deepcopy=False) if one.number == end.number)
    facts = {"metrics": end.metrics, "epoch": end.epoch, "seconds": end.seconds, "reason": end.reason}
    for key, value in facts.items():
        study._storage.set_trial_user_attr(trial._trial_id, key, value)  # of a trial begun by an earlier process
    if end.value is None:
        study.tell(end.number, state=TrialState.FAIL)
    else:
        study.tell(end.number, end.value)


def _told(end: Outcome, metric: str) -> str:
    if end.value is None:
        return f"trial {end.number}: FAILED, {end.reason}"
    return f"trial {end.number}: {metric} {end.value:.4g} in epoch {end.epoch}, {end.seconds:.0f} s"


def _tell(study: optuna.Study, sweep: Sweep, asked: Sequence[Objective], output: Path, console: Console) -> int:
    """Print and write what was found; return 1 where a trial failed."""
    rows = [
        Row(trial.number, trial.value if trial.state.name == "COMPLETE" else None, trial.params, **trial.user_attrs)
        for trial in study.get_trials()
        if trial.state.is_finished()
    ]
    done = [row for row in rows if row.value is not None]
    failed = [row for row in rows if row.value is None]
    for row in failed:
        console.print(f"Trial {row.number} failed: {row.reason}", highlight=False, markup=False)
    if not done:
        console.print("No trial has ended well; there is nothing to compare.")
        return 1
    done.sort(key=lambda row: -(row.value or 0) if sweep.maximise else (row.value or 0))
    chosen = objectives(done, asked)
    points = points_of(done, chosen)
    best_of_all = front(points, tuple(one.maximise for one in chosen)) if len(chosen) > 1 and points else set()
    show(done, chosen, best_of_all, sweep.metric, console)
    write_csv([*done, *failed], best_of_all, output / "results.csv")
    written = [str(output / "results.csv")]
    if best_of_all:
        draw(points, chosen, best_of_all, output / "pareto.png")
        written.append(str(output / "pareto.png"))
    console.print(f"{len(done)} trials ended, {len(failed)} failed. Written: {' and '.join(written)}", soft_wrap=True)
    words = shlex.join(["mtmedformer", *sweep.arguments(done[0].parameters)])
    console.print(f"Best, trial {done[0].number}:", highlight=False)
    console.print(words, highlight=False, markup=False, soft_wrap=True)
    return int(bool(failed))
