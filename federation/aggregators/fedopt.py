"""Server optimisers: the sites' mean change is a pseudo-gradient that momentum, Adam or Yogi turns into a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from federation.aggregators.fedavg import FedAvg, Weights
from federation.exchange.schema import State


class FedAvgM(FedAvg):
    r"""FedAvg with momentum on the server: $m \leftarrow \beta m + \bar\Delta$, $w \leftarrow w + \eta m$.

    With ``lookahead`` the sites begin the round at $w + \eta \beta m$, where the momentum alone would lead, and the
    server adds $\eta \bar\Delta$ to that: the same step, but what the sites say of it is measured at its end and not at
    its start (Nesterov), so that a long momentum is put right before it overshoots. That is FedACG without its pull.

    Momentum belongs to one tensor and rests in rounds in which nobody sends it. It adds one copy of the model to the
    memory.

    Args:
        momentum: $\beta$ in [0, 1); 0 is FedAvg.
        lr: Server learning rate $\eta$.
        weights: As in ``FedAvg``.
        lookahead: Whether the sites begin where the momentum leads.

    Reference:
        Hsu et al., Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification, 2019;
        Kim et al., Communication-Efficient Federated Learning with Accelerated Client Gradient, CVPR 2024; Sutskever
        et al., On the importance of initialization and momentum in deep learning, ICML 2013, equation 3.
    """

    def __init__(
        self, momentum: float = 0.9, lr: float = 1.0, weights: Weights = "num_examples", lookahead: bool = False
    ) -> None:
        super().__init__(weights)
        self.momentum, self.lr, self.lookahead = momentum, lr, lookahead
        self._moments: State = {}
        self._untouched: State = {}

    def starting_state(self, state: State) -> State:
        """Return where the momentum leads from the global state, with ``lookahead``."""
        if not self.lookahead or self.momentum == 0:
            return state
        self._untouched = {key: state[key] for key in self._moments}
        moved = {
            key: state[key].double().add_(value, alpha=self.lr * self.momentum).to(state[key].dtype)
            for key, value in self._moments.items()
        }
        return state | moved

    def untouched_state(self) -> State:
        """Return the pre-round values of tensors that lookahead moved but no site updated."""
        untouched, self._untouched = self._untouched, {}
        return untouched

    def step(self, key: str, mean: Tensor) -> Tensor:
        """Return the server's change from where the sites began, once the momentum has taken a mean change in.

        The momentum counts as it is kept, rounded, so that a resumed run takes the same step.
        """
        if self.momentum == 0:
            return mean.mul_(self.lr)
        self._untouched.pop(key, None)
        kept = self._moments.get(key)
        gathered = mean if kept is None else mean.add(kept, alpha=self.momentum)
        self._moments[key] = gathered.float()
        return (mean if self.lookahead else self._moments[key].double()).mul_(self.lr)

    def state_dict(self) -> dict[str, Any]:
        """Return the momentum of every tensor."""
        return {"moments": dict(self._moments)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the momentum up."""
        self._moments = dict(state["moments"])


class FedAdam(FedAvg):
    r"""Adam on the server: $w \leftarrow w + \eta\, m / (\sqrt v + \tau)$, without bias correction, as in the paper.

    $m \leftarrow \beta_1 m + (1 - \beta_1) \bar\Delta$ and $v \leftarrow \beta_2 v + (1 - \beta_2) \bar\Delta^2$, from
    $m = 0$, $v = \tau^2$. The moments belong to one tensor, rest in rounds in which nobody sends it, and add two copies
    of the model to the memory.

    Args:
        lr: Server learning rate $\eta$; the paper tunes it between 0.001 and 1 together with ``tau``.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        tau: Adaptivity; far above the size of a change it makes every step a plain one of $\eta/\tau$.
        weights: As in ``FedAvg``.

    Reference:
        Reddi et al., Adaptive Federated Optimization, ICLR 2021, algorithm 2.
    """

    def __init__(
        self,
        lr: float = 0.01,
        beta1: float = 0.9,
        beta2: float = 0.99,
        tau: float = 1e-3,
        weights: Weights = "num_examples",
    ) -> None:
        super().__init__(weights)
        self.lr, self.beta1, self.beta2, self.tau = lr, beta1, beta2, tau
        self._first: State = {}
        self._second: State = {}

    def step(self, key: str, mean: Tensor) -> Tensor:
        """Return the adaptive step for a mean change."""
        first, second = self._first.get(key), self._second.get(key)
        m = mean * (1 - self.beta1)
        if first is not None:
            m.add_(first, alpha=self.beta1)
        v = torch.full_like(mean, self.tau**2) if second is None else second.double()
        v = self.second_moment(v, mean.square())
        self._first[key], self._second[key] = m.float(), v.float()
        root = self._second[key].double().sqrt_().add_(self.tau)
        return self._first[key].double().mul_(self.lr).div_(root)

    def second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        """Return the second moment after one more squared change; float64."""
        return v.mul_(self.beta2).add_(square, alpha=1 - self.beta2)

    def state_dict(self) -> dict[str, Any]:
        """Return both moments of every tensor."""
        return {"first": dict(self._first), "second": dict(self._second)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take both moments up."""
        self._first, self._second = dict(state["first"]), dict(state["second"])


class FedYogi(FedAdam):
    r"""FedAdam with Yogi's second moment.

    $v \leftarrow v - (1 - \beta_2) \bar\Delta^2\, \mathrm{sign}(v - \bar\Delta^2)$
    grows and shrinks by the square of the change at most, so one wild round does not silence the next ones.
    Arguments and reference are those of ``FedAdam``.
    """

    def second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        """Return the second moment after one more squared change; float64."""
        return v.sub_((v - square).sign_().mul_(square), alpha=1 - self.beta2)
