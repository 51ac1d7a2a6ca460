"""Runs one cell in a process of its own: ``fit``, then ``test`` or ``validate``, by the command line.

Both in one process, since half of a small cell's time would otherwise go into importing the same libraries twice.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtmedformer.commands.compare.cells import Split, read_json, write_json
from mtmedformer.commands.compare.code_version import code_version

COMMAND: dict[Split, str] = {"test": "test", "val": "validate"}
DONE = (0, 3)
"""Exit codes of a training that has come to its end; 3 says that some of the data could not be used."""


def main(argv: Sequence[str] | None = None) -> int:
    """Train and judge the cell in a folder, as far as that is not done; return the exit code of what failed, or 0."""
    parser = argparse.ArgumentParser(description="Run one cell of a comparison.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--split", choices=list(COMMAND), default="test")
    parser.add_argument("--any-code", action="store_true")
    options = parser.parse_args(argv)
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a study in the background would pass on that it is ignored
    folder: Path = options.folder
    state = read_json(folder / "cell.json")
    if state["code"] != code_version() and not (options.any_code and state.get("fitted")):
        print("The code has changed since this study was started; start it again.", file=sys.stderr)
        return 2
    failed = 0 if state.get("fitted") else _fit(folder, state)
    return failed or _judge(folder, state, options.split)


def _fit(folder: Path, state: dict[str, Any]) -> int:
    """Train, going on where the cell was interrupted; keep what the rounds cost."""
    from mtmedformer.commands.main import main as command_line

    last, began, worked = folder / "run/checkpoints/last.ckpt", time.perf_counter(), time.process_time()
    resumed = [f"--ckpt_path={last}"] if last.is_file() else []
    if not resumed:
        shutil.rmtree(folder / "run", ignore_errors=True)
    code = command_line(["fit", f"--config={folder / 'config.yaml'}", *resumed])
    if code not in DONE:
        return code
    write_json(_rounds(last), folder / "rounds.json")
    state |= {
        "fitted": True,
        "seconds": None if resumed else time.perf_counter() - began,  # the first part's time is not known
        "processor_seconds": None if resumed else time.process_time() - worked,
        "by": "own" if _keeps_no_global_model(folder) else "global",
    }
    write_json(state, folder / "cell.json")
    for file in (folder / "run/checkpoints").glob("*.ckpt"):
        if file.stem != state["checkpoint"]:
            file.unlink()
    return 0


def _judge(folder: Path, state: dict[str, Any], split: Split) -> int:
    """Evaluate the model, and where sites keep models of their own, each of them on its own site's images."""
    from mtmedformer.commands.main import main as command_line

    command = [COMMAND[split], f"--config={folder / 'config.yaml'}"]
    began = time.perf_counter()
    checkpoint = folder / "run/checkpoints" / f"{state['checkpoint']}.ckpt"
    code = command_line([*command, f"--ckpt_path={checkpoint}"]) if state["by"] == "global" else 0
    for model in sorted(folder.glob("run/sites/*/model.safetensors")):
        site = model.parent.name
        where = [f"--data.only=[{site}]", f"--trainer.default_root_dir={model.parent}"]
        code = code if code not in DONE else command_line([*command, f"--model.init_weights={model}", *where])
    if code not in DONE:
        return code
    state["judged"][split] = {"by": state["by"], "seconds": time.perf_counter() - began}
    write_json(state, folder / "cell.json")
    return 0


def _keeps_no_global_model(folder: Path) -> bool:
    """Return whether the aggregator leaves the global model unfit for use, so that only the sites' own are judged."""
    import importlib

    from mtmedformer.commands.compare.configuration import read_config

    federation = read_config(folder / "config.yaml").get("federation") or {}
    path = ((federation.get("init_args") or {}).get("aggregator") or {}).get("class_path", "")
    if not path:
        return False
    module, _, name = path.rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    return not kind.exchange.global_model


def _rounds(checkpoint: Path) -> dict[str, Any]:
    """Return what each round of a federation took: bytes that all sites sent and were sent, and seconds."""
    import torch

    stored = torch.load(checkpoint, weights_only=True, map_location="cpu", mmap=True)
    history = stored.get("callbacks", {}).get("Federation", {}).get("history", [])
    weights = sum(value.numel() * value.element_size() for value in stored["state_dict"].values())
    return {
        "bytes_down": [len(_asked(one)) * weights for one in history],
        "bytes": [sum(int(site.get("bytes", 0)) for site in one["sites"].values()) for one in history],
        "seconds": [float(one["seconds"]) for one in history],
    }


def _asked(entry: dict[str, Any]) -> set[str]:
    """Return the sites that the global weights were sent to in a round."""
    answered = {site for site, told in entry["sites"].items() if told.get("bytes")}
    return answered | {fault["site"] for fault in entry.get("faults", [])}


if __name__ == "__main__":
    sys.exit(main())
