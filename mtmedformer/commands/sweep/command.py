"""``mtmedformer sweep``: run a W&B sweep file without W&B, and compare its trials."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

import optuna
from filelock import FileLock, Timeout
from optuna.trial import TrialState
from rich.console import Console

from mtmedformer.commands.messages import INTERRUPTED
from mtmedformer.commands.parser import ToolParser
from mtmedformer.commands.sweep.results import Objective, draw, objectives, points_of, show, write_csv
from mtmedformer.commands.sweep.study import front, next_trial, open_study, unfinished
from mtmedformer.commands.sweep.sweep_file import Sweep, read_sweep
from mtmedformer.commands.sweep.trials import TrialResult, load_result, read_result, run_trials, save_result
from mtmedformer.errors import ConfigError
from mtmedformer.plots.terminal import SafeConsole

MOST_FAILURES = 3
"""A sweep stops after this many failed trials if none has succeeded."""


def main(argv: Sequence[str]) -> int:
    """Run the trials of a sweep that have not ended, and write ``results.csv`` and ``pareto.png``.

    Returns:
        0; 1 when a trial failed; 130 after Ctrl-C. The same command continues the sweep.
    """
    options, more = _parser().parse_known_args(argv)
    if odd := [word for word in more if not re.fullmatch(r"--\w+(\.\w+)+=.*", word, re.DOTALL)]:
        raise ConfigError(
            f"sweep: {odd[0]} is no option; settings of the trials are written --data.init_args.root=PATH"
        )
    if options.jobs < 1 or (options.trials is not None and options.trials < 1):
        raise ConfigError(f"--jobs {options.jobs} and --trials {options.trials} must be 1 or more")
    sweep = read_sweep(options.config).with_settings(more)
    named = [Objective.parse(text) for text in options.metrics.split(",")] if options.metrics else []
    output = options.output or Path("runs/sweeps") / sweep.name
    output.mkdir(parents=True, exist_ok=True)
    console = SafeConsole()
    try:
        with FileLock(output / "sweep.lock", timeout=0):
            study = open_study(sweep, output)
            interrupted = _run(study, sweep, options, output, console)
            failed = _report(study, sweep, named, output, console)
            return INTERRUPTED if interrupted else failed
    except Timeout as error:
        raise ConfigError(f"--output {output}: a sweep is running there already; choose another folder") from error


def _parser() -> ToolParser:
    parser = ToolParser(
        "mtmedformer sweep",
        description="Run a W&B sweep file without W&B, by Optuna. Settings such as --data.root=PATH go to every trial.",
    )
    parser.add_argument("--config", type=Path, required=True, help="the sweep, as in configs/sweeps")
    parser.add_argument("--trials", type=int, help="number of trials; the file's run_cap by default")
    parser.add_argument("--jobs", type=int, default=1, help="trials at once; with several GPUs, each gets one")
    parser.add_argument("--output", type=Path, help="folder of the trials; runs/sweeps/<name> by default")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of parameters")
    parser.add_argument(
        "--metrics",
        metavar="A,B",
        help="metrics to weigh in pareto.png, NAME:min if less is better; the primary metric of each task by default",
    )
    return parser


def _run(study: optuna.Study, sweep: Sweep, options: argparse.Namespace, output: Path, console: Console) -> bool:
    """Run the remaining trials and return whether Ctrl-C was pressed."""
    total = sweep.trials if options.trials is None else options.trials
    if sweep.method == "grid":
        total = min(total, sweep.trials)
    begun = {trial.number: trial for trial in unfinished(study)}
    ended = len(study.get_trials(deepcopy=False)) - len(begun)
    console.print(
        f"{sweep.name}: {total} trials by {sweep.method}, {ended} ended before"
        + (f", {len(begun)} to continue" if begun else ""),
        highlight=False,
    )

    def waiting() -> Iterator[tuple[int, list[str]]]:
        for number, trial in begun.items():
            yield number, sweep.arguments(trial.params)
        while len(study.get_trials(deepcopy=False)) < total and not _only_failures(study):
            trial = next_trial(study, sweep, options.seed)
            yield trial.number, sweep.arguments(trial.params)

    results = run_trials(
        waiting(),
        lambda number: _folder(output, number),
        options.jobs,
        lambda trial: read_result(trial, sweep.metric, sweep.maximise),
    )
    try:
        with console.status(f"{ended}/{total} trials, Ctrl-C stops and keeps them") as status:
            for result in results:
                save_result(result, _folder(output, result.number))
                state = TrialState.FAIL if result.value is None else TrialState.COMPLETE
                study.tell(result.number, result.value, state)
                ended += 1
                status.update(f"{ended}/{total} trials, Ctrl-C stops and keeps them")
                console.print(f"{ended}/{total}  {_line(result, sweep.metric)}", highlight=False, markup=False)
    except KeyboardInterrupt:
        results.close()
        console.print("Interrupted; the same command continues the sweep.")
        return True
    return False


def _folder(output: Path, number: int) -> Path:
    """Return the run folder of a trial."""
    return output / "trials" / f"{number:04d}"


def _only_failures(study: optuna.Study) -> bool:
    states = [trial.state for trial in study.get_trials(deepcopy=False)]
    return states.count(TrialState.FAIL) >= MOST_FAILURES and TrialState.COMPLETE not in states


def _line(result: TrialResult, metric: str) -> str:
    if result.value is None:
        return f"trial {result.number}: FAILED, {result.reason}"
    return f"trial {result.number}: {metric} {result.value:.4g} in epoch {result.epoch}, {result.seconds:.0f} s"


def _report(study: optuna.Study, sweep: Sweep, named: Sequence[Objective], output: Path, console: Console) -> int:
    """Print and write the results; return 1 if a trial failed."""
    results = [
        load_result(
            _folder(output, trial.number),
            trial.number,
            trial.value if trial.state == TrialState.COMPLETE else None,
            trial.params,
        )
        for trial in study.get_trials()
        if trial.state.is_finished()
    ]
    done = [(result.value, result) for result in results if result.value is not None]
    failed = [result for result in results if result.value is None]
    for result in failed:
        console.print(f"Trial {result.number} failed: {result.reason}", highlight=False, markup=False)
    if not done:
        console.print("No trial has succeeded; there is nothing to compare.")
        return 1
    best = [result for _, result in sorted(done, key=lambda pair: -pair[0] if sweep.maximise else pair[0])]
    chosen = objectives(best, named)
    points = points_of(best, chosen)
    pareto = front(points, tuple(one.maximise for one in chosen)) if len(chosen) > 1 and points else set()
    show(best, chosen, pareto, sweep.metric, console)
    write_csv([*best, *failed], pareto, output / "results.csv")
    written = [str(output / "results.csv")]
    if pareto:
        draw(points, chosen, pareto, output / "pareto.png")
        written.append(str(output / "pareto.png"))
    counts = f"{len(best)} trials succeeded, {len(failed)} failed"
    console.print(f"{counts}. Written: {' and '.join(written)}", soft_wrap=True)
    console.print(f"Best, trial {best[0].number}:", highlight=False)
    command = shlex.join(["mtmedformer", *sweep.arguments(best[0].parameters)])
    console.print(command, highlight=False, markup=False, soft_wrap=True)
    return int(bool(failed))
