"""Start trainings in processes of their own, and read from their log files why they failed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

DONE = (0, 3)
"""Exit codes of a training that ended as planned; 3 means that some of the data could not be used."""

GRACE = 60.0
"""Seconds a training may take to save itself after Ctrl-C."""

_INHERITED_FROM_A_RUN = {"LOCAL_RANK", "MTMEDFORMER_RUN_DIR"}
"""Environment variables that would make a training part of the run that starts it."""


def start(
    module: str, arguments: Sequence[str], log: Path, jobs: int, variables: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Start a Python module of this project in a session of its own, so that Ctrl-C reaches only the parent.

    Args:
        module: Name of the module.
        arguments: Its arguments.
        log: File to which its output is appended.
        jobs: Number of trainings that run at once; each gets its share of the processor cores.
        variables: Further environment variables.
    """
    root = str(Path(__file__).resolve().parents[2])
    inherited = {key: value for key, value in os.environ.items() if key not in _INHERITED_FROM_A_RUN}
    inherited.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    inherited["PYTHONPATH"] = os.pathsep.join([path for path in (root, inherited.get("PYTHONPATH")) if path])
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env={**inherited, "PYTHONUNBUFFERED": "1", **variables},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def failure_text(log: Path) -> str:
    """Return the error message at the end of a log file, or its last line, in at most 400 characters."""
    text = log.read_text(errors="replace").strip() if log.is_file() else ""
    message = text.rfind("mtmedformer: ")
    words = text[message:] if message >= 0 else text.rpartition("\n")[2]
    return " ".join(words.split())[:400] or "it printed nothing"
