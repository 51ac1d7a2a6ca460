"""Curvature of a site's loss about its weights, measured during its training, as the precision of the weights."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, Literal, Protocol, Self, runtime_checkable

import lightning as L
import torch
from torch import Tensor, nn
from typing_extensions import override

from mtmedformer.errors import ConfigError

Granularity = Literal["element", "row", "tensor"]


@runtime_checkable
class HasBatchSize(Protocol):
    """A loader with batches of one size, as ``torch.utils.data.DataLoader``; ``None`` where sizes differ."""

    batch_size: int | None


class Curvature(ABC):
    """Measure the curvature of a site's loss about its weights; one copy serves one site for one round.

    Precision here is curvature, as in a Laplace approximation: large gradients mean a well-determined weight.
    """

    def start(self, module: nn.Module) -> None:  # noqa: B027 (optional)
        """Start the measurement; called before a site's local training, with the module on its device.

        Optional: an estimator that reads nothing during training needs neither this method nor ``observe``.
        """

    def observe(self, module: nn.Module) -> None:  # noqa: B027 (optional)
        """Read the gradients before one optimizer step: unscaled, not clipped, of the site's own loss alone."""

    @abstractmethod
    def finish(
        self, module: nn.Module, loader: Iterable[Any] | None = None, trainer: L.Trainer | None = None
    ) -> dict[str, Tensor]:
        """Return the curvature by parameter name, each of the parameter's shape, at least 0, on the CPU.

        Args:
            module: The trained module, on its device.
            loader: The training batches, for estimators that need another pass over them.
            trainer: The site's Trainer, for estimators that need its optimizers or processes.
        """

    def fresh(self) -> Self:
        """Return a copy with the same settings for another site or round."""
        return copy.deepcopy(self)


class NoCurvature(Curvature):
    """Measure nothing, which turns the Bayesian merge into federated averaging."""

    @override
    def finish(
        self, module: nn.Module, loader: Iterable[Any] | None = None, trainer: L.Trainer | None = None
    ) -> dict[str, Tensor]:
        return {}


class SquaredGradients(Curvature):
    r"""Running mean of the squared gradients of the site's own training; no further pass over the data.

    Near an optimum the square of a batch's mean gradient is the Fisher information divided by the batch size, so the
    mean is multiplied by the loader's batch size, where it has one. A step in which a parameter has no gradient,
    because no label reached its head, does not count for it.

    Args:
        decay: Share of the old mean kept per step, in [0, 1); the start from zero is corrected as in Adam.

    Raises:
        ConfigError: When ``decay`` is out of range.
    """

    def __init__(self, decay: float = 0.95) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"curvature.decay: {decay} is outside [0, 1)")
        self.decay = decay
        self._mean: dict[str, Tensor] = {}
        self._weight: dict[str, Tensor] = {}

    @override
    def start(self, module: nn.Module) -> None:
        self._mean, self._weight = {}, {}

    @override
    def observe(self, module: nn.Module) -> None:
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

    @override
    def finish(
        self, module: nn.Module, loader: Iterable[Any] | None = None, trainer: L.Trainer | None = None
    ) -> dict[str, Tensor]:
        batch = (loader.batch_size if isinstance(loader, HasBatchSize) else None) or 1
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
    r"""Scale curvature to mean 1 per tensor and temper it, $r = \mathrm{clip}(\lambda / \bar\lambda, low, high)^\rho$.

    Without the mean, the scale of a site's loss has no effect on its weight in the merge; tempering limits the effect
    of a few weights with very large curvature.

    Args:
        curvature: By name, at least 0, any shape.
        granularity: ``element``; ``row`` averages over all dimensions but the first; ``tensor`` gives 1 everywhere.
        rho: Power, in [0, 1]; 0 gives exactly 1 everywhere.
        low: Least relative curvature, before the power.
        high: Greatest relative curvature, before the power.

    Example:
        >>> relative, scale = normalise({"w": torch.tensor([1.0, 3.0])}, "element", rho=1.0)
        >>> relative["w"], scale["w"]
        (tensor([0.5000, 1.5000]), 2.0)

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
