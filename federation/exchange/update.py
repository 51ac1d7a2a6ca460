"""The update that a site sends after its local training: arrays, counts and metrics, no data of a patient."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from federation.exchange.quantization import Rounding, decoded, encoded
from mtmedformer.errors import DataError
from mtmedformer.storage.atomic_write import atomic_write
from mtmedformer.storage.hashing import state_hash

FACTS = ("site", "round", "base", "schema", "metrics", "samples", "steps", "seconds", "rounding")
"""Fields of the header of an update, besides its blocks."""

WAITING = "updates"
"""Folder in the run folder for updates of the current round and files of isolated sites, which may hold private keys.

It exists during a round only: what is there when a run starts was left by a killed process.
"""


@dataclass
class BlockUpdate:
    """A site's change of one block.

    Attributes:
        num_examples: Different labelled training images of this round whose loss depends on the block; never 0. An
            image that was seen several times counts once.
        delta: By key, the local weights minus the global ones the round began with, float32.
        precision: By key, the relative precision of the weights, mean about 1, strictly positive, of a shape that
            broadcasts to that of the weights: a scalar, one number per output row (rows, 1, …), or one per element.
            Empty if the aggregator does not use it.
        scale: By key, the mean curvature by which the relative precision was divided.
        step: By key, the quantization step of the change (``federation.exchange.quantization``). In memory the change
            is float32; a multiple of the step is transferred without loss.
    """

    num_examples: int
    delta: dict[str, Tensor]
    precision: dict[str, Tensor] = field(default_factory=dict)
    scale: dict[str, float] = field(default_factory=dict)
    step: dict[str, float] = field(default_factory=dict)


@dataclass
class Update:
    """One site's update of one round.

    Attributes:
        site: Name of the site.
        round: Number of the round, from 0.
        base: ``state_hash`` of the global state the round began with.
        schema: ``Schema.digest`` of the model.
        blocks: Changes by block name; blocks without examples and personal blocks are absent.
        counters: Integer buffers by name.
        metrics: The site's own validation metrics, ``<task>/<metric>``.
        samples: Labelled training samples by task in this round.
        steps: Optimiser steps taken in this round.
        seconds: Wall time of the local training.
        extra: Further tensors of the aggregator (control variates, for example), by name.
        rounding: Rounding of the changes that have a quantization step.
    """

    site: str
    round: int
    base: str
    schema: str
    blocks: dict[str, BlockUpdate]
    counters: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0
    extra: dict[str, Tensor] = field(default_factory=dict)
    rounding: Rounding = "none"

    def tensors(self) -> dict[str, Tensor]:
        """Return every array of the update under a flat name, as it is transferred."""
        flat: dict[str, Tensor] = {}
        for name, block in self.blocks.items():
            for key, value in block.delta.items():
                rounds = key in block.step
                flat[f"delta|{name}|{key}"] = encoded(value, block.step[key], self.rounding) if rounds else value
            for key, value in block.precision.items():
                flat[f"precision|{name}|{key}"] = value.half() if key in block.step else value
        flat |= {f"counter||{k}": v for k, v in self.counters.items()}
        return flat | {f"extra||{k}": v for k, v in self.extra.items()}

    def header(self) -> dict[str, Any]:
        """Return everything that is not an array, as plain JSON values."""
        blocks = {n: {"num_examples": b.num_examples, "scale": b.scale, "step": b.step} for n, b in self.blocks.items()}
        return {name: getattr(self, name) for name in FACTS} | {"blocks": blocks}

    def nbytes(self) -> int:
        """Return the size of its arrays in bytes, as they are transferred."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())


def save_update(update: Update, file: Path) -> None:
    """Write an update as safetensors, atomically."""
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in update.tensors().items()}
    with atomic_write(file) as part:
        save_file(tensors, part, metadata={"update": json.dumps(update.header())})


def load_update(file: Path) -> Update:
    """Read an update from a file, without running any code in it.

    The form is checked here: every fact has its type, and no key is missing, unknown or given twice. Whether the update
    fits the model and the round is checked by ``federation.server.update_checks``.

    Raises:
        DataError: The file is not an update.
    """
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            header = json.loads(opened.metadata()["update"], object_pairs_hook=_unique)
            check_header(header)
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
        return assemble(header, tensors)
    except Exception as error:  # torch, safetensors and json raise many kinds for damaged bytes
        raise DataError(f"{file.name}: not a site's update ({type(error).__name__}: {error!s:.200})") from error


def check_header(header: Any) -> None:
    """Check the types of a header.

    Raises:
        TypeError: A value has another type.
        ValueError: A key is missing or unknown.
    """
    _check_keys("header", header, {*FACTS, "blocks"})
    for name, kind in (("site", str), ("round", int), ("base", str), ("schema", str), ("steps", int)):
        _check_type(name, header[name], kind)
    _check_type("seconds", header["seconds"], int, float)
    if header["rounding"] not in get_args(Rounding):
        raise ValueError(f"rounding is none of {', '.join(get_args(Rounding))}")
    for name, kinds in (("metrics", (int, float)), ("samples", (int,))):
        _check_type(name, header[name], dict)
        for value in header[name].values():
            _check_type(name, value, *kinds)
    _check_type("blocks", header["blocks"], dict)
    for block in header["blocks"].values():
        _check_keys("block", block, {"num_examples", "scale", "step"})
        _check_type("num_examples", block["num_examples"], int)
        for name in ("scale", "step"):
            _check_type(name, block[name], dict)
            for value in block[name].values():
                _check_type(name, value, int, float)


def _check_keys(name: str, value: Any, keys: set[str]) -> None:
    _check_type(name, value, dict)
    if set(value) != keys:
        raise ValueError(f"{name}: keys missing or unknown")


def _check_type(name: str, value: Any, *kinds: type) -> None:
    if type(value) not in kinds:  # a bool is an int for ``isinstance``
        raise TypeError(f"{name} is a {type(value).__name__}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs of a JSON object as a dictionary.

    Raises:
        ValueError: A key comes twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key comes twice")
    return found


def assemble(header: dict[str, Any], tensors: dict[str, Tensor]) -> Update:
    """Build an update from its header and its flat arrays (the inverse of ``header`` and ``tensors``).

    Raises:
        KeyError: An array belongs to a block that the header lacks.
        ValueError: The name of an array is not one of an update, or its type does not fit the rounding.
    """
    blocks = {
        n: BlockUpdate(b["num_examples"], {}, {}, dict(b["scale"]), dict(b["step"]))
        for n, b in header["blocks"].items()
    }
    coded = {"fp16": torch.float16, "int8": torch.int8}.get(header["rounding"])
    counters: dict[str, Tensor] = {}
    extra: dict[str, Tensor] = {}
    for name, value in tensors.items():
        kind, block, key = name.split("|", 2)
        if kind == "delta":
            step = blocks[block].step.get(key)
            if step is not None and value.dtype != coded:
                raise ValueError(f"{value.dtype} does not fit the rounding")
            blocks[block].delta[key] = value if step is None else decoded(value, step)
        elif kind == "precision":
            blocks[block].precision[key] = value.float()
        elif kind in ("counter", "extra") and not block:
            (counters if kind == "counter" else extra)[key] = value
        else:
            raise ValueError("an array of an unknown kind")
    return Update(blocks=blocks, counters=counters, extra=extra, **{name: header[name] for name in FACTS})


def sha256(update: Update) -> str:
    """Return the SHA-256 of the transferred update: its header, and name, type, shape and bytes of every array.

    Sender and receiver compute the same hash, so that both can prove what was sent.
    """
    return state_hash(update.tensors(), header=json.dumps(update.header(), sort_keys=True))


def examples_of(update: Update) -> dict[str, int]:
    """Return ``num_examples`` of every block of an update."""
    return {name: block.num_examples for name, block in update.blocks.items()}


def norms_of(update: Update) -> dict[str, float]:
    """Return the L2 norm of the change of every block, summed in float64."""
    return {
        name: math.sqrt(sum(float(delta.double().square().sum()) for delta in block.delta.values()))
        for name, block in update.blocks.items()
    }
