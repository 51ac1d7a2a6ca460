"""Stop trainings in child processes, so that each can save a checkpoint first."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence


def stop_all(processes: Sequence[subprocess.Popen[bytes]], grace: float) -> None:
    """Send SIGINT to all processes and wait; kill those left after ``grace`` seconds or a second Ctrl-C.

    Args:
        processes: Each started in a session of its own, so that its children end with it.
        grace: Seconds they may take to save.
    """
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + grace
    try:
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            time.sleep(0.1)
    except KeyboardInterrupt:
        pass
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
