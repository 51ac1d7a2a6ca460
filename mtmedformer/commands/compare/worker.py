"""Run one training of a study in this process: ``fit``, then ``test`` or ``validate``, by the command line.

One process does both, because importing the libraries takes about half of the time of a small training.
"""

from __future__ import annotations

import argparse
import importlib
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mtmedformer.commands.child_runs import DONE
from mtmedformer.commands.compare.code_version import code_version
from mtmedformer.commands.compare.configuration import read_config
from mtmedformer.commands.compare.trainings import Evaluation, Models, RoundCosts, Split, Status
from mtmedformer.commands.main import main as command_line

COMMAND: dict[Split, str] = {"test": "test", "val": "validate"}


def main(argv: Sequence[str] | None = None) -> int:
    """Train and evaluate the training in a folder, as far as that is not done.

    Returns:
        0, or the exit code of the command that failed.
    """
    parser = argparse.ArgumentParser(description="Run one training of a study.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--split", choices=list(COMMAND), default="test")
    parser.add_argument("--any-code", action="store_true")
    options = parser.parse_args(argv)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a study in the background ignores it, and so would this
    folder: Path = options.folder
    status = Status.read(folder)
    if status is None or (status.code != code_version() and not (options.any_code and status.fitted)):
        print("The code has changed since this study was started; start it again.", file=sys.stderr)
        return 2
    failed = 0 if status.fitted else _fit(folder, status)
    return failed or _evaluate(folder, status, options.split)


def _fit(folder: Path, status: Status) -> int:
    """Train, continuing an interrupted training, and store its costs."""
    last, began, worked = folder / "run/checkpoints/last.ckpt", time.perf_counter(), time.process_time()
    resumed = [f"--ckpt_path={last}"] if last.is_file() else []
    if not resumed:
        shutil.rmtree(folder / "run", ignore_errors=True)
    code = command_line(["fit", f"--config={folder / 'config.yaml'}", *resumed])
    if code not in DONE:
        return code
    _round_costs(last).write(folder)
    status.fitted = True
    if not resumed:
        status.seconds, status.processor_seconds = time.perf_counter() - began, time.process_time() - worked
    status.models = _models(folder)
    status.write(folder)
    for file in (folder / "run/checkpoints").glob("*.ckpt"):
        if file.stem != status.checkpoint:
            file.unlink()
    return 0


def _evaluate(folder: Path, status: Status, split: Split) -> int:
    """Evaluate the global model, and the model of each site, if there is one, on the images of that site."""
    command = [COMMAND[split], f"--config={folder / 'config.yaml'}"]
    began = time.perf_counter()
    checkpoint = folder / "run/checkpoints" / f"{status.checkpoint}.ckpt"
    code = command_line([*command, f"--ckpt_path={checkpoint}"]) if status.models == "global" else 0
    for model in sorted(folder.glob("run/sites/*/model.safetensors")):
        site = model.parent.name
        where = [f"--data.only=[{site}]", f"--trainer.default_root_dir={model.parent}"]
        code = code if code not in DONE else command_line([*command, f"--model.init_weights={model}", *where])
    if code not in DONE:
        return code
    status.evaluated[split] = Evaluation(status.models, time.perf_counter() - began)
    status.write(folder)
    return 0


def _models(folder: Path) -> Models:
    """Return ``own`` if the aggregator makes no usable global model, so that only the sites' own are evaluated."""
    federation = read_config(folder / "config.yaml").get("federation") or {}
    path = ((federation.get("init_args") or {}).get("aggregator") or {}).get("class_path", "")
    if not path:
        return "global"
    module, _, name = path.rpartition(".")
    aggregator = getattr(importlib.import_module(module), name)
    return "global" if aggregator.exchange.global_model else "own"


def _round_costs(checkpoint: Path) -> RoundCosts:
    """Return the costs of each round from the history in a checkpoint."""
    stored = torch.load(checkpoint, weights_only=True, map_location="cpu", mmap=True)
    history = stored.get("callbacks", {}).get("Federation", {}).get("history", [])
    weights = sum(value.numel() * value.element_size() for value in stored["state_dict"].values())
    return RoundCosts(
        [sum(int(site.get("bytes", 0)) for site in one["sites"].values()) for one in history],
        [len(_recipients(one)) * weights for one in history],
        [float(one["seconds"]) for one in history],
    )


def _recipients(entry: dict[str, Any]) -> set[str]:
    """Return the sites that the global weights were sent to in a round."""
    answered = {site for site, report in entry["sites"].items() if report.get("bytes")}
    return answered | {fault["site"] for fault in entry.get("faults", [])}


if __name__ == "__main__":
    sys.exit(main())
