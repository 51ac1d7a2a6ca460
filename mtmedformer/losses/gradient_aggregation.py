"""Weightings that combine the gradients of the tasks instead of their losses, through torchjd."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import isabstract, isclass, signature
from typing import Any, cast

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor, nn
from torchjd import Stateful, aggregation
from torchjd.aggregation import Aggregator
from torchjd.autojac import backward, jac_to_grad
from torchjd.linalg import DualConeProjector
from typing_extensions import override

from mtmedformer.errors import ConfigError
from mtmedformer.losses.weighting import Weighting, stream


class GradientAggregation(Weighting):
    """Combine the tasks' gradients of the shared parameters instead of their losses, by an aggregator of torchjd.

    One backward pass per task through the encoder. With accumulated batches, the mean of the batches' aggregates.
    Single device, no AMP gradient scaler, no DDP: its hooks do not cover these gradients. A batch that labels one task,
    and every head, gets plain gradients.

    Args:
        aggregator: Name of a class of ``torchjd.aggregation`` (``UPGrad``, ``PCGrad``, ``MGDA``, ``CAGrad``, ``IMTLG``
            …), or an aggregator.
        options: Arguments of that class, for example ``{c: 0.5}`` for ``CAGrad``.
        seed: Seed of random aggregators (``PCGrad``'s order of tasks); step n depends only on the seed and n.

    Raises:
        ConfigError: Unknown name, missing option or package, or an aggregator with state, which a batch without one of
            the tasks or a resumed run would break.
    """

    aggregates_gradients = True
    needs_positive = False

    draws: Tensor
    last: Tensor

    def __init__(
        self, aggregator: str | Aggregator = "UPGrad", options: dict[str, Any] | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        self.aggregator = _aggregator(aggregator, options or {}) if isinstance(aggregator, str) else aggregator
        if isinstance(self.aggregator, Stateful):
            raise ConfigError(
                f"loss.weighting.aggregator: {aggregator} keeps a state over steps that a batch without one of the "
                f"tasks would break; use one of {', '.join(choices())}"
            )
        self.seed = seed

    @override
    def build(self, tasks: Sequence[str]) -> None:
        """Create the counter of steps."""
        self.register_buffer("draws", torch.zeros((), dtype=torch.long))
        self.register_buffer("last", torch.ones(len(tasks)))

    @override
    def forward(self, losses: Tensor, present: Tensor) -> Tensor:
        """Return the losses unchanged: the value to log, not the one to differentiate."""
        return losses

    @override
    def factors(self) -> Tensor:
        """Return the weights the aggregator gave last to each task's gradient (1 where it has no such weights)."""
        return self.last.clone()

    def aggregate(self, losses: Tensor, present: Tensor, shared: Sequence[nn.Parameter], scale: float = 1.0) -> None:
        """Add the aggregate of the tasks' gradients to ``.grad`` of the shared parameters; frees the graph.

        Args:
            losses: float (n,), already multiplied by the user's weights.
            present: bool (n,), at least one True.
            shared: Parameters whose gradients are aggregated, each with ``requires_grad``.
            scale: Multiplies the aggregate.
        """
        rows = present.nonzero().flatten().tolist()
        # the pyramid's levels depend on one another, so the cut must be at the parameters, never at the features
        backward([losses[i] for i in rows], inputs=shared, parallel_chunk_size=1)
        accumulated = [p.grad for p in shared]
        for parameter in shared:
            parameter.grad = None
        devices = [losses.device] if losses.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(stream(self.seed, int(self.draws)))
            aggregator: Aggregator = self.aggregator if len(rows) > 1 else aggregation.Sum()
            weights = cast("Tensor | None", jac_to_grad(shared, aggregator))
        for parameter, before in zip(shared, accumulated, strict=True):
            grad = cast("Tensor", parameter.grad) * scale
            parameter.grad = grad if before is None else before + grad
        self.draws += 1
        if weights is not None:
            self.last[rows] = weights.detach().to(self.last)


class NNLSProjector(DualConeProjector):
    r"""Project gradients onto the dual cone of the tasks' gradients by non-negative least squares.

    For each row $u$ the weights solve $\min_v v^\top G v$ subject to $v \ge u$. With $G = L L^\top$ and $v = u + s$
    this is $\min_{s \ge 0} \lVert L^\top s + L^\top u \rVert$. It replaces torchjd's ``QuadprogProjector`` (quadprog is
    GPL, qpsolvers LGPL) and scales $G$ in the same way, so the weights agree to rounding.

    Args:
        norm_eps: Trace of $G$ below which all gradients count as 0.
        reg_eps: Value added to the diagonal of $G$ after it was divided by its trace.

    Reference:
        Quinton and Rey, Jacobian Descent for Multi-Objective Optimization, 2024, arXiv 2406.16232, proposition 1.
    """

    def __init__(self, norm_eps: float = 1e-4, reg_eps: float = 1e-4) -> None:
        self.norm_eps, self.reg_eps = norm_eps, reg_eps

    def __call__(self, U: Tensor, G: Tensor) -> Tensor:
        """Return the weights of the projections.

        Args:
            U: float (..., tasks), one vector per row.
            G: float (tasks, tasks), the Gramian of the tasks' gradients.
        """
        trace = G.trace()
        scaled = torch.zeros_like(G) if trace < self.norm_eps else G / trace
        scaled = scaled + self.reg_eps * torch.eye(len(G), dtype=G.dtype, device=G.device)
        upper = np.linalg.cholesky(scaled.T.detach().cpu().double().numpy()).T  # of the upper triangle
        rows = U.detach().cpu().double().reshape(-1, len(G)).numpy()
        weights = np.stack([row + nnls(upper, -upper @ row)[0] for row in rows]).reshape(U.shape)
        return torch.as_tensor(weights, device=G.device, dtype=G.dtype)


def choices() -> list[str]:
    """Return the names of the aggregators of torchjd that can be used."""
    every = ((name, getattr(aggregation, name)) for name in aggregation.__all__)
    return [
        name
        for name, cls in every
        if isclass(cls) and issubclass(cls, Aggregator) and not issubclass(cls, Stateful) and not isabstract(cls)
        if name != "WeightedAggregator" and name != "GramianWeightedAggregator"
    ]


def _aggregator(name: str, options: dict[str, Any]) -> Aggregator:
    cls = getattr(aggregation, name, None)
    if not (isclass(cls) and issubclass(cls, Aggregator)):
        raise ConfigError(f"loss.weighting.aggregator: {name!r} is unknown; choose one of {', '.join(choices())}")
    if "projector" in signature(cls).parameters:
        options = {"projector": NNLSProjector(), **options}
    try:
        made: Aggregator = cls(**options)
    except ImportError as error:
        raise ConfigError(f"loss.weighting.aggregator: {name} needs a missing package: {error}") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"loss.weighting.options do not fit {name}: {error}") from error
    return made
