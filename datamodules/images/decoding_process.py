"""A process of its own for decoders of compressed images, with limits of its memory and time.

A damaged or hostile stream may make a decoder crash, hang or allocate far more than the image needs. The module is both
sides: imported, it starts ``python decoding_process.py`` at the first use and keeps the process; run as a script, it
decodes requests from standard input until that closes. Requests contain pixel data and its encoding only.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import subprocess
import sys
import threading
import types
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

SECONDS, SECONDS_PER_MEGAPIXEL = 30.0, 2.0
"""Time limit of one image: fixed part, and per 10⁶ samples. A large mammogram takes about one second."""

MEMORY, MEMORY_PER_SAMPLE = 256 << 20, 48
"""Memory limit of one image in bytes, above that of the idle process: fixed part, and per sample."""

_EXTENDED = "1.2.840.10008.1.2.4.51"
"""Transfer syntax JPEG Extended (process 2 and 4): 8 or 12 bits."""

Answer = dict[str, Any]

_lock = threading.Lock()
_running: tuple[int, subprocess.Popen[bytes]] | None = None  # with the id of the process that started it


def decode_dicom(syntax: str, pixel_data: bytes, options: dict[str, Any], plugins: Sequence[str]) -> NDArray[Any]:
    """Decode the first frame of encapsulated pixel data with the first of several plugins that can.

    Args:
        syntax: Transfer syntax UID.
        pixel_data: Value of PixelData.
        options: Description of the pixels as of ``pydicom.pixels.as_pixel_options``.
        plugins: Decoder plugins of pydicom.

    Raises:
        RuntimeError: No plugin can, or the process crashed or exceeded its limits.
    """
    samples = options["rows"] * options["columns"] * options["samples_per_pixel"]
    request = {"kind": "dicom", "syntax": syntax, "options": options, "plugins": list(plugins)}
    return _request(request, pixel_data, samples)[0]


def decode_raster(content: bytes, samples: int, mask: bool) -> tuple[NDArray[Any], int, list[str]]:
    """Decode an image file as ``datamodules.images.raster.decode`` does.

    Args:
        content: The file.
        samples: Number of samples of the image, by its header.
        mask: As there.

    Raises:
        RuntimeError: The decoder raised an error, or the process crashed or exceeded its limits.
    """
    array, answer = _request({"kind": "raster", "mask": mask}, content, samples)
    return array, answer["white"], answer["path"]


def _request(request: dict[str, Any], content: bytes, samples: int) -> tuple[NDArray[Any], Answer]:
    request["memory"] = MEMORY + MEMORY_PER_SAMPLE * samples + 4 * len(content)
    with _lock:
        process = _process()
        assert process.stdin is not None
        assert process.stdout is not None
        late = threading.Timer(SECONDS + SECONDS_PER_MEGAPIXEL * samples / 1e6, process.kill)
        late.start()
        try:
            _send(process.stdin, request, content)
            answer, decoded = _receive(process.stdout)
        except (EOFError, OSError):
            process.kill()
            process.wait()
            raise RuntimeError("the decoder crashed on this stream or did not finish") from None
        finally:
            late.cancel()
    if "error" in answer:
        raise RuntimeError(str(answer["error"]))
    return np.frombuffer(decoded, answer["dtype"]).reshape(answer["shape"]), answer


def _process() -> subprocess.Popen[bytes]:
    """Return this process's decoding process; a forked data loader worker starts its own."""
    global _running
    if _running is None or _running[0] != os.getpid() or _running[1].poll() is not None:
        command = [sys.executable, "-P", __file__]  # -P: this folder's modules shadow nothing
        pipe = subprocess.PIPE
        one_thread = {name: "1" for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        environment = {**os.environ, **one_thread}
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=environment)
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


def _receive(pipe: IO[bytes]) -> tuple[Answer, bytes]:
    header = json.loads(_exactly(pipe, int.from_bytes(_exactly(pipe, 4), "little")))
    return header, _exactly(pipe, header["bytes"])


def _exactly(pipe: IO[bytes], count: int) -> bytes:
    content = pipe.read(count)
    if len(content) < count:
        raise EOFError
    return content


# -- the other side


def _serve() -> None:
    source, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output of a decoder must not mix with the answers
    kinds = {"dicom": _serve_dicom, "raster": _serve_raster}
    while True:
        try:
            request, content = _receive(source)
        except EOFError:
            return
        try:
            _prepare(request["kind"])
            _limit_memory(request["memory"])
            array, answer = kinds[request["kind"]](request, content)
            described = {"dtype": array.dtype.str, "shape": array.shape, **answer}
            _send(answers, described, np.ascontiguousarray(array).data.cast("B"))
        except BaseException as error:  # the other side turns any error into a DataError
            _limit_memory(None)
            _send(answers, {"error": str(error)[-500:] or type(error).__name__}, b"")


def _serve_dicom(request: Answer, content: bytes) -> tuple[NDArray[Any], Answer]:
    from pydicom.pixels.decoders.base import get_decoder

    options, reasons = {**request["options"], "correct_unused_bits": False}, []
    for plugin in request["plugins"]:
        try:
            array, _ = get_decoder(request["syntax"]).as_array(content, index=0, decoding_plugin=plugin, **options)
            return array, {}
        except BaseException as error:  # each decoder has its own exceptions; the next one may succeed
            reasons.append(f"{plugin}: {_reason(error)}")
    if request["syntax"] == _EXTENDED and options["bits_allocated"] == 16 and options["samples_per_pixel"] == 1:
        return _serve_extended_jpeg(options, content), {}
    raise RuntimeError("; ".join(reasons))


def _serve_extended_jpeg(options: dict[str, Any], content: bytes) -> NDArray[Any]:
    """Decode a JPEG image of 12 bits with GDCM, which pydicom's plugin for GDCM refuses."""
    import gdcm
    from pydicom.encaps import get_frame

    fragment, fragments = gdcm.Fragment(), gdcm.SequenceOfFragments.New()
    fragment.SetByteStringValue(get_frame(content, 0, number_of_frames=1))
    fragments.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments.__ref__())
    bits = options["bits_stored"]
    photometric = gdcm.PhotometricInterpretation.GetPIType(str(options["photometric_interpretation"]))
    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((options["columns"], options["rows"], 1))
    image.SetDataElement(element)
    image.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(photometric))
    image.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(_EXTENDED)))
    image.SetPixelFormat(gdcm.PixelFormat(1, 16, bits, bits - 1, options["pixel_representation"]))
    decoded = image.GetBuffer().encode("utf-8", "surrogateescape")
    kind = "<i2" if options["pixel_representation"] else "<u2"
    return np.frombuffer(decoded, kind).reshape(options["rows"], options["columns"])


def _serve_raster(request: Answer, content: bytes) -> tuple[NDArray[Any], Answer]:
    from datamodules.images.raster import decode

    array, white, path = decode(content, request["mask"])
    return array, {"white": white, "path": path}


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1].strip(' :')[:160]}" if lines else type(error).__name__


def _prepare(kind: str) -> None:
    """Import the decoders before memory is limited; of ``datamodules``, which imports torch, only what is needed."""
    if "datamodules" not in sys.modules:
        root = Path(__file__).resolve().parents[2]
        package = types.ModuleType("datamodules")
        package.__path__ = [str(root / "datamodules")]
        sys.modules["datamodules"] = package
        sys.path.append(str(root))
    importlib.import_module("datamodules.images.raster" if kind == "raster" else "pydicom.pixels.decoders.base")


def _limit_memory(extra: int | None) -> None:
    """Limit the address space to its present size and ``extra`` bytes; ``None`` removes the limit."""
    with suppress(ImportError, OSError, ValueError):  # no such limit on this system
        import resource

        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = hard if extra is None else pages * resource.getpagesize() + extra
        if hard != resource.RLIM_INFINITY:
            limit = min(limit, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


if __name__ == "__main__":
    _serve()
