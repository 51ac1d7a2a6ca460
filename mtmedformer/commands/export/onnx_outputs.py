"""Describe the outputs of an exported graph, and turn them into predictions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mtmedformer.commands.load.stored_model import ABOUT, MODEL_HOMES, build
from mtmedformer.errors import ConfigError
from mtmedformer.heads.base import TaskHead
from mtmedformer.heads.capabilities import Exportable

DECODING = (
    "Outputs <task>.scores and <task>.boxes are those of all positions, before non-maximum suppression. "
    "mtmedformer.commands.export.onnx_outputs.decode(outputs, read_heads(folder), (height, width)) applies it as the "
    "model does. All other outputs are ready to use."
)


def decode(outputs: Mapping[str, NDArray[Any]], heads: Mapping[str, TaskHead], size: tuple[int, int]) -> dict[str, Any]:
    """Turn outputs of the graph into predictions, with non-maximum suppression of boxes.

    Args:
        outputs: Outputs of onnxruntime by name.
        heads: The heads by task; ``read_heads(folder)`` builds them without weights.
        size: ``(height, width)`` of the images.

    Returns:
        Predictions by task, in the formats of ``TaskHead.predict``.
    """
    predictions = {}
    for task, head in heads.items():
        mine = {name: value for name, value in outputs.items() if name == task or name.startswith(f"{task}.")}
        tensors = {name[len(task) + 1 :]: torch.from_numpy(np.asarray(value)) for name, value in mine.items()}
        predictions[task] = head.decoded(tensors, size) if isinstance(head, Exportable) else tensors[""]
    return predictions


def describe_outputs(outputs: Sequence[str], heads: Mapping[str, TaskHead]) -> Iterator[tuple[str, str]]:
    """Yield the name and a description of each output, for users of the ONNX file alone."""
    for name in outputs:
        task, _, part = name.partition(".")
        kind, classes = heads[task].kind, ", ".join(heads[task].classes)
        if not part and kind == "classification":
            yield name, f"(batch, classes) probabilities of {classes}"
        elif not part:
            yield name, f"(batch, classes, height, width) probabilities of {classes}"
        elif part == "scores":
            yield name, f"(batch, positions, classes) scores of {classes}, before non-maximum suppression"
        elif part == "boxes":
            yield (
                name,
                "(batch, positions, 4) x0, y0, x1, y1 in input pixels, from the corner of the first pixel",
            )
        else:
            yield name, part


def read_heads(folder: str | Path, trusted: bool = False) -> dict[str, TaskHead]:
    """Build the heads of an export without weights, as ``decode`` needs them.

    Raises:
        ConfigError: ``model.json`` is missing or damaged, or names a class of another project.
    """
    file = Path(folder, ABOUT)
    try:
        model = json.loads(file.read_text(encoding="utf-8"))["model"]
        kept, described = model["init_args"].get("tasks"), model["init_args"]["heads"].items()
        channels = model["init_args"]["encoder"]["init_args"].get("channels", 128)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{file}: missing or damaged ({type(error).__name__})") from error
    heads = {name: build(one, TaskHead, MODEL_HOMES, trusted, str(file)) for name, one in described}  # type: ignore[type-abstract]
    for head in heads.values():
        head.build(channels, (4, 8, 16, 32, 64))
    return {name: head for name, head in heads.items() if kept is None or name in kept}
