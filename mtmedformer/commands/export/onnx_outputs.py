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
from mtmedformer.inference.box_fusion import fuse_boxes

MEMBER = "@"
"""Stands between the name of a task and the number of a further member of an ensemble in names of outputs."""

DECODING = (
    "Outputs <task>.scores and <task>.boxes are those of all positions, before non-maximum suppression. "
    "mtmedformer.commands.export.onnx_outputs.decode(outputs, read_heads(folder), (height, width)) applies it as the "
    "model does, and fuses the boxes of the members of an ensemble (<task>@2, <task>@3 ...). All other outputs are "
    "ready to use."
)


def decode(outputs: Mapping[str, NDArray[Any]], heads: Mapping[str, TaskHead], size: tuple[int, int]) -> dict[str, Any]:
    """Turn outputs of the graph into predictions: suppress the overlapping boxes of a model, fuse those of several.

    Args:
        outputs: Outputs of onnxruntime by name.
        heads: The heads by task; ``read_heads(folder)`` builds them without weights. Those of further members of an
            ensemble are ``<task>@2``, ``<task>@3`` and so on.
        size: ``(height, width)`` of the images.

    Returns:
        Predictions by task, in the formats of ``TaskHead.predict``.
    """
    seen: dict[str, list[Any]] = {}
    for task, head in heads.items():
        mine = {name: value for name, value in outputs.items() if name == task or name.startswith(f"{task}.")}
        tensors = {name[len(task) + 1 :]: torch.from_numpy(np.asarray(value)) for name, value in mine.items()}
        if tensors:  # what is averaged in the graph is there once
            decoded = head.decoded(tensors, size) if isinstance(head, Exportable) else tensors[""]
            seen.setdefault(task.partition(MEMBER)[0], []).append(decoded)
    return {task: _fused(members) if len(members) > 1 else members[0] for task, members in seen.items()}


def _fused(members: Sequence[Any]) -> list[dict[str, torch.Tensor]]:
    return [fuse_boxes([one[i] for one in members])[0] for i in range(len(members[0]))]


def describe_outputs(outputs: Sequence[str], heads: Mapping[str, TaskHead]) -> Iterator[tuple[str, str]]:
    """Yield the name and a description of each output, for users of the ONNX file alone."""
    for name in outputs:
        task, _, part = name.partition(".")
        task, _, member = task.partition(MEMBER)
        of = f", member {member} of the ensemble" if member else ""
        kind, classes, unit = heads[task].kind, ", ".join(heads[task].classes), heads[task].task(task).unit
        if not part and kind == "classification":
            yield name, f"(batch, classes) probabilities of {classes}"
        elif not part and kind == "regression" and classes:
            yield name, f"(batch, grades) probabilities of {classes}{of}"
        elif not part and kind == "regression":
            yield name, f"(batch, 1) number{f' in {unit}' if unit else ''}{of}"
        elif not part:
            yield name, f"(batch, classes, height, width) probabilities of {classes}"
        elif part == "scores":
            yield name, f"(batch, positions, classes) scores of {classes}, before non-maximum suppression{of}"
        elif part == "boxes":
            yield (
                name,
                f"(batch, positions, 4) x0, y0, x1, y1 in input pixels, from the corner of the first pixel{of}",
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
        about = json.loads(file.read_text(encoding="utf-8"))
        models = [about["model"], *(one["model"] for one in about.get("members", ()))]
        parts = [
            (one["init_args"].get("tasks"), dict(one["init_args"]["heads"]), _channels(one["init_args"]["encoder"]))
            for one in models
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{file}: missing or damaged ({type(error).__name__})") from error
    heads: dict[str, TaskHead] = {}
    for number, (kept, described, channels) in enumerate(parts, start=1):
        for name, one in described.items():
            if kept is None or name in kept:
                head: TaskHead = build(one, TaskHead, MODEL_HOMES, trusted, str(file))  # type: ignore[type-abstract]
                head.build(channels, (4, 8, 16, 32, 64))
                heads[name if number == 1 else f"{name}{MEMBER}{number}"] = head
    return heads


def _channels(encoder: Mapping[str, Any]) -> int:
    return int(encoder["init_args"].get("channels", 128))
