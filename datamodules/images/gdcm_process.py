"""GDCM in a process of its own, since a damaged JPEG stream may make it abort or crash.

The module is both sides: imported, it starts ``python gdcm_process.py`` at the first use and keeps the process; run as
a script, it decodes requests from standard input until that closes. Requests contain pixel data and its encoding only.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

SECONDS = 120.0
"""Time limit for one stream; a large mammogram takes about one second."""

_lock = threading.Lock()
_running: tuple[int, subprocess.Popen[bytes]] | None = None  # with the id of the process that started it


def decode(syntax: str, pixel_data: bytes, options: dict[str, Any]) -> NDArray[Any]:
    """Decode the first frame of encapsulated pixel data.

    Args:
        syntax: Transfer syntax UID.
        pixel_data: Value of PixelData.
        options: Description of the pixels as of ``pydicom.pixels.as_pixel_options``.

    Raises:
        RuntimeError: GDCM raised an error, crashed or exceeded the time limit.
    """
    with _lock:
        process = _process()
        assert process.stdin is not None
        assert process.stdout is not None
        late = threading.Timer(SECONDS, process.kill)
        late.start()
        try:
            _send(process.stdin, {"syntax": syntax, "options": options}, pixel_data)
            answer, content = _receive(process.stdout)
        except (EOFError, OSError):
            process.kill()
            process.wait()
            raise RuntimeError("GDCM crashed on this stream or did not finish") from None
        finally:
            late.cancel()
    if "error" in answer:
        raise RuntimeError(str(answer["error"]))
    return np.frombuffer(content, answer["dtype"]).reshape(answer["shape"])


def _process() -> subprocess.Popen[bytes]:
    """Return this process's GDCM process; a forked data loader worker starts its own."""
    global _running
    if _running is None or _running[0] != os.getpid() or _running[1].poll() is not None:
        command = [sys.executable, "-P", __file__]  # -P: this folder's modules shadow nothing
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
        _running = (os.getpid(), process)
    return _running[1]


@atexit.register
def _stop() -> None:
    if _running is not None and _running[0] == os.getpid():
        _running[1].kill()
        _running[1].wait()


def _send(pipe: IO[bytes], header: dict[str, Any], content: bytes | memoryview) -> None:
    described = json.dumps({**header, "bytes": len(content)}).encode()
    pipe.write(len(described).to_bytes(4, "little") + described)
    pipe.write(content)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> tuple[dict[str, Any], bytes]:
    header = json.loads(_exactly(pipe, int.from_bytes(_exactly(pipe, 4), "little")))
    return header, _exactly(pipe, header["bytes"])


def _exactly(pipe: IO[bytes], count: int) -> bytes:
    content = pipe.read(count)
    if len(content) < count:
        raise EOFError
    return content


def _serve() -> None:
    from pydicom.pixels.decoders.base import get_decoder

    source, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output of GDCM must not mix with the answers
    while True:
        try:
            request, pixel_data = _receive(source)
        except EOFError:
            return
        options = {**request["options"], "correct_unused_bits": False}
        try:
            array, _ = get_decoder(request["syntax"]).as_array(pixel_data, index=0, decoding_plugin="gdcm", **options)
        except Exception as error:  # the other side turns any error into a DataError
            _send(answers, {"error": str(error)[-500:]}, b"")
        else:
            _send(answers, {"dtype": array.dtype.str, "shape": array.shape}, np.ascontiguousarray(array).data.cast("B"))


if __name__ == "__main__":
    _serve()
