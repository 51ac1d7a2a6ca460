"""Parameter groups with layer-wise learning rates, and learning-rate schedules over the whole training."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import lightning as L
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mtmedformer.protocols import MonitoringSchedule, StepSchedule


class WarmupCosine(LRScheduler):
    """Raises the learning rate linearly, then lowers it along half a cosine, once over the whole training.

    ``MultiTaskModule`` sets the number of optimizer steps with ``spread`` before the first step.

    Args:
        optimizer: The wrapped optimizer.
        warmup: Share of the training in which the rate rises, in [0, 1).
        floor: Final learning rate as a share of the optimizer's, in [0, 1].

    Reference:
        Loshchilov & Hutter, SGDR, ICLR 2017, equation 5, without restarts.
    """

    def __init__(self, optimizer: Optimizer, warmup: float = 0.05, floor: float = 0.01) -> None:
        self.warmup, self.floor, self.total_steps = warmup, floor, 1
        super().__init__(optimizer)

    def spread(self, total_steps: int) -> None:
        """Set the number of optimizer steps of the whole training."""
        self.total_steps = max(1, total_steps)
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate

    def get_lr(self) -> list[float | Tensor]:
        """Return each parameter group's learning rate at the current step."""
        return [float(base) * self._factor(self.last_epoch) for base in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Return the state without the number of steps, so that a resumed run may be longer."""
        return {k: v for k, v in super().state_dict().items() if k not in {"warmup", "floor", "total_steps"}}

    def _factor(self, step: int) -> float:
        rise = max(1, round(self.warmup * self.total_steps))
        if step < rise:
            return (step + 1) / (rise + 1)
        progress = min(1.0, (step - rise) / max(1, self.total_steps - rise))
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress))


def parameter_groups(
    module: nn.Module,
    depths: Mapping[str, int],
    without_decay: Collection[str],
    lr: float,
    weight_decay: float,
    layer_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """Return parameter groups: no weight decay on vectors, a smaller learning rate in shallower layers.

    Args:
        module: The module whose trainable parameters are grouped.
        depths: Depth of parameters by name, 0 nearest to the image; others have the largest depth.
        without_decay: Names of further parameters without weight decay.
        lr: Learning rate at the largest depth.
        weight_decay: Weight decay of matrices and kernels; norms and biases have none.
        layer_decay: Factor of the learning rate from one depth to the next shallower one, in (0, 1].
    """
    deepest = max(depths.values(), default=0)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        rate = lr * layer_decay ** (deepest - depths.get(name, deepest))
        decayed = parameter.ndim > 1 and name not in without_decay
        groups.setdefault((rate, weight_decay if decayed else 0.0), []).append(parameter)
    return [{"params": p, "lr": rate, "weight_decay": decay} for (rate, decay), p in groups.items()]


def scheduled(optimizer: Optimizer, scheduler: Any, trainer: L.Trainer) -> OptimizerLRScheduler:
    """Return optimizer and schedule in Lightning's form, stepped per optimizer step or per epoch.

    Args:
        optimizer: The optimizer.
        scheduler: Its schedule; a ``StepSchedule`` is stepped per optimizer step, any other per epoch.
        trainer: The trainer, which estimates the number of optimizer steps.
    """
    interval = "epoch"
    if isinstance(scheduler, StepSchedule):
        scheduler.spread(int(trainer.estimated_stepping_batches))
        interval = "step"
    entry: dict[str, Any] = {"scheduler": scheduler, "interval": interval}
    if isinstance(scheduler, MonitoringSchedule):
        entry["monitor"] = scheduler.monitor
    return {"optimizer": optimizer, "lr_scheduler": entry}  # type: ignore[return-value]
