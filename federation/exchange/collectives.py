"""Send values between the processes of a run: tensors as tensors, everything else as small objects."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes that share the work of a run.

    Attributes:
        rank: Number of this process.
        world: Number of processes.
        device: Device of this process's tensors in a collective: the CPU with gloo, its own GPU with NCCL.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (a value)

    def share(self, value: T | None, owner: int) -> T:
        """Return the owner's value on every process."""
        if self.world > 1:
            return share(value, owner, self.device)
        assert value is not None
        return value

    def any(self, value: bool) -> bool:
        """Return on every process whether the value is true on one of them."""
        if self.world == 1:
            return value
        flag = torch.tensor(int(value), device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)


@dataclass(frozen=True)
class _Slot:
    """Stands for a tensor in what is sent as an object."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def share(value: T | None, source: int, device: torch.device) -> T:
    """Return the source's value on every process of the group; a tensor arrives with the same bits, on the CPU.

    Args:
        value: On the source, dataclasses, dicts, lists and tuples of tensors and plain values; ignored elsewhere.
        source: Rank of the process that has it.
        device: Where this process's tensors travel: the CPU with gloo, its own GPU with NCCL.
    """
    tensors: list[Tensor] = []
    mine = dist.get_rank() == source
    outline = [_outline(value, tensors) if mine else None]
    dist.broadcast_object_list(outline, src=source, device=device)
    slots: list[_Slot] = []
    _slots(outline[0], slots)
    received = []
    for i, slot in enumerate(slots):
        buffer = tensors[i].detach().to(device).contiguous() if mine else torch.empty(slot.shape, dtype=slot.dtype)
        buffer = buffer.to(device)
        if buffer.numel():
            dist.broadcast(buffer, src=source)
        received.append(buffer.cpu())
    filled: T = _filled(outline[0], iter(received))
    return filled


def _outline(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors.append(value)
        return _Slot(tuple(value.shape), value.dtype)
    return _mapped(value, lambda part: _outline(part, tensors))


def _slots(value: Any, found: list[_Slot]) -> Any:
    if isinstance(value, _Slot):
        found.append(value)
        return value
    return _mapped(value, lambda part: _slots(part, found))


def _filled(value: Any, tensors: Any) -> Any:
    return next(tensors) if isinstance(value, _Slot) else _mapped(value, lambda part: _filled(part, tensors))


def _mapped(value: Any, change: Any) -> Any:
    """Apply a function to the parts of a container, in their order; a value that is none comes back as it is."""
    if isinstance(value, dict):
        return {key: change(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(change(part) for part in value)
    if is_dataclass(value) and not isinstance(value, type | _Slot):
        return type(value)(**{field.name: change(getattr(value, field.name)) for field in fields(value)})
    return value
