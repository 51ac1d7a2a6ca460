"""``mtmedformer export``: a checkpoint as a folder to hand on, with weights, description and ONNX graph."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import yaml
from rich.console import Console
from rich.table import Table
from safetensors.torch import save

import mtmedformer
from mtmedformer.calibration import plain
from mtmedformer.commands.export.onnx_check import TOLERANCE
from mtmedformer.commands.export.onnx_graph import Graph, export_graph, with_metadata
from mtmedformer.commands.export.onnx_outputs import DECODING, describe_outputs
from mtmedformer.commands.load.stored_model import (
    ABOUT,
    CONFIG,
    GRAPH,
    WEIGHTS,
    StoredModel,
    build_model,
    read_model,
)
from mtmedformer.commands.parser import ToolParser
from mtmedformer.errors import ConfigError
from mtmedformer.heads.base import TaskHead
from mtmedformer.inference.results import NOTE
from mtmedformer.module import MultiTaskModule
from mtmedformer.storage.atomic_write import whole
from mtmedformer.storage.hashing import weights_digest

Format = Literal["onnx", "safetensors", "both"]

USUAL_SIZE = (256, 256)
"""Input that a graph is checked with where nothing says how large images were."""


def export(path: str | Path, output: str | Path, format: Format = "both", trusted: bool = False) -> Graph | None:
    """Write a model as a folder that needs neither its run nor, with ONNX, PyTorch.

    ``model.json`` describes it (classes, how images are prepared, calibration), ``model.safetensors`` holds its
    weights, ``config.yaml`` its ``model`` section, to train on with ``--model.init_weights``, and ``model.onnx`` the
    graph, which is written only if onnxruntime agrees with PyTorch.

    Args:
        path: A checkpoint of ``fit``.
        output: The folder; made if needed.
        format: What to write.
        trusted: Allow classes that are not this project's.

    Returns:
        The graph and how far it is from PyTorch; ``None`` where none was asked for.

    Raises:
        ConfigError: The checkpoint cannot be used, the folder holds another model, or no graph agrees with PyTorch.
    """
    stored, folder = read_model(path), Path(output)
    module = build_model(stored, trusted)
    graph = export_graph(module, _size(module, stored)) if format != "safetensors" else None
    about = describe(module, stored, graph)
    files = {CONFIG: yaml.safe_dump({"model": stored.model}, sort_keys=False).encode()}
    if format != "onnx":
        state = {name: tensor.contiguous().clone() for name, tensor in stored.weights.items()}
        files[WEIGHTS] = save(state, metadata={"note": f"{NOTE}; model {about['weights']}"})
    if graph is not None:
        told = {key: about[key] for key in ("note", "software", "weights", "tasks", "preparation", "outputs")}
        files[GRAPH] = with_metadata(graph.content, told | {"decoding": DECODING})
    _write(folder, files | {ABOUT: (json.dumps(about, indent=1) + "\n").encode()}, about["weights"])
    return graph


def describe(module: MultiTaskModule, stored: StoredModel, graph: Graph | None) -> dict[str, Any]:
    """Return what ``model.json`` says: enough to build the model, to prepare images for it, and to read its answers."""
    outputs = dict(describe_outputs(graph.outputs, _heads(module))) if graph else {}
    return {
        "note": NOTE,
        "software": f"MTMedFormer {mtmedformer.__version__}",
        "weights": weights_digest(stored.weights),
        "model": stored.model,
        "preparation": stored.preparation,
        "calibration": plain(module.calibration),
        "tasks": {name: asdict(task) for name, task in module.tasks.items()},
        "input": "image: float32 (batch, 1, height, width) in [0, 1], framed as 'preparation' says",
        "outputs": outputs,
        "decoding": DECODING if graph else "",
        "size": list(graph.size) if graph and graph.size else None,
    }


def main(argv: Sequence[str]) -> int:
    """Run ``mtmedformer export --ckpt_path CKPT --output DIR [--format both]``.

    Returns:
        0; mistakes raise ``UserError``.
    """
    parser = ToolParser("mtmedformer export", description="Write a trained model as a folder to hand on.")
    parser.add_argument("--ckpt_path", required=True, help="checkpoint of a run, such as runs/x/checkpoints/best.ckpt")
    parser.add_argument("--output", required=True, type=Path, help="folder of the files; made if needed")
    parser.add_argument("--format", choices=("onnx", "safetensors", "both"), default="both")
    parser.add_argument(
        "--trusted", action="store_true", help="allow classes of your own in the checkpoint; importing runs their code"
    )
    given = parser.parse_args(argv)
    graph = export(given.ckpt_path, given.output, given.format, given.trusted)
    console = Console()
    if graph is not None:
        _show(graph, console)
    for name in (ABOUT, CONFIG, WEIGHTS, GRAPH):
        if (file := given.output / name).is_file():
            line = f"{file}  {max(1, round(file.stat().st_size / 1000)):,} kB"
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    line = f"{NOTE.capitalize()}. In Python: mtmedformer.load({str(given.output)!r}).predict(FILE)"
    console.print(line, highlight=False, markup=False, soft_wrap=True)
    return 0


def _show(graph: Graph, console: Console) -> None:
    table = Table("output", "shape", "largest difference from PyTorch", pad_edge=False)
    for one in graph.differences:
        table.add_row(one.output, " × ".join(map(str, one.shape)), f"{one.absolute:.1e}")
    console.print(table)
    bound = "any batch and size" if graph.size is None else f"any batch, size {graph.size[0]} × {graph.size[1]} only"
    shapes = ", ".join(" × ".join(map(str, shape)) for shape in graph.shapes)
    for remark in graph.remarks:
        console.print(f"Tried before: {remark}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"All within {TOLERANCE:g} on images of {shapes}; good for {bound}.", highlight=False)


def _heads(module: MultiTaskModule) -> dict[str, TaskHead]:
    return {name: head for name, head in module.heads.items() if isinstance(head, TaskHead)}


def _size(module: MultiTaskModule, stored: StoredModel) -> tuple[int, int]:
    if module.encoder.fixed_size is not None:
        return module.encoder.fixed_size
    size = stored.preparation.get("image_size", USUAL_SIZE)
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _write(folder: Path, files: dict[str, bytes], digest: str) -> None:
    """Write the files, each whole or not at all; what an export of the same model left and this one lacks stays."""
    try:
        if (folder / ABOUT).is_file():
            earlier = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
            if earlier.get("weights") != digest:
                raise ConfigError(f"--output {folder}: holds an export of another model; choose another folder")
        for name, content in files.items():
            with whole(folder / name) as part:
                part.write_bytes(content)
    except OSError as error:
        raise ConfigError(f"--output {folder}: {error.strerror or error}; choose a folder to write in") from error
