"""What the outputs of an exported graph hold, and how they become predictions."""

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

DECODING = (
    "Outputs <task>.scores and <task>.boxes are those of every place, before boxes that overlap a better one of their "
    "class are suppressed. "
    "mtmedformer.commands.export.onnx_outputs.decode(outputs, read_heads(folder), (height, width)) does that as "
    "the model itself does. Everything else is ready to use."
)


def decode(outputs: Mapping[str, NDArray[Any]], heads: Mapping[str, TaskHead], size: tuple[int, int]) -> dict[str, Any]:
    """Turn outputs of the graph into predictions, suppressing boxes that overlap a better one of their class.

    Args:
        outputs: By name, as onnxruntime returns them.
        heads: The heads by task; ``read_heads(folder)`` builds them without weights.
        size: ``(height, width)`` of the images.

    Returns:
        Predictions by task, in the formats of ``TaskHead.predict``.
    """
    found = {}
    for task, head in heads.items():
        mine = {name: value for name, value in outputs.items() if name == task or name.startswith(f"{task}.")}
        tensors = {name[len(task) + 1 :]: torch.from_numpy(np.asarray(value)) for name, value in mine.items()}
        found[task] = head.decoded(tensors, size)
    return found


def describe_outputs(answers: Sequence[str], heads: Mapping[str, TaskHead]) -> Iterator[tuple[str, str]]:
    """Yield each output's name and what it holds, in words for whoever has the file alone."""
    for name in answers:
        task, _, part = name.partition(".")
        kind, classes = heads[task].kind, ", ".join(heads[task].classes)
        if not part and kind == "classification":
            yield name, f"(batch, classes) probabilities of {classes}"
        elif not part:
            yield name, f"(batch, classes, height, width) probabilities of {classes}"
        elif part == "scores":
            yield name, f"(batch, places, classes) scores of {classes}, before suppression"
        elif part == "boxes":
            yield name, "(batch, places, 4) x0, y0, x1, y1 in pixels of the input, from the corner of its first pixel"
        else:
            yield name, part


def read_heads(folder: str | Path, trusted: bool = False) -> dict[str, TaskHead]:
    """Build the heads of an export, without weights: what ``decode`` needs to read the outputs of its graph.

    Raises:
        ConfigError: ``model.json`` is missing or damaged, or names a class that is not this project's.
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
