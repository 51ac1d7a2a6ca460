"""Makes a Trainer's own module the server of a federation: its optimiser step puts the merged weights in place."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import lightning as L
import torch
from torch import Tensor

from federation.client.lightning_internals import server_step

Target = Callable[[str], Tensor | None]


class ServerStep(torch.optim.Optimizer):
    """Puts the merged weights in place, bit for bit, as the server's optimiser step.

    Args:
        module: The server's module.
        target: Returns the next global value of a weight, or ``None`` where it stays.
    """

    def __init__(self, module: L.LightningModule, target: Target) -> None:
        super().__init__([p for p in module.parameters()], {"lr": 1.0})
        self.module, self.target = module, target

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Copy every merged weight and buffer."""
        for key, value in self.module.state_dict().items():
            merged = self.target(key)
            if merged is not None:
                value.copy_(merged)


class Server:
    """Takes the place of a module's training hooks, and gives them back.

    Args:
        trainer: The Trainer that counts rounds.
        module: Its module.
        target: Returns the next global value of a weight, or ``None`` where it stays.
    """

    def __init__(self, trainer: L.Trainer, module: L.LightningModule, target: Target) -> None:
        self.module = module
        self._overridden: list[str] = []
        module.automatic_optimization = False
        for name, method in (
            ("configure_optimizers", lambda module: ServerStep(module, target)),
            ("training_step", lambda module, batch, batch_idx: server_step(trainer, trainer.optimizers[0])),
            ("on_train_batch_end", _nothing),
            ("on_train_epoch_end", _nothing),
            ("on_before_optimizer_step", _nothing),
        ):
            setattr(module, name, MethodType(method, module))
            self._overridden.append(name)

    def release(self) -> None:
        """Give the module its own methods back."""
        for name in self._overridden:
            delattr(self.module, name)
        self.module.automatic_optimization = True
        self._overridden = []


def _nothing(module: L.LightningModule, *args: Any) -> None:
    """Take the place of a hook that belongs to training on images, of which the server has none."""
