"""``mtmedformer export``: write a checkpoint as a folder with weights, description and ONNX graph."""

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
from torch import Tensor

import mtmedformer
from mtmedformer.commands.ensemble import named_checkpoints
from mtmedformer.commands.export.onnx_check import TOLERANCE
from mtmedformer.commands.export.onnx_graph import Graph, export_graph, with_metadata
from mtmedformer.commands.export.onnx_outputs import DECODING, describe_outputs
from mtmedformer.commands.load.stored_model import (
    ABOUT,
    CONFIG,
    FAMILIARITY,
    GRAPH,
    WEIGHTS,
    StoredModel,
    build_model,
    read_model,
    weights_file,
)
from mtmedformer.commands.parser import ToolParser
from mtmedformer.errors import ConfigError
from mtmedformer.heads.base import TaskHead
from mtmedformer.inference.results import NOTE
from mtmedformer.module import MultiTaskModule
from mtmedformer.plots.terminal import SafeConsole
from mtmedformer.storage.atomic_write import atomic_write
from mtmedformer.storage.hashing import weights_digest

Format = Literal["onnx", "safetensors", "both"]

USUAL_SIZE = (256, 256)
"""Input size to check a graph with if the size of the training images is not known."""


def export(
    path: str | Path | Sequence[str | Path], output: str | Path, format: Format = "both", trusted: bool = False
) -> Graph | None:
    """Write a model as a folder that does not need its run and, with ONNX, does not need PyTorch.

    ``model.json`` describes it (classes, preparation of images, calibration), ``model.safetensors`` contains its
    weights, ``familiarity.safetensors`` what its training images were like (only with the weights), ``config.yaml``
    its ``model`` section, to continue training with ``--model.init_weights``, and ``model.onnx`` the graph, which is
    written only if onnxruntime and PyTorch give the same outputs. Of an ensemble, ``model-2.safetensors`` and so on
    have the weights of the other members, and the graph has all of them.

    Args:
        path: A checkpoint of ``fit``, or those of all members of an ensemble.
        output: The folder; created if needed.
        format: What to write.
        trusted: Allow classes of other projects.

    Returns:
        The graph and its differences from PyTorch; ``None`` for ``safetensors``.

    Raises:
        ConfigError: The checkpoint cannot be used, the folder contains another model, or no graph agrees with PyTorch.
    """
    stored, folder = read_model(path), Path(output)
    module = build_model(stored, trusted)
    graph = export_graph(module, _size(module, stored)) if format != "safetensors" else None
    about = describe(module, stored, graph)
    files = {CONFIG: yaml.safe_dump({"model": stored.model}, sort_keys=False).encode()}
    for number, one in enumerate((stored, *stored.members) if format != "onnx" else (), start=1):
        state = {name: tensor.contiguous().clone() for name, tensor in one.weights.items()}
        note = f"{NOTE}; model {weights_digest(one.weights)}"
        files[weights_file(number)] = save(state, metadata={"note": note})
    if (arrays := _arrays(stored.familiarity)) and format != "onnx":
        files[FAMILIARITY] = save({name: array.contiguous().clone() for name, array in arrays.items()})
    if graph is not None:
        described = {key: about[key] for key in ("note", "software", "weights", "tasks", "preparation", "outputs")}
        files[GRAPH] = with_metadata(graph.content, described | {"decoding": DECODING})
    digests = [about["weights"], *(one["weights"] for one in about["members"])]
    _write(folder, files | {ABOUT: (json.dumps(about, indent=1) + "\n").encode()}, digests)
    return graph


def describe(module: MultiTaskModule, stored: StoredModel, graph: Graph | None) -> dict[str, Any]:
    """Return the content of ``model.json``: all that is needed to build the model, prepare images and read outputs."""
    outputs = dict(describe_outputs(graph.outputs, _heads(module))) if graph else {}
    return {
        "note": NOTE,
        "software": f"MTMedFormer {mtmedformer.__version__}",
        "weights": weights_digest(stored.weights),
        "model": stored.model,
        "preparation": stored.preparation,
        "calibration": stored.calibration,
        "members": [
            {"weights": weights_digest(one.weights), "model": one.model, "calibration": one.calibration}
            for one in stored.members
        ],
        "familiarity": {k: v for k, v in stored.familiarity.items() if k not in _arrays(stored.familiarity)},
        "tasks": {name: asdict(task) for name, task in module.tasks.items()},
        "input": "image: float32 (batch, 1, height, width) in [0, 1], framed as in 'preparation'",
        "outputs": outputs,
        "decoding": DECODING if graph else "",
        "size": list(graph.size) if graph and graph.size else None,
    }


def main(argv: Sequence[str]) -> int:
    """Run ``mtmedformer export --ckpt_path CKPT --output DIR [--format both]``.

    Returns:
        0; mistakes raise ``UserError``.
    """
    parser = ToolParser("mtmedformer export", description="Write a trained model as a folder of portable files.")
    parser.add_argument(
        "--ckpt_path",
        required=True,
        help="checkpoint of a run, such as runs/x/checkpoints/best.ckpt; [a,b,c] exports an ensemble",
    )
    parser.add_argument("--output", required=True, type=Path, help="folder of the files; created if needed")
    parser.add_argument("--format", choices=("onnx", "safetensors", "both"), default="both")
    parser.add_argument(
        "--trusted",
        action="store_true",
        help="allow classes of other projects; importing runs their code",
    )
    given = parser.parse_args(argv)
    several = given.ckpt_path.lstrip().startswith("[")
    path = named_checkpoints(given.ckpt_path) if several else given.ckpt_path
    graph = export(path, given.output, given.format, given.trusted)
    console = SafeConsole()
    if graph is not None:
        _show(graph, console)
    weights = [weights_file(number) for number in range(1, len(path) + 1)] if several else [WEIGHTS]
    for name in (ABOUT, CONFIG, *weights, FAMILIARITY, GRAPH):
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
        console.print(f"Not used: {remark}", highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"All differences are within {TOLERANCE:g} on images of {shapes}; valid for {bound}.", highlight=False
    )


def _arrays(parts: dict[str, Any]) -> dict[str, Tensor]:
    """Return the parts that are tensors, which JSON does not hold."""
    return {name: part for name, part in parts.items() if isinstance(part, Tensor)}


def _heads(module: MultiTaskModule) -> dict[str, TaskHead]:
    return {name: head for name, head in module.heads.items() if isinstance(head, TaskHead)}


def _size(module: MultiTaskModule, stored: StoredModel) -> tuple[int, int]:
    if module.encoder.fixed_size is not None:
        return module.encoder.fixed_size
    size = stored.preparation.get("image_size", USUAL_SIZE)
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _write(folder: Path, files: dict[str, bytes], digests: list[str]) -> None:
    """Write the files, each whole or not at all; other files of an earlier export of the same model are kept."""
    try:
        if (folder / ABOUT).is_file():
            earlier = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
            if [earlier.get("weights"), *(one.get("weights") for one in earlier.get("members", ()))] != digests:
                raise ConfigError(f"--output {folder}: contains an export of another model; choose another folder")
        for name, content in files.items():
            with atomic_write(folder / name) as part:
                part.write_bytes(content)
    except OSError as error:
        raise ConfigError(f"--output {folder}: {error.strerror or error}; choose a folder to write in") from error
