"""SCAFFOLD: control variates that correct the drift of local steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from federation.aggregators.base import SiteObjective
from federation.aggregators.fedavg import FedAvg, Weights
from federation.aggregators.server_step import ServerStep
from federation.exchange.schema import Schema, State
from federation.exchange.update import Update


class ControlVariates(SiteObjective):
    r"""Add $c - c_k$ to a site's gradient and renew $c_k$ after its training.

    Args:
        common: The server's control $c$ by parameter; 0 where a name is absent.
        own: The site's control $c_k$ by parameter; 0 where a name is absent.
    """

    def __init__(self, common: State, own: State) -> None:
        self.common, self.own = common, own
        self._corrections: State = {}

    @override
    def gradient(self, name: str, parameter: Tensor, start: Tensor) -> Tensor | None:
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

    The server keeps every site's control by name, so sites need no memory, and a site that returns after a pause
    continues from its last control. This takes one copy of the model per site. $c$ of a tensor is the mean of the
    controls of all sites that ever trained it; the paper divides by the number of sites, which with missing tasks
    differs between decoders. A renewed control is sent in ``Update.extra`` under its parameter's key.

    The formula for $c_k$ assumes plain SGD at the site: $(w_g - w_k)/(K\,lr)$ is then the mean gradient. Under Adam it
    is the mean step, which is not on the scale of the gradients; use SGD.

    Args:
        weights: As in ``FedAvg``; the paper weights sites equally.
        lr: Server learning rate.

    Reference:
        Karimireddy et al., SCAFFOLD: Stochastic Controlled Averaging for Federated Learning, ICML 2020, algorithm 1.
    """

    def __init__(self, weights: Weights = "equal", lr: float = 1.0) -> None:
        super().__init__(weights)
        self.lr = lr
        self.server = ServerStep(lr)
        self._common: State = {}
        self._controls: dict[str, State] = {}

    @override
    def start(self, state: State, schema: Schema) -> None:
        super().start(state, schema)
        self._renewed: dict[str, State] = {}

    @override
    def add(self, update: Update) -> None:
        changes = self.sums.receive(update)
        for block, key, delta in changes:
            self.sums.add(key, delta, self.weight(update.site, block, key))
        sent = {key for _, key, _ in changes}
        self._renewed[update.site] = {key: value for key, value in update.extra.items() if key in sent}

    @override
    def finish(self) -> State:
        for site, controls in self._renewed.items():
            self._controls[site] = self._controls.get(site, {}) | controls
        for key in sorted({key for controls in self._renewed.values() for key in controls}):
            owned = [self._controls[site][key] for site in sorted(self._controls) if key in self._controls[site]]
            self._common[key] = torch.stack(owned).double().mean(0).float()
        return super().finish()

    @override
    def site_objective(self, site: str) -> SiteObjective:
        return ControlVariates(dict(self._common), dict(self._controls.get(site, {})))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"common": dict(self._common), "controls": {site: dict(own) for site, own in self._controls.items()}}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._common = dict(state["common"])
        self._controls = {site: dict(own) for site, own in state["controls"].items()}
