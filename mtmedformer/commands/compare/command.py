"""``mtmedformer compare``: train every variant of a study with every seed, and say what differs by more than chance."""

from __future__ import annotations

import argparse
import math
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mtmedformer.commands.compare.study import Study, read_study
from mtmedformer.commands.parser import ToolParser
from mtmedformer.errors import ConfigError


def main(argv: Sequence[str]) -> int:
    """Run a study as far as it is not done, and write ``comparison.json``, ``.csv`` and ``.html``.

    Returns:
        0; 1 when a training failed or Ctrl-C was pressed: the same command goes on where it stopped.
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
    console = Console()
    if options.dry_run:
        return _dry_run(study, output, options, console)
    return _run(study, output, options, console)


def _parser() -> ToolParser:
    parser = ToolParser("mtmedformer compare", description=(main.__doc__ or "").split("\n")[0])
    parser.add_argument("--config", type=Path, required=True, help="The study, such as configs/compare/demo.yaml.")
    parser.add_argument("--form", help="Form of the study, such as small or full; the first by default.")
    parser.add_argument("--seeds", metavar="0,1", help="Seeds to run and compare, some of the study's.")
    parser.add_argument("--only", metavar="A,B", help="Variants to run and compare, beside the reference.")
    parser.add_argument("--reference", metavar="A", help="What the others are compared with; the study's by default.")
    parser.add_argument("--metric", metavar="M", help="Which of the study's metrics comes first.")
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
        help="Images to judge on; choose settings on val, and look at test once.",
    )
    parser.add_argument("--jobs", type=int, help="Trainings at once; one a GPU, or one a core, by default.")
    parser.add_argument("--output", type=Path, help="Folder of the study; runs/compare/<name>-<form> by default.")
    parser.add_argument("--replicates", type=int, default=2000, help="Resamples of the intervals.")
    parser.add_argument(
        "--any-code", action="store_true", help="Keep trainings that an earlier version of the code has finished."
    )
    parser.add_argument("--report-only", action="store_true", help="Train nothing; compare what is finished.")
    parser.add_argument("--dry-run", action="store_true", help="Check every configuration and say what would be run.")
    return parser


def _seeds(text: str, known: Sequence[int]) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdigit() and int(word) in known for word in words) or len(set(words)) < len(words):
        raise ConfigError(f"--seeds {text}: choose from the study's, {', '.join(map(str, known))}")
    return tuple(int(word) for word in words)


def _overrides(given: Sequence[str]) -> dict[str, Any]:
    from mtmedformer.commands.compare.configuration import parse_value

    found = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {text}: write KEY=VALUE, such as --set data.root=PATH")
        found[key.lstrip("-")] = parse_value(value)
    return found


def _dry_run(study: Study, output: Path, options: argparse.Namespace, console: Console) -> int:
    from mtmedformer.commands.compare.cells import cells_of

    cells = cells_of(study, output, options.any_code)
    table = Table("variant", "trainings", "finished", "what it is", pad_edge=False)
    for name, variant in study.variants.items():
        mine = [cell for cell in cells if cell.variant == name]
        done = sum(cell.finished(options.split) for cell in mine)
        table.add_row(name, str(len(mine)), str(done), variant.about or "–")
    console.print(table)
    left = sum(not cell.finished(options.split) for cell in cells)
    console.print(f"{len(cells)} trainings, {left} to run, in {output}. Nothing was run.", highlight=False)
    return 0


def _run(study: Study, output: Path, options: argparse.Namespace, console: Console) -> int:
    from mtmedformer.commands.compare.cells import cells_of, prepare, salt_of
    from mtmedformer.commands.compare.runner import run_cells

    cells = cells_of(study, output, options.any_code)
    waiting = [] if options.report_only else [cell for cell in cells if not cell.finished(options.split)]
    jobs, gpus = _jobs(options.jobs, cells[0].config)
    console.print(
        f"{study.name}: {len(cells)} trainings, {len(cells) - len(waiting)} finished before, {jobs} at a time",
        highlight=False,
    )
    salt, interrupted, failed = salt_of(output), False, []
    for cell in waiting:
        prepare(cell, study, salt)
    previous = signal.signal(signal.SIGTERM, _interrupt)  # the cells have sessions of their own and would go on alone
    try:
        failed = run_cells(
            waiting, jobs, options.split, console, gpus, options.any_code, lambda cell: _group(study, cell)
        )
    except KeyboardInterrupt:
        interrupted = True
    finally:
        signal.signal(signal.SIGTERM, previous)
    _write(study, cells, output, options, console)
    for cell in failed:
        console.print(f"failed: {cell.variant} {cell.run}, see {cell.folder / 'log.txt'}", highlight=False)
    if interrupted:
        console.print("Interrupted; the same command goes on from here.")
    return 1 if interrupted or failed else 0


def _interrupt(*args: object) -> None:
    raise KeyboardInterrupt


def _jobs(asked: int | None, config: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many trainings run at once, and on how many GPUs they are dealt out."""
    import torch

    gpus = torch.cuda.device_count() if config["trainer"].get("accelerator") in ("auto", "gpu", "cuda") else 0
    if asked is not None and asked < 1:
        raise ConfigError(f"--jobs {asked}: it must be 1 or more")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return asked or gpus or cores, gpus


def _group(study: Study, cell: Any) -> dict[str, str]:
    """Return what puts a training's run in W&B into the study's group, where the configuration logs there."""
    group = "-".join(filter(None, (study.name, study.form)))
    return {"WANDB_RUN_GROUP": group, "WANDB_NAME": f"{cell.variant} {cell.run}", "WANDB_SILENT": "true"}


def _write(study: Study, cells: Sequence[Any], output: Path, options: argparse.Namespace, console: Console) -> None:
    from mtmedformer.commands.compare.report import render
    from mtmedformer.commands.compare.results import compare, write_csv, write_json_report
    from mtmedformer.plots.html import write_page

    with console.status("Comparing"):
        comparison = compare(study, cells, options.split, options.replicates)
    name = "comparison" if options.split == "test" else "comparison_val"
    write_json_report(comparison, output / f"{name}.json")
    write_csv(comparison, output / f"{name}.csv")
    write_page(output / f"{name}.html", render(comparison))
    if comparison["metrics"]:
        _show(comparison, console)
    for remark in comparison["remarks"]:
        console.print(f"Note: {remark}", highlight=False)
    console.print(f"Written: {output / name}.html, .csv and .json", highlight=False, soft_wrap=True)


def _show(comparison: Mapping[str, Any], console: Console) -> None:
    """Print the deciding metric: a row a variant."""
    metric = next(iter(comparison["metrics"]))
    told = comparison["metrics"][metric]
    table = Table(pad_edge=False, title=f"{metric}, against {comparison['reference']}")
    table.add_column("variant", overflow="fold")
    for column in ("mean", "worst site", "difference", "95 % interval", "verdict"):
        table.add_column(column)
    for name, value in told["values"].items():
        difference = told["differences"].get(name, {}).get("mean", {})
        low, high = difference.get("low", math.nan), difference.get("high", math.nan)
        interval = "" if not math.isfinite(low) else f"{low:+.3f} to {high:+.3f}"
        worst = f"{_number(value['worst']['value'])} {value['worst_site'] or ''}"
        shown = _number(difference["value"], "+.3f") if difference else ""
        mean, verdict = _number(value["mean"]["value"]), difference.get("verdict", "reference")
        table.add_row(name, mean, worst, shown, interval, verdict)
    console.print(table)


def _number(value: float, form: str = ".3f") -> str:
    return format(value, form) if math.isfinite(value) else "–"
