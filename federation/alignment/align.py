"""Puts a site's hidden units and attention heads in the order of the global model, which changes no function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from timm.layers.attention import Attention
from timm.layers.mlp import GluMlp, Mlp, SwiGLU
from timm.layers.norm import RmsNorm
from timm.models.pvt_v2 import Attention as SpatialReductionAttention
from timm.models.pvt_v2 import MlpWithDepthwiseConv
from timm.models.swin_transformer import WindowAttention
from timm.models.swin_transformer_v2 import WindowAttention as CosineWindowAttention
from torch import Tensor, nn
from torch.optim import Optimizer

from federation.exchange.schema import State

GAIN = 0.05
"""Share by which a matching must lower the distance to the reference before units are moved."""

LOW, HIGH = 0.01, 100.0
"""Range of a unit's precision relative to its group's mean, so that dead units still have a place of their own."""


@dataclass(frozen=True)
class Part:
    """Where one tensor holds the weights of a group's units, one unit after the other.

    Attributes:
        key: ``state_dict`` name of the tensor.
        dim: Axis the units lie along.
        offset: First index of the first unit on that axis.
        width: Consecutive indices a unit: 1 for a hidden unit, the head's channels for a head.
    """

    key: str
    dim: int = 0
    offset: int = 0
    width: int = 1


Side = tuple[Part, ...]


@dataclass(frozen=True)
class Group:
    """Units that can change places together without changing the function.

    Attributes:
        name: Name of the layer, ``stages.0.blocks.1.mlp``.
        units: Number of units.
        rows: Parts that are compared number by number.
        circuits: Pairs of sides that act through their product alone, as queries and keys do, or values and output;
            they are compared by that product, which no change of basis within a head alters.
    """

    name: str
    units: int
    rows: tuple[Part, ...]
    circuits: tuple[tuple[Side, Side], ...] = ()

    @property
    def parts(self) -> tuple[Part, ...]:
        """Everything that moves with a unit."""
        return self.rows + tuple(part for pair in self.circuits for side in pair for part in side)


PermutationGroups = tuple[Group, ...]
"""The permutation symmetries of a module, in the order of its layers."""


@dataclass
class Alignment:
    """A site's weights in the order of the reference.

    Attributes:
        state: The weights; tensors that did not move are the ones given.
        precision: The precision, moved along.
        moved: Share of units that moved, by group.
        permutations: By group, int64 (units,): the site's unit at each place. Groups that stayed are absent.
    """

    state: State
    precision: dict[str, Tensor]
    moved: dict[str, float]
    permutations: dict[str, Tensor] = field(default_factory=dict)


def permutation_groups(module: nn.Module) -> PermutationGroups:
    """Find the permutation symmetries of a module's transformer layers, by the class of each layer.

    Known are timm's plain and gated MLPs (of ViT, Swin, DaViT, ConvNeXt and others), the Mix-FFN of PVT v2 with its
    depth-wise convolution, and the attention of plain ViTs (fused projection, norms of queries and keys, gates), PVT v2
    (spatial reduction and linear) and Swin v1 and v2 (with their position biases). Everything else is left alone:
    layers of other classes or with parts replaced, convolutions, the decoders, and whatever lies on the residual stream
    (patch and position embedding, layer norms, spatial reduction), which all layers share: it cannot be permuted one
    layer at a time.

    Args:
        module: Any module; names are those of its ``state_dict``.
    """
    found = []
    for name, layer in module.named_modules():
        read = _READERS.get(type(layer))
        group = read(name, layer) if read is not None else None
        if group is not None and group.units > 1:
            found.append(group)
    return tuple(found)


def align(
    state: State, reference: State, groups: PermutationGroups, precision: Mapping[str, Tensor] | None = None
) -> Alignment:
    r"""Permute a site's units so that they lie as near as possible to the reference's, each group by itself.

    Unit $l$ of the site takes the place $i$ that makes $\sum_i d_{i,\pi(i)}$ least (Hungarian algorithm), with

    $$d_{il} = \tfrac12 \sum_d s_{ld}\, (m_{id} - w_{ld})^2$$

    over the weights into and out of a hidden unit: the cost of probabilistic neural matching with the site's precision
    $s$ and the global model $m$ as the known centre. Heads are compared by $Q^\top K$ and $O V$ in place of the
    weights, biases included, with the mean precision of the head. Where every unit is nearest to its own place, the
    identity is the best matching and no more is computed; a matching that lowers the sum by less than 5 % is refused.

    The reference is the global model and never another site, so neither the sites' order nor their number matters, and
    sites can align themselves. Pass raw curvature rather than normalised precision where both are to be had, and
    normalise what comes back: sums over permuted weights differ in the last bit.

    Args:
        state: The site's weights. Weights that are not finite stay as they are.
        reference: The global weights.
        groups: The module's symmetries.
        precision: Precision or curvature by key, at least 0, of shapes that broadcast to the weights'; ``None`` and
            keys that are missing count as equal everywhere.

    Reference:
        Yurochkin et al., Bayesian nonparametric federated learning of neural networks, ICML 2019, section 3.
        Ainsworth et al., Git Re-Basin, ICLR 2023, section 3.2.
    """
    precision = dict(precision or {})
    moved: dict[str, float] = {}
    permutations: dict[str, Tensor] = {}
    for group in groups:
        order = _order(group, state, reference, precision)
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
    """Return tensors with their units in another order; axes of length 1 have nothing to move.

    Args:
        tensors: Weights, precision or moments by ``state_dict`` name; not changed.
        groups: The module's symmetries.
        permutations: By group, int64 (units,): which unit comes to each place.
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
    """Permute a module's units at random, in place; what it computes stays the same up to the rounding of sums.

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
    """Move an optimiser's moments along with the units, in place; everything of a parameter's shape counts as one.

    Args:
        optimizer: The optimiser of the module's parameters.
        module: The module the permutations belong to.
        permutations: ``Alignment.permutations``.
    """
    groups = permutation_groups(module)
    for name, parameter in module.named_parameters():
        slots: dict[str, Any] = optimizer.state.get(parameter, {})
        for slot, value in slots.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                slots[slot] = permute({name: value}, groups, permutations)[name]


def _order(group: Group, state: State, reference: State, precision: Mapping[str, Tensor]) -> Tensor | None:
    """Return which of the site's units comes to each place, int64 (units,); ``None`` where all stay."""
    known = _relative(group, state, precision)
    if not group.circuits and _settled(_rows(group, state, reference, known)):
        return None
    return _matching(_score(group, state, reference, known))


def _matching(score: Tensor) -> Tensor | None:
    """Return which unit comes to each place so that the sum of scores (places, units) is largest; ``None``: stay."""
    diagonal = score.diagonal()
    at_home = (diagonal >= score.amax(1)).all() and (diagonal >= score.amax(0)).all()
    if bool(at_home) or not bool(score.isfinite().all()):
        return None
    order = torch.from_numpy(linear_sum_assignment(score.numpy(), maximize=True)[1])
    before = -float(diagonal.double().sum())
    after = -float(score.double()[torch.arange(len(order)), order].sum())
    return order if before - after > GAIN * before else None


def _score(group: Group, state: State, reference: State, known: Mapping[Part, Tensor]) -> Tensor:
    """Return minus the distance of every unit of the site from every place of the reference, float32 on the CPU."""
    score = _row_score(_rows(group, state, reference, known)) if group.rows else torch.zeros(group.units, group.units)
    for first, second in group.circuits:
        sides = [_read_side(side, group.units, s) for s in (reference, state) for side in (first, second)]
        means = [known[part].mean((1, 2)) for part in first + second if part in known]
        score += _product_distance(*sides) * (torch.stack(means).mean(0) if means else 1.0)
    return score.clamp_(max=0)


Rows = list[tuple[Tensor, Tensor, Tensor]]
"""For every part the reference's weights, the site's, both (units, features), and the precision of the latter."""


def _rows(group: Group, state: State, reference: State, known: Mapping[Part, Tensor]) -> Rows:
    """Return what is compared number by number; the precision is (units, features), or (units, 1) for all of them."""
    rows = []
    for part in group.rows:
        place = _read(part, group.units, reference[part.key]).flatten(1)
        unit = _read(part, group.units, state[part.key]).flatten(1)
        sure = known.get(part, torch.ones(group.units, 1, 1)).flatten(1)
        if 1 < sure.shape[1] < unit.shape[1]:  # one number a row of the head
            sure = sure.repeat_interleave(unit.shape[1] // sure.shape[1], 1)
        rows.append((place, unit, sure))
    return rows


def _row_score(rows: Rows) -> Tensor:
    r"""Return $-\frac12 \sum_d s_{ld} (m_{id} - w_{ld})^2$ for all pairs, as one matrix product."""
    left, right = [], []
    for place, unit, sure in rows:
        square = place.square().mul_(-0.5)
        weighted = sure * unit
        left += [place, square if sure.shape[1] > 1 else square.sum(1, keepdim=True), torch.ones(len(unit), 1)]
        right += [weighted, sure, (weighted * unit).sum(1, keepdim=True).mul_(-0.5)]
    return torch.cat(left, 1) @ torch.cat(right, 1).T


def _settled(rows: Rows) -> bool:
    """Return whether every unit is plainly nearest to its own place: others are farther in an eighth of their weights.

    Distances over some of the weights are never longer than over all, so what this shows is so; what it does not show
    is looked at in full.
    """
    own = torch.stack([(sure * (place - unit).square()).sum(1) for place, unit, sure in rows]).sum(0).mul_(-0.5)
    others = _row_score([(place[:, ::8], unit[:, ::8], sure[:, ::8]) for place, unit, sure in rows]).fill_diagonal_(
        -torch.inf
    )
    return bool((own >= others.amax(1)).all() and (own >= others.amax(0)).all())


def _product_distance(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    r"""Return $-\frac12 \lVert A_i^\top B_i - C_l^\top D_l \rVert^2$ for all pairs without forming a product.

    Args:
        a: The reference's first sides, (heads, width, features).
        b: Its second sides; the number of features may differ.
        c: The site's first sides.
        d: The site's second sides.
    """
    heads, width = a.shape[:2]

    def between(x: Tensor, y: Tensor) -> Tensor:
        return (x.flatten(0, 1) @ y.flatten(0, 1).T).view(heads, width, heads, width)

    def own(x: Tensor, y: Tensor) -> Tensor:
        return ((x @ x.mT) * (y @ y.mT)).sum((1, 2))

    return (between(a, c) * between(b, d)).sum((1, 3)) - 0.5 * (own(a, b)[:, None] + own(c, d)[None])


def _relative(group: Group, state: State, precision: Mapping[str, Tensor]) -> dict[Part, Tensor]:
    """Return each part's precision over the group's mean, clipped: (units, width or 1, features or 1)."""
    found: dict[Part, Tensor] = {}
    total, count = 0.0, 0
    for part in group.parts:
        value, weight = precision.get(part.key), state[part.key]
        if value is None:
            continue
        if value.numel() == 1:
            read = value.float().reshape(1, 1, 1).cpu().expand(group.units, 1, 1)
        elif value.ndim == weight.ndim and value.shape[part.dim] == weight.shape[part.dim]:
            read = _read(part, group.units, value)
        else:
            read = _read(part, group.units, value.expand(weight.shape))
        found[part] = read
        numbers = weight.numel() // weight.shape[part.dim] * part.width * group.units
        total, count = total + float(read.double().mean()) * numbers, count + numbers
    if not total > 0:  # nothing known, or nothing finite
        return {}
    return {part: (read * (count / total)).clamp_(LOW, HIGH) for part, read in found.items()}


def _read(part: Part, units: int, value: Tensor) -> Tensor:
    """Return a part's weights by unit, float32 (units, width, features) on the CPU."""
    span = value.detach().narrow(part.dim, part.offset, units * part.width).movedim(part.dim, 0)
    return span.reshape(units, part.width, -1).float().cpu()


def _read_side(side: Side, units: int, state: State) -> Tensor:
    """Return a side's weights and biases by head, (heads, width, features)."""
    return torch.cat([_read(part, units, state[part.key]) for part in side], 2)


def _leaves(prefix: str, layer: nn.Module | None, offset: int = 0, width: int = 1) -> tuple[Part, ...]:
    """Return the parts of a layer whose outputs are the units: its weight and, where it has one, its bias."""
    names = [name for name, _ in layer.named_parameters()] if layer is not None else []
    return tuple(Part(f"{prefix}.{name}", 0, offset, width) for name in names)


def _plain(*layers: nn.Module | None) -> bool:
    """Return whether layers are what their class says: not wrapped, not replaced, norms equivariant."""
    known = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.RMSNorm, RmsNorm, nn.Identity)
    return all(layer is None or type(layer) in known or isinstance(layer, nn.LayerNorm) for layer in layers)


def _mlp(name: str, layer: Any) -> Group | None:
    """Read an MLP, gated or not, with or without a depth-wise convolution inside."""
    gated = isinstance(layer, SwiGLU)
    into = [("fc1_g", layer.fc1_g), ("fc1_x", layer.fc1_x)] if gated else [("fc1", layer.fc1)]
    inside = [(leaf, getattr(layer, leaf, None)) for leaf in ("dwconv", "norm")]
    if not _plain(layer.fc2, *(part for _, part in (*into, *inside))):
        return None
    units = layer.fc2.weight.shape[1]
    rows = [part for leaf, linear in into for part in _leaves(f"{name}.{leaf}", linear)]
    if isinstance(layer, GluMlp):  # one matrix holds the values and the gates
        rows += _leaves(f"{name}.fc1", layer.fc1, offset=units)
    rows += [part for leaf, between in inside for part in _leaves(f"{name}.{leaf}", between)]
    return Group(name, units, (*rows, Part(f"{name}.fc2.weight", 1)))


def _fused_attention(name: str, layer: Any) -> Group | None:
    """Read an attention layer with one projection for queries, keys and values."""
    gate, norm = getattr(layer, "gate", None), getattr(layer, "norm", None)
    if not _plain(layer.qkv, layer.proj, gate, norm):
        return None
    heads, channels = layer.num_heads, layer.proj.weight.shape[1]
    width = channels // heads
    q, k, v = (_leaves(f"{name}.qkv", layer.qkv, offset=i * channels, width=width) for i in range(3))
    rows = (*_leaves(f"{name}.gate", gate, width=width), *_leaves(f"{name}.norm", norm, width=width))
    return Group(name, heads, rows, ((q, k), (v, (Part(f"{name}.proj.weight", 1, 0, width),))))


def _spatial_reduction_attention(name: str, layer: Any) -> Group | None:
    """Read PVT v2's attention; keys and values of fewer tokens, whose reduction acts on the residual stream."""
    if not _plain(layer.q, layer.kv, layer.proj):
        return None
    width = layer.dim // layer.num_heads
    q = _leaves(f"{name}.q", layer.q, width=width)
    k, v = (_leaves(f"{name}.kv", layer.kv, offset=i * layer.dim, width=width) for i in range(2))
    return Group(name, layer.num_heads, (), ((q, k), (v, (Part(f"{name}.proj.weight", 1, 0, width),))))


def _window_attention(name: str, layer: Any) -> Group | None:
    """Read Swin's attention, whose table of position biases has a column a head."""
    group = _fused_attention(name, layer)
    return group and Group(
        name, group.units, (Part(f"{name}.relative_position_bias_table", 1), *group.rows), group.circuits
    )


def _cosine_window_attention(name: str, layer: Any) -> Group | None:
    """Read Swin v2's attention: biases apart, a temperature and an output of the position network a head."""
    group = _fused_attention(name, layer)
    if group is None or not _plain(layer.cpb_mlp[-1]):
        return None
    (q, k), (v, out) = group.circuits
    if layer.q_bias is not None:
        width = q[0].width
        q, v = (*q, Part(f"{name}.q_bias", width=width)), (*v, Part(f"{name}.v_bias", width=width))
    rows = (Part(f"{name}.logit_scale"), Part(f"{name}.cpb_mlp.2.weight"))
    return Group(name, group.units, rows, ((q, k), (v, out)))


_READERS: dict[type[nn.Module], Callable[[str, Any], Group | None]] = {
    Mlp: _mlp,
    GluMlp: _mlp,
    SwiGLU: _mlp,
    MlpWithDepthwiseConv: _mlp,
    Attention: _fused_attention,
    SpatialReductionAttention: _spatial_reduction_attention,
    WindowAttention: _window_attention,
    CosineWindowAttention: _cosine_window_attention,
}
