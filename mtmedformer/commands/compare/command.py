"""``mtmedformer compare``: train the variants of a study, and test which differences are more than chance."""

from __future__ import annotations

import argparse
import math
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mtmedformer.commands.compare.comparison import Comparison, write_csv, write_json_report
from mtmedformer.commands.compare.configuration import parse_value
from mtmedformer.commands.compare.report import render
from mtmedformer.commands.compare.results import compare
from mtmedformer.commands.compare.runner import run_trainings
from mtmedformer.commands.compare.study import Study, read_study
from mtmedformer.commands.compare.trainings import Training, prepare, salt_of, trainings_of
from mtmedformer.commands.messages import INTERRUPTED, TERMINATED
from mtmedformer.commands.parser import ToolParser
from mtmedformer.errors import ConfigError
from mtmedformer.plots.html import write_page
from mtmedformer.plots.terminal import SafeConsole


def main(argv: Sequence[str]) -> int:
    """Run the trainings of a study that are not finished, and write ``comparison.json``, ``.csv`` and ``.html``.

    Returns:
        0; 1 when a training failed; 130 after Ctrl-C, 143 after SIGTERM. The same command continues the study.
    """
    options = _parser().parse_args(argv)
    study = read_study(options.config, options.form, _overrides(options.set))
    if options.reference:
        study = study.against(options.reference)
    if options.metric:
        study = study.led_by(options.metric)
    if options.only:
        study = study.only([name.strip() for name in options.only.split(",") if name.strip()])
    if options.seeds:
        study = replace(study, seeds=_seeds(options.seeds, study.seeds))
    output = options.output or Path("runs/compare") / "-".join(filter(None, (study.name, study.form)))
    console = SafeConsole()
    if options.dry_run:
        return _dry_run(study, output, options, console)
    return _run(study, output, options, console)


def _parser() -> ToolParser:
    parser = ToolParser("mtmedformer compare", description="Train the variants of a study, and compare them.")
    parser.add_argument("--config", type=Path, required=True, help="The study, such as configs/compare/demo.yaml.")
    parser.add_argument("--form", help="Form of the study, such as small or full; the first by default.")
    parser.add_argument("--seeds", metavar="0,1", help="Seeds to run and compare, a part of the study's.")
    parser.add_argument("--only", metavar="A,B", help="Variants to run and compare with the reference.")
    parser.add_argument("--reference", metavar="A", help="Variant to compare the others with; the study's by default.")
    parser.add_argument("--metric", metavar="M", help="The metric of the study to show first.")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="A value for all variants, such as data.root=PATH; may be given several times.",
    )
    parser.add_argument(
        "--split",
        choices=("test", "val"),
        default="test",
        help="Split to evaluate on; choose settings on val, and use test once.",
    )
    parser.add_argument("--jobs", type=int, help="Trainings at once; by default one per GPU, or one per core.")
    parser.add_argument("--output", type=Path, help="Folder of the study; runs/compare/<name>-<form> by default.")
    parser.add_argument("--replicates", type=int, default=2000, help="Number of resamples of the intervals.")
    parser.add_argument(
        "--any-code", action="store_true", help="Use trainings that an earlier version of the code has finished."
    )
    parser.add_argument("--report-only", action="store_true", help="Train nothing; compare the finished trainings.")
    parser.add_argument("--dry-run", action="store_true", help="Check every configuration and run nothing.")
    return parser


def _seeds(text: str, known: Sequence[int]) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdigit() and int(word) in known for word in words) or len(set(words)) < len(words):
        raise ConfigError(f"--seeds {text}: choose from the study's, {', '.join(map(str, known))}")
    return tuple(int(word) for word in words)


def _overrides(given: Sequence[str]) -> dict[str, Any]:
    overrides = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {text}: write KEY=VALUE, such as --set data.root=PATH")
        overrides[key.lstrip("-")] = parse_value(value)
    return overrides


def _dry_run(study: Study, output: Path, options: argparse.Namespace, console: Console) -> int:
    trainings = trainings_of(study, output, options.any_code)
    table = Table("variant", "trainings", "finished", "description", pad_edge=False)
    for name, variant in study.variants.items():
        own = [training for training in trainings if training.variant == name]
        done = sum(training.finished(options.split) for training in own)
        table.add_row(name, str(len(own)), str(done), variant.about or "–")
    console.print(table)
    left = sum(not training.finished(options.split) for training in trainings)
    console.print(f"{len(trainings)} trainings, {left} to run, in {output}. Nothing was run.", highlight=False)
    return 0


def _run(study: Study, output: Path, options: argparse.Namespace, console: Console) -> int:
    trainings = trainings_of(study, output, options.any_code)
    waiting = [] if options.report_only else [one for one in trainings if not one.finished(options.split)]
    jobs, gpus = _jobs(options.jobs, trainings[0].config)
    console.print(
        f"{study.name}: {len(trainings)} trainings, {len(trainings) - len(waiting)} finished before, {jobs} at a time",
        highlight=False,
    )
    salt, interrupted, failed = salt_of(output), 0, []
    for training in waiting:
        prepare(training, study, salt)
    previous = signal.signal(signal.SIGTERM, _interrupt)  # otherwise the trainings, in sessions of their own, go on
    try:
        failed = run_trainings(
            waiting, jobs, options.split, console, gpus, options.any_code, lambda one: _wandb_variables(study, one)
        )
    except KeyboardInterrupt as stop:
        interrupted = TERMINATED if stop.args else INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, previous)
    _report(study, trainings, output, options, console)
    for training in failed:
        log = training.folder / "log.txt"
        console.print(f"failed: {training.variant} {training.run}, see {log}", highlight=False)
    if interrupted:
        console.print("Interrupted; the same command continues the study.")
    return interrupted or int(bool(failed))


def _interrupt(*args: object) -> None:
    raise KeyboardInterrupt("SIGTERM")


def _jobs(jobs: int | None, config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the number of trainings that run at once, and the number of GPUs they are distributed to."""
    gpus = torch.cuda.device_count() if config["trainer"].get("accelerator") in ("auto", "gpu", "cuda") else 0
    if jobs is not None and jobs < 1:
        raise ConfigError(f"--jobs {jobs}: it must be 1 or more")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return jobs or gpus or cores, gpus


def _wandb_variables(study: Study, training: Training) -> dict[str, str]:
    """Return the environment variables that put a training into the study's W&B group, if it logs to W&B."""
    group = "-".join(filter(None, (study.name, study.form)))
    return {"WANDB_RUN_GROUP": group, "WANDB_NAME": f"{training.variant} {training.run}", "WANDB_SILENT": "true"}


def _report(
    study: Study, trainings: Sequence[Training], output: Path, options: argparse.Namespace, console: Console
) -> None:
    with console.status("Comparing"):
        comparison = compare(study, trainings, options.split, options.replicates)
    name = "comparison" if options.split == "test" else "comparison_val"
    write_json_report(comparison, output / f"{name}.json")
    write_csv(comparison, output / f"{name}.csv")
    write_page(output / f"{name}.html", render(comparison))
    if comparison.metrics:
        _show(comparison, console)
    for remark in comparison.remarks:
        console.print(f"Note: {remark}", highlight=False)
    console.print(f"Written: {output / name}.html, .csv and .json", highlight=False, soft_wrap=True)


def _show(comparison: Comparison, console: Console) -> None:
    """Print the deciding metric, one row per variant."""
    name, metric = next(iter(comparison.metrics.items()))
    table = Table(pad_edge=False, title=f"{name}, compared with {comparison.reference}")
    table.add_column("variant", overflow="fold")
    for column in ("mean", "worst site", "difference", "95 % interval", "verdict"):
        table.add_column(column)
    for variant, value in metric.values.items():
        mean, worst = _number(value.mean.value), f"{_number(value.worst.value)} {value.worst_site or ''}"
        if variant not in metric.differences:
            table.add_row(variant, mean, worst, "", "", "reference")
            continue
        one = metric.differences[variant]["mean"]
        interval = f"{one.low:+.3f} to {one.high:+.3f}" if math.isfinite(one.low) else ""
        table.add_row(variant, mean, worst, _number(one.value, "+.3f"), interval, one.verdict)
    console.print(table)


def _number(value: float, form: str = ".3f") -> str:
    return format(value, form) if math.isfinite(value) else "–"
