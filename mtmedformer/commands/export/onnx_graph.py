"""The model as an ONNX graph: every head's answers as named outputs, checked against PyTorch before it is kept."""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtmedformer.commands.export.onnx_check import INPUT, Difference, compare, shapes_to_try
from mtmedformer.errors import ConfigError
from mtmedformer.heads.base import TaskHead
from mtmedformer.module import MultiTaskModule

OPSET = 18


@dataclass(frozen=True)
class Graph:
    """An exported graph.

    Attributes:
        content: The ONNX file.
        outputs: Names of its outputs.
        size: ``(height, width)`` that it is bound to, or ``None`` for any.
        differences: What the check against PyTorch found.
        shapes: Shapes of the images it was checked with.
        remarks: What was tried before, and why it was given up.
    """

    content: bytes
    outputs: tuple[str, ...]
    size: tuple[int, int] | None
    differences: tuple[Difference, ...]
    shapes: tuple[tuple[int, ...], ...]
    remarks: tuple[str, ...] = ()


class Answers(nn.Module):
    """The heads' answers by name, as ``TaskHead.exported`` has them, calibrated.

    Args:
        module: The model, in evaluation mode.
    """

    def __init__(self, module: MultiTaskModule) -> None:
        super().__init__()
        self.encoder, self.heads = module.encoder, module.heads
        self.temperatures = {name: one.temperature for name, one in module.calibration.items()}
        height, width = module.encoder.fixed_size or (64, 64)
        with torch.inference_mode():
            self.names = tuple(self.answers(torch.zeros(1, module.encoder.in_chans, height, width)))

    def answers(self, image: Tensor) -> dict[str, Tensor]:
        """Return ``<task>`` or ``<task>.<name>`` to a tensor, for ``image`` float (B, C, H, W) in [0, 1]."""
        size: Any = (image.shape[-2], image.shape[-1])  # no int(): an exporter follows where they go
        pyramid, found = self.encoder(image), {}
        for task, head in self.heads.items():
            assert isinstance(head, TaskHead)
            outputs, temperature = head(pyramid, size), self.temperatures.get(task)
            scaled = outputs if temperature is None else head.scaled(outputs, temperature)
            for name, value in head.exported(scaled, size).items():
                if not isinstance(value, Tensor):
                    raise ConfigError(
                        f"heads.{task}: {type(head).__name__} predicts no tensors; give it the methods exported and "
                        "decoded (see TaskHead) to export it"
                    )
                found[f"{task}.{name}" if name else task] = value
        return found

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the answers in the order of ``names``."""
        return tuple(self.answers(image).values())


def export_graph(module: MultiTaskModule, size: tuple[int, int], seed: int = 0) -> Graph:
    """Turn a model into ONNX and check it against PyTorch in onnxruntime.

    The exporter that traces is tried first, because it needs seconds where the one that reasons about every shape
    needs minutes; that one follows where the trace does not hold for other sizes. A model that neither carries to any
    size is bound to ``size``, its batch still free.

    Args:
        module: The model, on the CPU, in evaluation mode.
        size: ``(height, width)`` of its input in training.
        seed: Seed of the images it is checked with.

    Raises:
        ConfigError: An extra is not installed, or no graph agrees with PyTorch.
    """
    _require()
    answers, remarks = Answers(module).eval(), list[str]()
    for way, free in ((_traced, True), (_reasoned, True), (_traced, False), (_reasoned, False)):
        if free and module.encoder.fixed_size is not None:
            continue
        shapes = shapes_to_try(module.encoder.in_chans, size, free)
        label = f"{way.__name__[1:]}, {'any size' if free else f'{size[0]} × {size[1]}'}"
        try:
            with _plain_attention():
                content = way(answers, torch.rand(shapes[-1], generator=torch.Generator().manual_seed(seed)), free)
            differences = compare(content, answers.names, answers, shapes, seed)
        except Exception as error:  # exporters and runtimes fail in many ways; the next one may not
            remarks.append(f"{label}: {(str(error).strip() or type(error).__name__).splitlines()[0][:160]}")
            continue
        worst = max(differences, key=lambda one: one.allowed)
        if worst.allowed <= 1:
            return Graph(content, answers.names, None if free else size, differences, tuple(shapes), tuple(remarks))
        remarks.append(f"{label}: {worst.output} differs by {worst.absolute:.1e}")
    raise ConfigError(f"this model has no ONNX graph that agrees with PyTorch ({'; '.join(remarks)})")


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Have attention run as its parts, because its fused form has no counterpart in ONNX."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


@contextmanager
def _silent() -> Iterator[None]:
    """Keep off the screen what torch's C++ writes there: a trace that fails prints all of itself, a megabyte."""
    sys.stdout.flush()
    kept = os.dup(1)
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def with_metadata(content: bytes, metadata: Mapping[str, Any]) -> bytes:
    """Return an ONNX file that says of itself what it is: text as it is, the rest as JSON."""
    import onnx

    model = onnx.load_from_string(content)
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    onnx.helper.set_model_props(model, texts)
    onnx.checker.check_model(model, full_check=True)
    made: bytes = model.SerializeToString()
    return made


def _traced(answers: Answers, image: Tensor, free: bool) -> bytes:
    """Export by following one image through the model."""
    axes = {name: _axes(name, free) for name in (INPUT, *answers.names)}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), _silent(), torch.inference_mode():
        file = Path(folder, "traced.onnx")
        warnings.simplefilter("ignore")  # that shapes become constants is what the check is for
        torch.onnx.export(
            answers,
            (image,),
            file,
            dynamo=False,
            input_names=[INPUT],
            output_names=list(answers.names),
            dynamic_axes=axes,
            opset_version=OPSET,
        )
        return file.read_bytes()


def _reasoned(answers: Answers, image: Tensor, free: bool) -> bytes:
    """Export by reasoning about the model with sizes as unknowns."""
    from torch.export import Dim

    sides = {0: Dim.DYNAMIC} | ({2: Dim.DYNAMIC, 3: Dim.DYNAMIC} if free else {})
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.export.export(answers, (image,), dynamic_shapes={INPUT: sides}, strict=False)
        made = torch.onnx.export(
            program,
            (image,),
            dynamo=True,
            input_names=[INPUT],
            output_names=list(answers.names),
            opset_version=OPSET,
            verbose=False,
        )
    assert made is not None
    content: bytes = made.model_proto.SerializeToString()
    return content


def _axes(name: str, free: bool) -> dict[int, str]:
    return {0: "batch"} | ({2: "height", 3: "width"} if free and name == INPUT else {})


def _require() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"export to ONNX needs {error.name}; pip install 'mtmedformer[export]'") from error
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):  # what they tell on the way, the check at the end decides
        logging.getLogger(name).setLevel(logging.ERROR)
