"""Makes a Trainer the server of a federation: its optimizer step puts the merged weights in place."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch

from federation.client.lightning_internals import ServerLoop
from federation.exchange.schema import State


class MergedWeights(torch.optim.Optimizer):
    """Copies the merged weights into the server's module, bit for bit, as an optimizer step.

    Args:
        module: The server's module.

    Attributes:
        merged: The next global state; a weight without an entry stays as it is.
    """

    def __init__(self, module: L.LightningModule) -> None:
        super().__init__([p for p in module.parameters()], {"lr": 1.0})
        self.module = module
        self.merged: State = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Copy every merged weight and buffer."""
        for key, value in self.module.state_dict().items():
            if key in self.merged:
                value.copy_(self.merged[key])


class Server:
    """Takes the optimizer steps of a Trainer for the duration of a federation.

    The module keeps all its methods. It is switched to manual optimization, in which Lightning leaves the steps to
    others, and the Trainer's manual-optimization loop is one that does not call ``training_step``. Its hooks around a
    training batch and epoch run as in any manual optimization, once per round, with ``outputs`` empty.

    Args:
        trainer: The Trainer that counts rounds.
        module: Its module.
    """

    def __init__(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.trainer, self.module = trainer, module
        self.step = MergedWeights(module)
        self._automatic = module.automatic_optimization
        module.automatic_optimization = False
        self._loop = ServerLoop(trainer, self.step)

    def start(self) -> None:
        """Replace the optimizers that the module configured for training on images; call in ``on_fit_start``."""
        self.trainer.strategy.optimizers = [self.step]
        self.trainer.strategy.lr_scheduler_configs = []

    def release(self) -> None:
        """Give the Trainer its own loop back, and the module its kind of optimization."""
        self._loop.release()
        self.module.automatic_optimization = self._automatic
