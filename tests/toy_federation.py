"""A small module of two tasks, and made-up updates of its sites."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from federation.exchange.schema import Schema, State, schema_of, state_hash
from federation.exchange.update import BlockUpdate, Update


class Toy(nn.Module):
    """An encoder with two kinds of norm, two heads, and a loss whose state is personal."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.BatchNorm1d(5), nn.Conv2d(1, 4, 3))
        self.heads = nn.ModuleDict({"finding": nn.Linear(5, 2), "lungs": nn.Linear(5, 3)})
        self.loss = nn.ParameterDict({"weights": torch.ones(2)})


def toy(seed: int = 0) -> tuple[State, Schema]:
    """Return a random state of the toy and its schema."""
    generator = torch.Generator().manual_seed(seed)
    module = Toy()
    state = {
        key: torch.randn(value.shape, generator=generator) if value.is_floating_point() else torch.tensor(5)
        for key, value in module.state_dict().items()
    }
    return state, schema_of(module)


def news(
    site: str,
    state: State,
    schema: Schema,
    seed: int = 0,
    tasks: Iterable[str] = ("finding", "lungs"),
    evidence: int = 100,
    precision: str | None = "element",
    size: float = 0.1,
    round: int = 0,
) -> Update:
    """Return an update of random changes to the encoder and the heads of some tasks.

    Args:
        precision: ``element``, ``row``, ``tensor``, ``ones``, ``zero`` or ``None``.
        size: Standard deviation of the changes.
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = {}
    for block in schema.blocks:
        if block.personal or (block.task is not None and block.task not in tasks):
            continue
        delta = {key: torch.randn(state[key].shape, generator=generator) * size for key in block.keys}
        measured = [key for key in block.keys if key in schema.parameters] if precision else []
        relative = {key: _precision(state[key].shape, str(precision), generator) for key in measured}
        scale = {key: float(torch.rand((), generator=generator)) + 0.5 for key in measured}
        blocks[block.name] = BlockUpdate(evidence, delta, relative, scale)
    counters = {key: torch.tensor(seed) for key in schema.counters}
    extra = {
        key: torch.randn(value.shape, generator=generator)
        for block in blocks.values()
        for key, value in block.delta.items()
        if key in schema.parameters
    }
    return Update(site, round, state_hash(state), schema.digest(), blocks, counters, extra=extra, steps=3)


def _precision(shape: torch.Size, kind: str, generator: torch.Generator) -> Tensor:
    if kind in ("ones", "zero"):
        return torch.full(shape, float(kind == "ones"))
    if kind == "tensor":
        return torch.ones(())
    shape = torch.Size([shape[0], *[1] * (len(shape) - 1)]) if kind == "row" else shape
    drawn = torch.rand(shape, generator=generator) + 0.05
    return drawn / drawn.mean()
