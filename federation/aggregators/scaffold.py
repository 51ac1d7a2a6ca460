"""SCAFFOLD: control variates that take a site's own direction out of its local steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from federation.aggregators.base import ClientObjective
from federation.aggregators.fedavg import FedAvg, Weights
from federation.exchange.schema import Schema, State
from federation.exchange.update import Update


class ControlVariates(ClientObjective):
    r"""Correct a site's gradient by $c - c_k$ and renew $c_k$ when its training is over.

    Args:
        common: The server's control $c$ by parameter; 0 where a name is absent.
        own: The site's control $c_k$ by parameter; 0 where a name is absent.
    """

    def __init__(self, common: State, own: State) -> None:
        self.common, self.own = common, own
        self._corrections: State = {}

    def gradient(self, name: str, parameter: Tensor, start: Tensor) -> Tensor | None:
        """Return $c - c_k$ of one parameter."""
        if name not in self._corrections:
            zero = torch.zeros(parameter.shape)
            difference = self.common.get(name, zero) - self.own.get(name, zero)
            self._corrections[name] = difference.to(parameter)
        return self._corrections[name]

    def extra(self, state: State, start: State, steps: int, lr: float) -> dict[str, Tensor]:
        r"""Return the renewed $c_k \leftarrow c_k - c + (w_g - w_k) / (K \cdot lr)$ of every trained parameter."""
        if steps == 0 or lr == 0:
            return {}
        renewed = {}
        for name, correction in self._corrections.items():
            moved = (start[name].double() - state[name].to(start[name].device).double()) / (steps * lr)
            renewed[name] = (moved.cpu() - correction.cpu()).float()
        return renewed


class Scaffold(FedAvg):
    r"""SCAFFOLD with option II for the site controls: sites step along $g + c - c_k$.

    The server keeps every site's control by name, so sites stay without memory and one that comes back after a pause
    goes on from its last control; this takes one copy of the model a site. $c$ of a tensor is the mean of the controls
    of all sites that ever trained it (the paper divides by the number of sites, which a federation with missing tasks
    has a different one of for each decoder). A renewed control travels in ``Update.extra`` under its parameter's name.

    The formula for $c_k$ assumes plain SGD at the site: $(w_g - w_k)/(K\,lr)$ is then the mean gradient. Under Adam it
    is the mean step instead, which is out of proportion to the gradients it corrects; use SGD.

    Args:
        weights: As in ``FedAvg``; the paper counts sites equally.
        lr: Server learning rate.

    Reference:
        Karimireddy et al., SCAFFOLD: Stochastic Controlled Averaging for Federated Learning, ICML 2020, algorithm 1.
    """

    def __init__(self, weights: Weights = "equal", lr: float = 1.0) -> None:
        super().__init__(weights)
        self.lr = lr
        self._common: State = {}
        self._controls: dict[str, State] = {}

    def start(self, state: State, schema: Schema) -> None:
        """Begin a round from the global state."""
        super().start(state, schema)
        self._renewed: dict[str, State] = {}

    def add(self, update: Update) -> None:
        """Take one site's update and its renewed controls of the blocks it trained."""
        super().add(update)
        sent = {key for _, key, _ in self._changes(update)}
        self._renewed[update.site] = {key: value for key, value in update.extra.items() if key in sent}

    def finish(self) -> State:
        """Return the next global state, and renew the controls."""
        for site, controls in self._renewed.items():
            self._controls[site] = self._controls.get(site, {}) | controls
        for key in sorted({key for controls in self._renewed.values() for key in controls}):
            owned = [self._controls[site][key] for site in sorted(self._controls) if key in self._controls[site]]
            self._common[key] = torch.stack(owned).double().mean(0).float()
        return super().finish()

    def step(self, key: str, mean: Tensor) -> Tensor:
        """Return the mean change, scaled by the server learning rate."""
        return mean.mul_(self.lr)

    def client_objective(self, site: str) -> ClientObjective:
        """Return a site's correction."""
        return ControlVariates(dict(self._common), dict(self._controls.get(site, {})))

    def state_dict(self) -> dict[str, Any]:
        """Return the common control and every site's."""
        return {"common": dict(self._common), "controls": {site: dict(own) for site, own in self._controls.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the controls up."""
        self._common = dict(state["common"])
        self._controls = {site: dict(own) for site, own in state["controls"].items()}
