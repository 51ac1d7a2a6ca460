"""In what state a federation is, in a file that tells the truth even of a process that was killed."""

from __future__ import annotations

import json
import os
import socket
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from mtmedformer.errors import DataError
from mtmedformer.storage.atomic_write import whole

State = Literal["running", "degraded", "failed", "finished"]
EXIT_CODES: dict[State, int] = {"running": 0, "finished": 0, "failed": 1, "degraded": 3}


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

    state: State
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


def write_state(folder: Path, state: State, reason: str, round: int, rounds: int, ended: bool = False) -> RunState:
    """Write ``run_state.json``, whole or not at all, and return what it says."""
    own = os.getpid()
    said = RunState(state, reason, round, rounds, ended, own, _started(own), socket.gethostname())
    try:
        with whole(folder / "run_state.json") as part:
            part.write_text(json.dumps(asdict(said), indent=1) + "\n")
    except OSError as error:  # a full disk must not hide why the run ends
        print(f"run_state.json: cannot be written ({error.strerror}); the run is {state}: {reason}", file=sys.stderr)
    return said


def read_state(folder: Path) -> RunState | None:
    """Return a run's state; that of a process which ended without a word is ``failed``. ``None`` where there is none.

    Raises:
        DataError: When the file cannot be read.
    """
    file = folder / "run_state.json"
    if not file.is_file():
        return None
    try:
        said = RunState(**json.loads(file.read_text()))
        gone = said.host == socket.gethostname() and _started(said.process) != said.started
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{file}: not the state of a run ({type(error).__name__})") from error
    if gone and not said.ended:
        reason = f"the process ended without a word after round {said.round} (killed, or the machine stopped)"
        return replace(said, state="failed", reason=reason, ended=True)
    return said


def _started(process: int) -> int:
    """Return when a process started, in clock ticks since the machine did (proc(5), field 22); 0 where unknown."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[19])
