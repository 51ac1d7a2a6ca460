"""FedAvg with a server optimizer: the sites' mean change takes the place of a gradient."""

from __future__ import annotations

from federation.aggregators.fedavg import FedAvg, Weights
from federation.aggregators.server_step import Adam, Momentum, Yogi


class FedAvgM(FedAvg):
    r"""FedAvg with momentum on the server: $m \leftarrow \beta m + \bar\Delta$, $w \leftarrow w + \eta m$.

    With ``lookahead`` the sites start the round at $w + \eta \beta m$, where the momentum alone would lead, and the
    server adds $\eta \bar\Delta$ to that. The step has the same length, but the sites measure their changes at its end
    and not at its start (Nesterov), so a long momentum is corrected before it overshoots. This is FedACG without its
    proximal term.

    Args:
        momentum: $\beta$ in [0, 1); 0 is FedAvg.
        lr: Server learning rate $\eta$.
        weights: As in ``FedAvg``.
        lookahead: Whether the sites start where the momentum leads.

    Example:
        >>> import torch
        >>> from federation.aggregators import merge
        >>> from federation.exchange.schema import Block, Schema
        >>> from federation.exchange.update import BlockUpdate, Update
        >>> schema = Schema((Block("encoder", ("w",)),), {"w": (1,)}, frozenset({"w"}), frozenset(), ())
        >>> update = Update("a", 0, "", "", {"encoder": BlockUpdate(10, {"w": torch.ones(1)})})
        >>> fedavgm, state = FedAvgM(momentum=0.5), {"w": torch.zeros(1)}
        >>> for _ in range(2):
        ...     state = merge(fedavgm, state, schema, [update])
        >>> state["w"]  # 1, then 1 + 0.5
        tensor([2.5000])

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
        self.server = Momentum(momentum, lr, lookahead)


class FedAdam(FedAvg):
    r"""FedAvg with Adam on the server: $w \leftarrow w + \eta\, m / (\sqrt v + \tau)$, without bias correction.

    Args:
        lr: Server learning rate $\eta$; the paper tunes it between 0.001 and 1 together with ``tau``.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        tau: Adaptivity $\tau$; far above the size of a change it makes every step a plain one of $\eta/\tau$.
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
        self.server = Adam(lr, beta1, beta2, tau)


class FedYogi(FedAdam):
    """FedAdam with Yogi's second moment (``server_step.Yogi``); arguments and reference are those of ``FedAdam``."""

    def __init__(
        self,
        lr: float = 0.01,
        beta1: float = 0.9,
        beta2: float = 0.99,
        tau: float = 1e-3,
        weights: Weights = "num_examples",
    ) -> None:
        super().__init__(lr, beta1, beta2, tau, weights)
        self.server = Yogi(lr, beta1, beta2, tau)
