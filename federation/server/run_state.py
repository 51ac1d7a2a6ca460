"""The state of a federation in ``run_state.json``; a killed process is recognized when the file is read."""

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
    """Contents of ``run_state.json``.

    Attributes:
        state: ``running``: all sites took part in the last round; ``degraded``: a site of the last round was not
            admitted (during the run, and at its end); ``failed``: the run ended before its last round; ``finished``:
            all rounds are complete, the last one with all its sites.
        reason: One sentence, without data of a patient.
        round: Number of complete rounds.
        rounds: Configured number of rounds.
        ended: Whether the run has ended.
        process: Process id of the server.
        started: Start time of that process in clock ticks, because the system may reuse a process id.
        host: Name of its computer.
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
    """Write ``run_state.json`` atomically and return the state."""
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
        DataError: The file cannot be read.
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
    """Return the start time of a process, in clock ticks since boot (proc(5), field 22); 0 if unknown."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[19])
