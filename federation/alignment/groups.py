"""Permutation symmetries of transformer layers: which units of a module can change places together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from timm.layers.attention import Attention
from timm.layers.mlp import GluMlp, Mlp, SwiGLU
from timm.layers.norm import RmsNorm
from timm.models.pvt_v2 import Attention as SpatialReductionAttention
from timm.models.pvt_v2 import MlpWithDepthwiseConv
from timm.models.swin_transformer import WindowAttention
from timm.models.swin_transformer_v2 import WindowAttention as CosineWindowAttention
from torch import nn


@dataclass(frozen=True)
class Part:
    """The place of a group's units in one tensor, one unit after the other.

    Attributes:
        key: ``state_dict`` name of the tensor.
        dim: Axis the units lie along.
        offset: First index of the first unit on that axis.
        width: Consecutive indices per unit: 1 for a hidden unit, the head's channels for a head.
    """

    key: str
    dim: int = 0
    offset: int = 0
    width: int = 1


Side = tuple[Part, ...]


@dataclass(frozen=True)
class PermutationGroup:
    """Units whose order can change without changing the function of the module.

    Attributes:
        name: Name of the layer, ``stages.0.blocks.1.mlp``.
        units: Number of units.
        rows: Parts that are compared element by element.
        circuits: Pairs of sides that act only through their product (queries and keys, values and output). They are
            compared by that product, which does not depend on the basis within a head.
    """

    name: str
    units: int
    rows: tuple[Part, ...]
    circuits: tuple[tuple[Side, Side], ...] = ()

    @property
    def parts(self) -> tuple[Part, ...]:
        """Everything that moves with a unit."""
        return self.rows + tuple(part for pair in self.circuits for side in pair for part in side)


PermutationGroups = tuple[PermutationGroup, ...]
"""The permutation symmetries of a module, in the order of its layers."""


def permutation_groups(module: nn.Module) -> PermutationGroups:
    """Find the permutation symmetries of a module's transformer layers, by the class of each layer.

    Supported are timm's plain and gated MLPs (of ViT, Swin, DaViT, ConvNeXt and others), the Mix-FFN of PVT v2 with its
    depth-wise convolution, and the attention of plain ViTs (fused projection, norms of queries and keys, gates), PVT v2
    (spatial reduction and linear) and Swin v1 and v2 (with their position biases). Other layers are skipped: other
    classes, layers with replaced parts, convolutions, the decoders, and everything on the residual stream (patch and
    position embedding, layer norms, spatial reduction), which all layers share and which cannot be permuted per layer.

    Args:
        module: Any module; keys are those of its ``state_dict``.

    Example:
        >>> from timm.layers import Mlp
        >>> [(group.name, group.units) for group in permutation_groups(nn.Sequential(Mlp(4, 8)))]
        [('0', 8)]
    """
    groups = []
    for name, layer in module.named_modules():
        read = _READERS.get(type(layer))
        group = read(name, layer) if read is not None else None
        if group is not None and group.units > 1:
            groups.append(group)
    return tuple(groups)


def _leaves(prefix: str, layer: nn.Module | None, offset: int = 0, width: int = 1) -> tuple[Part, ...]:
    """Return the parts of a layer whose outputs are the units: its weight and, if present, its bias."""
    names = [name for name, _ in layer.named_parameters()] if layer is not None else []
    return tuple(Part(f"{prefix}.{name}", 0, offset, width) for name in names)


def _plain(*layers: nn.Module | None) -> bool:
    """Return whether all layers are plain ones of torch or timm: not wrapped, not replaced, norms equivariant."""
    known = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.RMSNorm, RmsNorm, nn.Identity)
    return all(layer is None or type(layer) in known or isinstance(layer, nn.LayerNorm) for layer in layers)


def _mlp(name: str, layer: Any) -> PermutationGroup | None:
    """Read an MLP, gated or not, with or without a depth-wise convolution inside."""
    gated = isinstance(layer, SwiGLU)
    into = [("fc1_g", layer.fc1_g), ("fc1_x", layer.fc1_x)] if gated else [("fc1", layer.fc1)]
    children = dict(layer.named_children())
    inside = [(leaf, children.get(leaf)) for leaf in ("dwconv", "norm")]
    if not _plain(layer.fc2, *(part for _, part in (*into, *inside))):
        return None
    units = layer.fc2.weight.shape[1]
    rows = [part for leaf, linear in into for part in _leaves(f"{name}.{leaf}", linear)]
    if isinstance(layer, GluMlp):  # one matrix holds the values and the gates
        rows += _leaves(f"{name}.fc1", layer.fc1, offset=units)
    rows += [part for leaf, between in inside for part in _leaves(f"{name}.{leaf}", between)]
    return PermutationGroup(name, units, (*rows, Part(f"{name}.fc2.weight", 1)))


def _fused_attention(name: str, layer: Any) -> PermutationGroup | None:
    """Read an attention layer with one projection for queries, keys and values."""
    children = dict(layer.named_children())
    gate, norm = children.get("gate"), children.get("norm")
    if not _plain(layer.qkv, layer.proj, gate, norm):
        return None
    heads, channels = layer.num_heads, layer.proj.weight.shape[1]
    width = channels // heads
    q, k, v = (_leaves(f"{name}.qkv", layer.qkv, offset=i * channels, width=width) for i in range(3))
    rows = (*_leaves(f"{name}.gate", gate, width=width), *_leaves(f"{name}.norm", norm, width=width))
    return PermutationGroup(name, heads, rows, ((q, k), (v, (Part(f"{name}.proj.weight", 1, 0, width),))))


def _spatial_reduction_attention(name: str, layer: Any) -> PermutationGroup | None:
    """Read PVT v2's attention; keys and values of fewer tokens, whose reduction acts on the residual stream."""
    if not _plain(layer.q, layer.kv, layer.proj):
        return None
    width = layer.dim // layer.num_heads
    q = _leaves(f"{name}.q", layer.q, width=width)
    k, v = (_leaves(f"{name}.kv", layer.kv, offset=i * layer.dim, width=width) for i in range(2))
    return PermutationGroup(name, layer.num_heads, (), ((q, k), (v, (Part(f"{name}.proj.weight", 1, 0, width),))))


def _window_attention(name: str, layer: Any) -> PermutationGroup | None:
    """Read Swin's attention, whose table of position biases has one column per head."""
    group = _fused_attention(name, layer)
    return group and PermutationGroup(
        name, group.units, (Part(f"{name}.relative_position_bias_table", 1), *group.rows), group.circuits
    )


def _cosine_window_attention(name: str, layer: Any) -> PermutationGroup | None:
    """Read Swin v2's attention: separate biases, and a temperature and position-network output per head."""
    group = _fused_attention(name, layer)
    if group is None or not _plain(layer.cpb_mlp[-1]):
        return None
    (q, k), (v, out) = group.circuits
    if layer.q_bias is not None:
        width = q[0].width
        q, v = (*q, Part(f"{name}.q_bias", width=width)), (*v, Part(f"{name}.v_bias", width=width))
    rows = (Part(f"{name}.logit_scale"), Part(f"{name}.cpb_mlp.2.weight"))
    return PermutationGroup(name, group.units, rows, ((q, k), (v, out)))


_READERS: dict[type[nn.Module], Callable[[str, Any], PermutationGroup | None]] = {
    Mlp: _mlp,
    GluMlp: _mlp,
    SwiGLU: _mlp,
    MlpWithDepthwiseConv: _mlp,
    Attention: _fused_attention,
    SpatialReductionAttention: _spatial_reduction_attention,
    WindowAttention: _window_attention,
    CosineWindowAttention: _cosine_window_attention,
}
