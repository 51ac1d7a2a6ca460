"""Export a model as an ONNX graph with the outputs of every head, and check it against PyTorch."""

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
from torch.export import Dim

from mtmedformer.commands.export.onnx_check import INPUT, OutputDifference, compare, shapes_to_try
from mtmedformer.commands.export.onnx_outputs import MEMBER
from mtmedformer.errors import ConfigError
from mtmedformer.heads.base import TaskHead
from mtmedformer.heads.capabilities import Exportable, GroupsImages, calibrated
from mtmedformer.module import MultiTaskModule
from mtmedformer.network import MultiTaskNetwork

OPSET = 18


@dataclass(frozen=True)
class Graph:
    """An exported graph.

    Attributes:
        content: The ONNX file.
        outputs: Names of its outputs.
        size: ``(height, width)`` of its input, or ``None`` for any size.
        differences: Differences from PyTorch.
        shapes: Shapes of the images it was checked with.
        remarks: Exports that were tried before, and the reasons why they were not used.
    """

    content: bytes
    outputs: tuple[str, ...]
    size: tuple[int, int] | None
    differences: tuple[OutputDifference, ...]
    shapes: tuple[tuple[int, ...], ...]
    remarks: tuple[str, ...] = ()


class ExportedOutputs(nn.Module):
    """The calibrated outputs of all heads by name: their exported tensors, or their predictions.

    Of an ensemble, predictions are the mean over its members. Where a head exports more than its predictions (boxes),
    each member has its own outputs, those of the second one as ``<task>@2.<name>``; ``onnx_outputs.decode`` fuses them.

    Args:
        module: The model, in evaluation mode.
    """

    def __init__(self, module: MultiTaskModule) -> None:
        super().__init__()
        networks: tuple[MultiTaskNetwork, ...] = (module, *module.members)
        self.members = nn.ModuleList(map(_MemberOutputs, networks))
        height, width = module.encoder.fixed_size or (64, 64)
        with torch.inference_mode():
            self.names = tuple(self.outputs(torch.zeros(1, module.encoder.in_chans, height, width)))

    def outputs(self, image: Tensor) -> dict[str, Tensor]:
        """Return a tensor by ``<task>`` or ``<task>.<name>``, for ``image`` float (B, C, H, W) in [0, 1]."""
        seen = [member.outputs(image) for member in self.members if isinstance(member, _MemberOutputs)]
        named = dict(seen[0]) if len(seen) == 1 else {}
        for number, own in enumerate(seen if len(seen) > 1 else (), start=1):
            for name, value in own.items():
                task, _, part = name.partition(".")
                if not all(task in one for one in seen):
                    named[name if number == 1 else f"{task}{MEMBER}{number}.{part}"] = value
                elif name == task and number == 1:
                    named[name] = torch.stack([one[name] for one in seen]).mean(0)
        return named

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs in the order of ``names``."""
        return tuple(self.outputs(image).values())


class _MemberOutputs(nn.Module):
    """The outputs of one model by name."""

    def __init__(self, module: MultiTaskNetwork) -> None:
        super().__init__()
        self.encoder, self.heads = module.encoder, module.heads
        self.temperatures = {name: one.temperature for name, one in module.calibration.items()}

    def outputs(self, image: Tensor) -> dict[str, Tensor]:
        size: Any = (image.shape[-2], image.shape[-1])  # no int(): the exporters trace these values
        pyramid, named = self.encoder(image), {}
        for task, head in self.heads.items():
            assert isinstance(head, TaskHead)
            outputs = calibrated(head, head(pyramid, size), self.temperatures.get(task))
            tensors = (
                head.exported(outputs, size) if isinstance(head, Exportable) else {"": head.predict(outputs, size)}
            )
            for name, value in tensors.items():
                if not isinstance(value, Tensor):
                    raise ConfigError(
                        f"heads.{task}: {type(head).__name__} predicts no tensors; to export it, implement its "
                        "methods exported and decoded (see mtmedformer.heads.capabilities.Exportable)"
                    )
                named[f"{task}.{name}" if name else task] = value
        return named


def export_graph(module: MultiTaskModule, size: tuple[int, int], seed: int = 0) -> Graph:
    """Export a model to ONNX and check it in onnxruntime against PyTorch.

    Tracing is tried first, because it takes seconds, and symbolic export takes minutes; the latter follows if the trace
    is wrong for other sizes. If neither is valid for any size, the graph is exported for ``size``, with a free batch.

    Args:
        module: The model, on the CPU, in evaluation mode.
        size: ``(height, width)`` of its input in training.
        seed: Seed of the images it is checked with.

    Raises:
        ConfigError: An extra is not installed, a head reads the images of a case together, or no graph agrees with
            PyTorch.
    """
    _require()
    if by_case := [name for name, head in module.heads.items() if isinstance(head, GroupsImages)]:
        raise ConfigError(
            f"heads.{by_case[0]}: reads all images of a case together, and an ONNX graph takes single images; export "
            "with --format=safetensors"
        )
    outputs, remarks = ExportedOutputs(module).eval(), list[str]()
    for way, free in ((_traced, True), (_symbolic, True), (_traced, False), (_symbolic, False)):
        if free and module.encoder.fixed_size is not None:
            continue
        shapes = shapes_to_try(module.encoder.in_chans, size, free)
        label = f"{way.__name__[1:]}, {'any size' if free else f'{size[0]} × {size[1]}'}"
        try:
            with _plain_attention():
                content = way(outputs, torch.rand(shapes[-1], generator=torch.Generator().manual_seed(seed)), free)
            differences = compare(content, outputs.names, outputs, shapes, seed)
        except Exception as error:  # exporters and runtimes raise many types of exceptions
            remarks.append(f"{label}: {(str(error).strip() or type(error).__name__).splitlines()[0][:160]}")
            continue
        worst = max(differences, key=lambda one: one.allowed)
        if worst.allowed <= 1:
            return Graph(content, outputs.names, None if free else size, differences, tuple(shapes), tuple(remarks))
        remarks.append(f"{label}: {worst.output} differs by {worst.absolute:.1e}")
    raise ConfigError(f"this model has no ONNX graph that agrees with PyTorch ({'; '.join(remarks)})")


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Run attention unfused, because ONNX has no fused attention."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


@contextmanager
def _silent() -> Iterator[None]:
    """Suppress the output of torch's C++ code, which prints a megabyte for a trace that fails."""
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
    """Return an ONNX file with metadata: text as it is, other values as JSON."""
    import onnx

    model = onnx.load_from_string(content)
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    onnx.helper.set_model_props(model, texts)
    onnx.checker.check_model(model, full_check=True)
    made: bytes = model.SerializeToString()
    return made


def _traced(outputs: ExportedOutputs, image: Tensor, free: bool) -> bytes:
    """Export by tracing one image through the model."""
    axes = {name: _axes(name, free) for name in (INPUT, *outputs.names)}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), _silent(), torch.inference_mode():
        file = Path(folder, "traced.onnx")
        warnings.simplefilter("ignore")  # warnings of shapes that become constants, which the check finds
        torch.onnx.export(
            outputs,
            (image,),
            file,
            dynamo=False,
            input_names=[INPUT],
            output_names=list(outputs.names),
            dynamic_axes=axes,
            opset_version=OPSET,
        )
        return file.read_bytes()


def _symbolic(outputs: ExportedOutputs, image: Tensor, free: bool) -> bytes:
    """Export with symbolic sizes."""
    sides = {0: Dim.DYNAMIC} | ({2: Dim.DYNAMIC, 3: Dim.DYNAMIC} if free else {})
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.export.export(outputs, (image,), dynamic_shapes={INPUT: sides}, strict=False)
        made = torch.onnx.export(
            program,
            (image,),
            dynamo=True,
            input_names=[INPUT],
            output_names=list(outputs.names),
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
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):  # their messages; the check decides
        logging.getLogger(name).setLevel(logging.ERROR)
