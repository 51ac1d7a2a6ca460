"""How sure a site is of each weight: the curvature of its loss, measured while it trains."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from mtmedformer.errors import ConfigError

Granularity = Literal["element", "row", "tensor"]


class Curvature(ABC):
    """Measures the curvature of a site's loss about its weights; one copy serves one site for one round.

    Precision here means curvature, as in a Laplace approximation: a weight whose gradients are large is known well.
    """

    @abstractmethod
    def start(self, module: nn.Module) -> None:
        """Begin a site's local training; the module is on its device."""

    @abstractmethod
    def observe(self, module: nn.Module) -> None:
        """Look at the gradients of one optimiser step: unscaled, not clipped, of the site's own loss alone."""

    @abstractmethod
    def finish(self, module: nn.Module, loader: Iterable[Any] | None = None) -> dict[str, Tensor]:
        """Return the curvature by parameter name, each of the parameter's shape, at least 0, on the CPU.

        Args:
            module: The trained module, on its device.
            loader: The training batches, for estimators that need another look at them.
        """

    def fresh(self) -> Self:
        """Return a copy with the same settings for another site or round."""
        return copy.deepcopy(self)


class NoCurvature(Curvature):
    """Measures nothing, which turns the Bayesian merge into federated averaging."""

    def start(self, module: nn.Module) -> None:
        """Do nothing."""

    def observe(self, module: nn.Module) -> None:
        """Do nothing."""

    def finish(self, module: nn.Module, loader: Iterable[Any] | None = None) -> dict[str, Tensor]:
        """Return nothing."""
        return {}


class SquaredGradients(Curvature):
    r"""Running mean of the squared gradients of the site's own training; no further pass over the data.

    Near an optimum the square of a batch's mean gradient is the Fisher information over the batch size, so the mean is
    multiplied by the batch size where the loader tells it. A step in which a parameter has no gradient, because no
    label reached its head, does not count for it.

    Args:
        decay: Share of the old mean that stays at every step, in [0, 1); the start from zero is corrected as in Adam.

    Raises:
        ConfigError: When ``decay`` is out of range.
    """

    def __init__(self, decay: float = 0.95) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"curvature.decay: {decay} is outside [0, 1)")
        self.decay = decay
        self._mean: dict[str, Tensor] = {}
        self._weight: dict[str, Tensor] = {}

    def start(self, module: nn.Module) -> None:
        """Forget what was measured before."""
        self._mean, self._weight = {}, {}

    def observe(self, module: nn.Module) -> None:
        """Add the squared gradients of one step."""
        for name, parameter in module.named_parameters():
            if parameter.grad is None:
                continue
            square = parameter.grad.detach().float().square()
            if name not in self._mean:
                self._mean[name] = torch.zeros_like(square)
                self._weight[name] = torch.zeros((), device=square.device)
            share = torch.where(square.any(), 1 - self.decay, 0.0)  # stays on the device: no waiting for a GPU
            self._mean[name].lerp_(square, share)
            self._weight[name].lerp_(torch.ones_like(share), share)

    def finish(self, module: nn.Module, loader: Iterable[Any] | None = None) -> dict[str, Tensor]:
        """Return the running means, corrected for their start from zero."""
        batch = getattr(loader, "batch_size", None) or 1
        return {
            name: (mean * (batch / self._weight[name].clamp(min=1e-12))).cpu()
            for name, mean in self._mean.items()
            if float(self._weight[name]) > 0
        }


def normalise(
    curvature: dict[str, Tensor],
    granularity: Granularity = "row",
    rho: float = 0.5,
    low: float = 0.01,
    high: float = 100.0,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    r"""Bring curvature to one scale a tensor, $r = \mathrm{clip}(\lambda / \bar\lambda, low, high)^\rho$.

    The mean taken out, no site wins by a louder loss; tempered, none by a few very sharp weights.

    Args:
        curvature: By name, at least 0, any shape.
        granularity: ``element``; ``row`` takes the mean over everything but the first dimension; ``tensor`` leaves no
            difference within a tensor.
        rho: Power, in [0, 1]; 0 gives exactly 1 everywhere.
        low: Least relative curvature, before the power.
        high: Greatest relative curvature, before the power.

    Returns:
        Relative precision by name, float32 and above 0: of the tensor's shape, (rows, 1, …), or a scalar 1; and the
        mean $\bar\lambda$ by name. A tensor of zero curvature has 1 everywhere and the mean 0.

    Raises:
        ConfigError: When the granularity is unknown.
    """
    if granularity not in ("element", "row", "tensor"):
        raise ConfigError(f"granularity: {granularity!r} is none of 'element', 'row', 'tensor'")
    relative: dict[str, Tensor] = {}
    scale: dict[str, float] = {}
    for name, value in curvature.items():
        mean = value.double().mean()
        scale[name] = float(mean)
        if granularity == "tensor" or value.ndim == 0:
            relative[name] = torch.ones(())
            continue
        if granularity == "row" and value.ndim > 1:
            value = value.flatten(1).double().mean(1).reshape(-1, *[1] * (value.ndim - 1))
        ratio = value.double() / mean if mean > 0 else torch.ones_like(value, dtype=torch.float64)
        relative[name] = ratio.clamp_(low, high).pow_(rho).float()
    return relative, scale
