"""Learning-rate schedules over the whole training, however many steps that turns out to be."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class WarmupCosine(LRScheduler):
    """Raises the learning rate linearly, then lowers it along half a cosine, once over the whole training.

    ``MultiTaskModule`` tells the schedule the number of optimiser steps before the first one (``spread``).

    Args:
        optimizer: The wrapped optimiser.
        warmup: Share of the training spent rising, in [0, 1).
        floor: Final learning rate as a share of the optimiser's, in [0, 1].

    Reference:
        Loshchilov & Hutter, SGDR, ICLR 2017, equation 5, without restarts.
    """

    def __init__(self, optimizer: Optimizer, warmup: float = 0.05, floor: float = 0.01) -> None:
        self.warmup, self.floor, self.total_steps = warmup, floor, 1
        super().__init__(optimizer)

    def spread(self, total_steps: int) -> None:
        """Fix the number of optimiser steps the schedule runs over."""
        self.total_steps = max(1, total_steps)
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate

    def get_lr(self) -> list[float | Tensor]:
        """Return each parameter group's learning rate at the current step."""
        return [float(base) * self._factor(self.last_epoch) for base in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Return where the schedule is; its length is not part of it, so that a resumed run may be longer."""
        return {k: v for k, v in super().state_dict().items() if k not in {"warmup", "floor", "total_steps"}}

    def _factor(self, step: int) -> float:
        rise = max(1, round(self.warmup * self.total_steps))
        if step < rise:
            return (step + 1) / (rise + 1)
        progress = min(1.0, (step - rise) / max(1, self.total_steps - rise))
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress))
