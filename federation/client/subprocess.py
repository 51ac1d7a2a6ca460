"""Train a site in a process of its own: a process that is killed ends the site's round and not the run."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.context import ForkProcess
from pathlib import Path

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from federation.client.train import SiteResult, SiteState, TrainingInterrupt
from federation.exchange.update import load_update, save_update
from mtmedformer.errors import ConfigError, UserError
from mtmedformer.storage.atomic_write import atomic_write
from mtmedformer.storage.write_errors import ends_every_write

NOT_WRITTEN = 74
"""Exit code of a site's process that could not write its result (``EX_IOERR``)."""


class SiteTimeoutError(Exception):
    """A site was not done by the deadline."""


class SiteCrashError(Exception):
    """The process of a site was killed; the message names the signal or exit code."""


class SiteTrainingError(Exception):
    """A site's training raised an error in its own process; the text is the traceback, which stays at the site.

    Attributes:
        kind: Name of the error's class.
        message: Its message.
    """

    def __init__(self, text: str, kind: str, message: str) -> None:
        super().__init__(text)
        self.kind, self.message = kind, message


class SiteResultError(UserError):
    """The server's disk has no room for the result of a site, so that no site can be trained."""

    exit_code = 1


def train_isolated(
    work: Callable[[Callable[[], bool]], SiteResult],
    folder: Path | None,
    deadline: float | None,
    stop: Callable[[], bool],
) -> SiteResult:
    """Train a site in a process forked for it, wait at most until its deadline, and return the result.

    The process inherits all it needs and computes on one thread. It returns files: safetensors, and a pickle of tensors
    and plain values that cannot run code. It ends when the server's process is gone.

    Args:
        work: Trains the site; its argument returns, after every batch, whether to stop.
        folder: Folder of the files, created if needed; ``None`` is the temporary folder of the system.
        deadline: Seconds to wait; ``None`` waits as long as it takes.
        stop: Whether the run is to stop; called every tenth of a second.

    Raises:
        TrainingInterrupt: When ``stop`` returned true.
        SiteTimeoutError: When the deadline passed; the process is ended.
        SiteCrashError: When the process was killed.
        SiteTrainingError: When the training raised an error.
        SiteResultError: When the disk has no room for its result.
        ConfigError: When the training raised one.
    """
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    box = Path(tempfile.mkdtemp(prefix="site-", dir=folder))
    process = multiprocessing.get_context("fork").Process(target=_run, args=(work, box, os.getpid()))
    until = time.monotonic() + (deadline or float("inf"))
    try:
        process.start()
        while process.is_alive():
            process.join(0.1)
            if stop():
                raise TrainingInterrupt
            if time.monotonic() > until and process.is_alive():
                raise SiteTimeoutError
        if process.exitcode == NOT_WRITTEN:
            raise SiteResultError(
                f"{box.parent}: no space left for the result of a site, or another limit of the disk; mend it and "
                "continue with --ckpt_path=last"
            )
        if process.exitcode:
            raise _error_of(box, process.exitcode)
        kept = torch.load(box / "kept.pt", weights_only=True)
        state = SiteState(**kept["state"])
        return SiteResult(load_update(box / "update.safetensors"), state, **kept["rest"])
    finally:
        _end(process)
        shutil.rmtree(box, ignore_errors=True)


def _run(work: Callable[[Callable[[], bool]], SiteResult], box: Path, server: int) -> None:
    """Train, in the forked process, and write the result or the error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the server decides what it means
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)  # the threads of the server's pool were not forked, and waiting for them would not end
    try:
        _write(work(lambda: os.getppid() != server), box)
    except BaseException as error:
        facts = {"kind": type(error).__name__, "message": str(error), "traceback": traceback.format_exc()}
        of_config = isinstance(error, ConfigError | MisconfigurationException)
        with suppress(OSError), atomic_write(box / "error.json") as part:
            part.write_text(json.dumps(facts | {"is_config_error": of_config}))
        os._exit(1)
    os._exit(0)  # without the inherited exit handlers, which are the server's


def _write(result: SiteResult, box: Path) -> None:
    """Write the result of a site; end the process with ``NOT_WRITTEN`` where the disk has no room for it."""
    rest = {"logged": result.logged, "moved": result.moved, "privacy": result.privacy, "trained": result.trained}
    try:
        save_update(result.update, box / "update.safetensors")
        torch.save({"state": result.state.plain(), "rest": rest}, box / "kept.pt")
    except Exception as error:
        if ends_every_write(error):
            os._exit(NOT_WRITTEN)
        raise


def _error_of(folder: Path, exit_code: int) -> Exception:
    """Return the error of a failed process."""
    if not (folder / "error.json").is_file():
        if exit_code < 0:
            return SiteCrashError(f"by signal {-exit_code}" + (", as where memory runs out" if exit_code == -9 else ""))
        return SiteCrashError(f"with code {exit_code}")
    error = json.loads((folder / "error.json").read_text())
    if error["is_config_error"]:
        return ConfigError(error["message"])
    return SiteTrainingError(error["traceback"], error["kind"], error["message"])


def _end(process: ForkProcess) -> None:
    """Kill a process that still runs, and wait for it."""
    if process.pid is not None and process.is_alive():
        process.kill()
    if process.pid is not None:
        process.join()
