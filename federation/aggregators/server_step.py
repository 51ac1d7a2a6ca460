"""Server optimizers: turn the owners' mean change of each parameter into the server's step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from federation.exchange.schema import State


class ServerStep:
    r"""Step by the mean change times a learning rate, $w \leftarrow w + \eta \bar\Delta$.

    Args:
        lr: Server learning rate $\eta$.
    """

    def __init__(self, lr: float = 1.0) -> None:
        self.lr = lr

    def starting_state(self, state: State) -> State:
        """Return the state from which the sites start a round, given the global state (not changed)."""
        return state

    def step(self, key: str, mean: Tensor) -> Tensor:
        """Return the server's step of one parameter, from the state that the sites started at.

        Args:
            key: ``state_dict`` key of the parameter.
            mean: The owners' mean change, float64; may be overwritten.
        """
        return mean if self.lr == 1 else mean.mul_(self.lr)

    def untouched_state(self) -> State:
        """Return the pre-round values of tensors that ``starting_state`` moved but no site updated."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return what must survive a restart between rounds: tensors and plain containers only."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""


class Momentum(ServerStep):
    r"""Step with momentum, $m \leftarrow \beta m + \bar\Delta$, $w \leftarrow w + \eta m$.

    With ``lookahead`` the sites start at $w + \eta \beta m$ and the server adds $\eta \bar\Delta$ to that. The momentum
    of a tensor does not change in rounds in which no site sends it. It takes one copy of the model.

    Args:
        momentum: $\beta$ in [0, 1).
        lr: Server learning rate $\eta$.
        lookahead: Whether the sites start where the momentum alone would lead.

    Attributes:
        moments: $m$ by key, float32.

    Example:
        >>> server = Momentum(momentum=0.5)
        >>> [server.step("w", torch.ones(1, dtype=torch.float64)).item() for _ in range(3)]
        [1.0, 1.5, 1.75]
    """

    def __init__(self, momentum: float, lr: float = 1.0, lookahead: bool = False) -> None:
        super().__init__(lr)
        self.momentum, self.lookahead = momentum, lookahead
        self.moments: State = {}
        self._untouched: State = {}

    @override
    def starting_state(self, state: State) -> State:
        if not self.lookahead or self.momentum == 0:
            return state
        self._untouched = {key: state[key] for key in self.moments}
        moved = {
            key: state[key].double().add_(value, alpha=self.lr * self.momentum).to(state[key].dtype)
            for key, value in self.moments.items()
        }
        return state | moved

    @override
    def step(self, key: str, mean: Tensor) -> Tensor:
        if self.momentum == 0:
            return super().step(key, mean)
        self._untouched.pop(key, None)
        kept = self.moments.get(key)
        updated = mean if kept is None else mean.add(kept, alpha=self.momentum)
        self.moments[key] = updated.float()  # rounded before use, so that a resumed run takes the same step
        return (mean if self.lookahead else self.moments[key].double()).mul_(self.lr)

    @override
    def untouched_state(self) -> State:
        untouched, self._untouched = self._untouched, {}
        return untouched

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"moments": dict(self.moments)}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.moments = dict(state["moments"])


class Adam(ServerStep):
    r"""Step by Adam without bias correction, $w \leftarrow w + \eta\, m / (\sqrt v + \tau)$.

    $m \leftarrow \beta_1 m + (1 - \beta_1) \bar\Delta$ and $v \leftarrow \beta_2 v + (1 - \beta_2) \bar\Delta^2$, from
    $m = 0$, $v = \tau^2$. The moments of a tensor do not change in rounds in which no site sends it. They take two
    copies of the model.

    Args:
        lr: Server learning rate $\eta$.
        beta1: Decay of the first moment, in [0, 1).
        beta2: Decay of the second moment, in [0, 1).
        tau: Added to the root of the second moment, above 0.
    """

    def __init__(self, lr: float, beta1: float, beta2: float, tau: float) -> None:
        super().__init__(lr)
        self.beta1, self.beta2, self.tau = beta1, beta2, tau
        self._first: State = {}
        self._second: State = {}

    @override
    def step(self, key: str, mean: Tensor) -> Tensor:
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
        """Return the second moment after one more squared change; float64, may overwrite both."""
        return v.mul_(self.beta2).add_(square, alpha=1 - self.beta2)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"first": dict(self._first), "second": dict(self._second)}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._first, self._second = dict(state["first"]), dict(state["second"])


class Yogi(Adam):
    r"""Adam with Yogi's second moment, $v \leftarrow v - (1 - \beta_2) \bar\Delta^2\, \mathrm{sign}(v - \bar\Delta^2)$.

    The second moment changes by at most the square of the change, so one large change does not shorten later steps.
    """

    @override
    def second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        return v.sub_((v - square).sign_().mul_(square), alpha=1 - self.beta2)
