"""Permute a site's hidden units and attention heads to the order of the global model, which changes no function."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from federation.alignment.groups import PermutationGroups, permutation_groups
from federation.alignment.matching import order_of
from federation.exchange.schema import State


@dataclass
class Alignment:
    """A site's weights in the order of the reference.

    Attributes:
        state: The weights; tensors that did not move are the given objects.
        precision: The precision, permuted in the same way.
        moved: Share of units that moved, by group.
        permutations: By group, int64 (units,): the site's unit at each place. Groups that did not move are absent.
    """

    state: State
    precision: dict[str, Tensor]
    moved: dict[str, float]
    permutations: dict[str, Tensor] = field(default_factory=dict)


def align(
    state: State, reference: State, groups: PermutationGroups, precision: Mapping[str, Tensor] | None = None
) -> Alignment:
    r"""Permute a site's units, separately per group, so that they are as close as possible to the reference's.

    The permutation $\pi$ minimises $\sum_i d_{i,\pi(i)}$ over the places $i$ (Hungarian algorithm), with

    $$d_{il} = \tfrac12 \sum_d s_{ld}\, (m_{id} - w_{ld})^2$$

    over the weights into and out of a hidden unit: the cost of probabilistic neural matching with the site's precision
    $s$ and the global model $m$ as the known centre. Heads are compared by $Q^\top K$ and $O V$ in place of the
    weights, biases included, with the mean precision of the head. Where every unit is nearest to its own place, the
    identity is the best matching and no more is computed; a matching that lowers the sum by less than 5 % is refused.

    The reference is the global model and never another site, so the result depends neither on the sites' order nor on
    their number, and each site can align its own update. Pass raw curvature, if available, rather than normalised
    precision, and normalise the result: sums over permuted weights differ in the last bit.

    Args:
        state: The site's weights. Weights that are not finite stay as they are.
        reference: The global weights.
        groups: The module's symmetries.
        precision: Precision or curvature by key, at least 0, of shapes that broadcast to the weights'; ``None`` and
            missing keys count as equal everywhere.

    Reference:
        Yurochkin et al., Bayesian nonparametric federated learning of neural networks, ICML 2019, section 3.
        Ainsworth et al., Git Re-Basin, ICLR 2023, section 3.2.
    """
    precision = dict(precision or {})
    moved: dict[str, float] = {}
    permutations: dict[str, Tensor] = {}
    for group in groups:
        order = order_of(group, state, reference, precision)
        moved[group.name] = 0.0
        if order is not None:
            permutations[group.name] = order
            moved[group.name] = float((order != torch.arange(group.units)).double().mean())
    return Alignment(
        permute(state, groups, permutations), permute(precision, groups, permutations), moved, permutations
    )


def permute(
    tensors: Mapping[str, Tensor], groups: PermutationGroups, permutations: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return tensors with their units permuted; axes of length 1 stay as they are.

    Args:
        tensors: Weights, precision or moments by ``state_dict`` name; not changed.
        groups: The module's symmetries.
        permutations: By group, int64 (units,): the unit for each place.
    """
    permuted = dict(tensors)
    for group in groups:
        if group.name not in permutations:
            continue
        order = permutations[group.name].cpu()
        indices: dict[tuple[str, int], Tensor] = {}
        for part in group.parts:
            value = permuted.get(part.key)
            if value is None or value.ndim <= part.dim or value.shape[part.dim] == 1:
                continue
            index = indices.setdefault((part.key, part.dim), torch.arange(value.shape[part.dim]))
            within = order[:, None] * part.width + torch.arange(part.width)
            index[part.offset : part.offset + group.units * part.width] = part.offset + within.flatten()
        for (key, dim), index in indices.items():
            permuted[key] = permuted[key].index_select(dim, index.to(permuted[key].device))
    return permuted


@torch.no_grad()
def shuffle(module: nn.Module, groups: PermutationGroups, seed: int) -> dict[str, Tensor]:
    """Permute a module's units at random, in place; its function stays the same up to the rounding of sums.

    Args:
        module: The module.
        groups: Its symmetries.
        seed: Seed of the permutations.

    Returns:
        The permutations, as for ``permute``.
    """
    generator = torch.Generator().manual_seed(seed)
    permutations = {group.name: torch.randperm(group.units, generator=generator) for group in groups}
    state = module.state_dict()
    for key, value in permute(state, groups, permutations).items():
        if value is not state[key]:
            state[key].copy_(value)
    return permutations


def permute_optimizer(optimizer: Optimizer, module: nn.Module, permutations: Mapping[str, Tensor]) -> None:
    """Permute an optimizer's moments with the units, in place: every state tensor of the parameter's shape.

    Args:
        optimizer: The optimizer of the module's parameters.
        module: The module the permutations belong to.
        permutations: ``Alignment.permutations``.
    """
    groups = permutation_groups(module)
    for name, parameter in module.named_parameters():
        slots: dict[str, Any] = optimizer.state.get(parameter, {})
        for slot, value in slots.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                slots[slot] = permute({name: value}, groups, permutations)[name]
