"""The blocks of a model: the shared encoder and the head of each task, and whether a block is exchanged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

State = dict[str, Tensor]
"""A module's ``state_dict``: tensors by name."""

NORMS = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.InstanceNorm2d,
)


@dataclass(frozen=True)
class Block:
    """Weights that are trained by the same labels.

    Attributes:
        name: ``encoder``, ``heads.<task>`` or another first-level name of the module.
        keys: ``state_dict`` names of its floating-point tensors, in order.
        task: The task whose labels train it; ``None`` if the labels of all tasks do.
        personal: Whether it stays at its site (a loss weighting's state, for example).
    """

    name: str
    keys: tuple[str, ...]
    task: str | None = None
    personal: bool = False


@dataclass(frozen=True)
class Schema:
    """Names, shapes and blocks of the weights of a federation; updates of another schema are refused.

    Attributes:
        blocks: Every block, in the module's order.
        shapes: Shape of every tensor of the ``state_dict``, counters included.
        parameters: Names that are trained parameters; the other floating-point tensors are buffers.
        norms: Names that belong to a normalisation layer.
        counters: Names of integer tensors (``num_batches_tracked`` and the like).
    """

    blocks: tuple[Block, ...]
    shapes: dict[str, tuple[int, ...]]
    parameters: frozenset[str]
    norms: frozenset[str]
    counters: tuple[str, ...]

    def block(self, name: str) -> Block:
        """Return a block by name.

        Raises:
            KeyError: There is no such block.
        """
        for block in self.blocks:
            if block.name == name:
                return block
        raise KeyError(f"no block is called {name!r}; there are {', '.join(b.name for b in self.blocks)}")

    def personal_keys(self) -> frozenset[str]:
        """Return the keys of personal blocks, integer buffers included."""
        personal = {block.name for block in self.blocks if block.personal}
        return frozenset(key for key in self.shapes if key.split(".")[0] in personal)

    def statistics(self) -> dict[str, str]:
        """Return the running variance by the running mean of every BatchNorm, as keys."""
        pairs = {key: key.removesuffix("mean") + "var" for key in self.norms if key.endswith("running_mean")}
        return {mean: variance for mean, variance in pairs.items() if variance in self.norms}

    def digest(self) -> str:
        """Return a 16-digit hash of names, shapes and ownership."""
        facts = [[b.name, b.task, b.personal, [[k, self.shapes[k]] for k in b.keys]] for b in self.blocks]
        return hashlib.blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest()


def schema_of(module: nn.Module, personal: Sequence[str] = ("loss",)) -> Schema:
    """Return the schema of a module, from its ``state_dict``.

    A key ``heads.<task>.…`` belongs to the block ``heads.<task>`` of that task; any other key to the block of its first
    name. The labels of a task train the weights of its head; the labels of all tasks train all other weights.

    Args:
        module: The multi-task module, on any device.
        personal: First-level names that stay at each site.
    """
    state = module.state_dict()
    grouped: dict[str, list[str]] = {}
    for key, value in state.items():
        if value.is_floating_point():
            grouped.setdefault(block_of(key), []).append(key)
    blocks = tuple(
        Block(name, tuple(keys), name.removeprefix("heads.") if name.startswith("heads.") else None, name in personal)
        for name, keys in grouped.items()
    )
    norms = {
        f"{prefix}.{leaf}" if prefix else leaf
        for prefix, layer in module.named_modules()
        if isinstance(layer, NORMS) or type(layer).__name__.lower().endswith(("layernorm", "layernorm2d", "groupnorm1"))
        for leaf in layer.state_dict()
    }
    return Schema(
        blocks=blocks,
        shapes={key: tuple(value.shape) for key, value in state.items()},
        parameters=frozenset(name for name, _ in module.named_parameters()),
        norms=frozenset(norms & state.keys()),
        counters=tuple(key for key, value in state.items() if not value.is_floating_point()),
    )


def block_of(key: str) -> str:
    """Return the name of the block that a key of the ``state_dict`` belongs to."""
    parts = key.split(".")
    return ".".join(parts[:2]) if parts[0] == "heads" else parts[0]
