"""The state of a federation in a file, which is also right about a process that was killed."""

from __future__ import annotations

import json
import os
import socket
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from mtmedformer.errors import DataError
from mtmedformer.storage.atomic_write import atomic_write

Status = Literal["running", "degraded", "failed", "finished"]
EXIT_CODES: dict[Status, int] = {"running": 0, "finished": 0, "failed": 1, "degraded": 3}


@dataclass(frozen=True)
class RunState:
    """What ``run_state.json`` says.

    Attributes:
        state: ``running``: with every site; ``degraded``: a site asked in the last round was not admitted (while it
            runs, and at its end); ``failed``: it ended before its last round; ``finished``: all rounds, with every site
            in the last one.
        reason: Why, in a sentence that holds nothing of a patient.
        round: Whole rounds done.
        rounds: Rounds asked for.
        ended: Whether the process was done with the run.
        process: Number of the server's process.
        started: When that process started, in the system's own units: its number may be given out anew.
        host: Name of its machine.
    """

    state: Status
    reason: str
    round: int
    rounds: int
    ended: bool = False
    process: int = 0
    started: int = 0
    host: str = ""

    @property
    def exit_code(self) -> int:
        """Exit code of a process that ends in this state: 0 finished, 1 failed, 3 degraded."""
        return EXIT_CODES[self.state]


def write_state(folder: Path, state: Status, reason: str, round: int, rounds: int, ended: bool = False) -> RunState:
    """Write ``run_state.json``, whole or not at all, and return what it says."""
    own = os.getpid()
    run = RunState(state, reason, round, rounds, ended, own, _started(own), socket.gethostname())
    try:
        with atomic_write(folder / "run_state.json") as part:
            part.write_text(json.dumps(asdict(run), indent=1) + "\n")
    except OSError as error:  # a full disk must not hide why the run ends
        print(f"run_state.json: cannot be written ({error.strerror}); the run is {state}: {reason}", file=sys.stderr)
    return run


def read_state(folder: Path) -> RunState | None:
    """Return a run's state; ``failed`` if its process was killed; ``None`` without a state file.

    Raises:
        DataError: When the file cannot be read.
    """
    file = folder / "run_state.json"
    if not file.is_file():
        return None
    try:
        run = RunState(**json.loads(file.read_text()))
        gone = run.host == socket.gethostname() and _started(run.process) != run.started
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{file}: not the state of a run ({type(error).__name__})") from error
    if gone and not run.ended:
        reason = f"the process ended unexpectedly after round {run.round} (killed, or the machine stopped)"
        return replace(run, state="failed", reason=reason, ended=True)
    return run


def _started(process: int) -> int:
    """Return when a process started, in clock ticks since the machine did (proc(5), field 22); 0 where unknown."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[19])
