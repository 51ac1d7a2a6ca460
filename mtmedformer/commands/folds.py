"""``mtmedformer folds``: train the folds of a cross-validation, and test their ensemble on the test images."""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console

from mtmedformer.commands.lightning_cli import main as run_lightning
from mtmedformer.commands.messages import INTERRUPTED
from mtmedformer.commands.parser import ToolParser
from mtmedformer.commands.sweep.trials import RESULT, TrialResult, load_result, read_result, run_trials, save_result
from mtmedformer.commands.yaml_files import read_yaml
from mtmedformer.errors import ConfigError
from mtmedformer.plots.terminal import SafeConsole
from mtmedformer.storage.atomic_write import atomic_write

SCORE = "val/score"
"""Metric whose best epoch is the result of a fold."""

RECORD, TABLE = "folds.json", "folds.csv"
"""Files in the output folder: how the folds are trained, and their validation metrics."""

_OF_A_FOLD = re.compile(r"--(data(\.init_args)?\.folds?|ckpt_path|trainer\.default_root_dir)=")


def main(argv: Sequence[str]) -> int:
    """Train the folds that are not finished, write ``folds.csv``, and run ``test`` with the ensemble of all folds.

    Returns:
        The exit code of ``test``; 1 when a fold failed; 130 after Ctrl-C. The same command continues.
    """
    options, more = _parser().parse_known_args(argv)
    if odd := [word for word in more if not re.fullmatch(r"--\w+(\.\w+)*=.*", word, re.DOTALL)]:
        raise ConfigError(f"folds: {odd[0]} is no option; settings of the trainings are written --data.root=PATH")
    if taken := [
        word for word in more if re.match(r"--(data(\.init_args)?\.folds?|ckpt_path|trainer\.default_root)", word)
    ]:
        raise ConfigError(f"folds: {taken[0]} is set for each fold; use --folds and --output")
    if options.folds < 2 or options.jobs < 1:
        raise ConfigError(f"--folds {options.folds} must be 2 or more, and --jobs {options.jobs} 1 or more")
    if missing := [file for file in options.config if not Path(file).is_file()]:
        raise ConfigError(f"--config {missing[0]}: no such file")
    training = [*(word for file in options.config for word in ("--config", file)), *more]
    output = options.output or Path(f"{_root(options.config)}-folds")
    output.mkdir(parents=True, exist_ok=True)
    console = SafeConsole()
    try:
        with FileLock(output / "folds.lock", timeout=0):
            _same_trainings(output, options.folds, training)
            try:
                failed = _train(output, options, training, console)
            except KeyboardInterrupt:
                console.print("Interrupted; the same command continues.")
                return INTERRUPTED
            results = [load_result(_folder(output, n), n, None, {}) for n in range(options.folds)]
            _report(results, output, console)
    except Timeout as error:
        raise ConfigError(f"--output {output}: folds are trained there already; choose another folder") from error
    if failed:
        return 1
    members = ",".join(str(_folder(output, n) / "checkpoints/best.ckpt") for n in range(options.folds))
    own = [word for word in more if word.startswith("--trainer.")]
    return run_lightning(
        ["test", f"--ckpt_path=[{members}]", f"--trainer.default_root_dir={output / 'ensemble'}", *own]
    )


def _parser() -> ToolParser:
    parser = ToolParser(
        "mtmedformer folds",
        description="Train the folds of a cross-validation with 'fit', and test their ensemble on the test images. "
        "Settings such as --data.root=PATH go to every fold.",
    )
    parser.add_argument(
        "--config", action="append", required=True, metavar="FILE", help="configuration of 'fit'; several may be given"
    )
    parser.add_argument("--folds", type=int, default=5, help="number of folds; 5 by default")
    parser.add_argument("--jobs", type=int, default=1, help="folds trained at once; with several GPUs, each gets one")
    parser.add_argument("--output", type=Path, help="folder of the folds; the run folder with '-folds' by default")
    return parser


def _folder(output: Path, fold: int) -> Path:
    """Return the run folder of a fold."""
    return output / f"fold{fold}"


def _root(files: Sequence[str]) -> str:
    """Return the configured run folder."""
    trainers = [(read_yaml(Path(file)) or {}).get("trainer") or {} for file in files]
    named: list[Any] = [one.get("default_root_dir") for one in trainers if isinstance(one, Mapping)]
    return str(next((one for one in reversed(named) if one), "runs/run"))


def _same_trainings(output: Path, folds: int, training: Sequence[str]) -> None:
    """Write how the folds are trained, or check that those in the folder are trained so.

    Raises:
        ConfigError: They are trained in another way.
    """
    now = {"folds": folds, "arguments": list(training)}
    file = output / RECORD
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        if before != now:
            raise ConfigError(
                f"--output {output}: its {before.get('folds')} folds are trained with "
                f"{' '.join(before.get('arguments', []))}; choose another folder, or repeat that command"
            )
        return
    with atomic_write(file) as part:
        part.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")


def _train(output: Path, options: argparse.Namespace, training: Sequence[str], console: Console) -> int:
    """Train the folds without a result, and return how many failed."""

    def waiting() -> Iterator[tuple[int, list[str]]]:
        for fold in range(options.folds):
            if not (_folder(output, fold) / RESULT).is_file():
                yield fold, ["fit", *training, f"--data.fold={fold}", f"--data.folds={options.folds}"]

    failed = 0
    for result in run_trials(
        waiting(), lambda fold: _folder(output, fold), options.jobs, lambda trial: read_result(trial, SCORE, True)
    ):
        if result.value is None:
            failed += 1
            console.print(f"fold {result.number}: FAILED, {result.reason}", highlight=False, markup=False)
            continue
        save_result(result, _folder(output, result.number))
        console.print(
            f"fold {result.number}: {SCORE} {result.value:.4g} in epoch {result.epoch + 1}, {result.seconds:.0f} s",
            highlight=False,
            markup=False,
        )
    return failed


def _report(results: Sequence[TrialResult], output: Path, console: Console) -> None:
    """Write the validation metrics of every fold in its best epoch, and print mean and standard deviation."""
    done = [result for result in results if result.metrics]
    names = sorted({name for result in done for name in result.metrics if name.startswith("val/")})
    with atomic_write(output / TABLE) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["fold", *names])
        writer.writerows([one.number, *(one.metrics.get(name, "") for name in names)] for one in done)
    scores = [one.metrics[SCORE] for one in done if math.isfinite(one.metrics.get(SCORE, math.nan))]
    if len(scores) > 1:
        console.print(
            f"{SCORE} over {len(scores)} folds: {statistics.mean(scores):.3f}, standard deviation "
            f"{statistics.stdev(scores):.3f}. Written: {output / TABLE}",
            highlight=False,
            soft_wrap=True,
        )
