"""An optimizer that fits a Gaussian to the weights: improved variational online Newton."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from federation.bayes.curvature import Curvature
from mtmedformer.errors import ConfigError


class OnlineNewton(Optimizer):
    r"""Improved variational online Newton (IVON): fits a Gaussian to the weights, at about the cost of Adam.

    The posterior is $\mathcal N(m, \sigma^2)$ with $\sigma^2 = 1 / (\lambda (h + \delta))$; the parameters hold its
    mean $m$. Each step draws $\theta = m + \sigma\varepsilon$, takes the gradient $\hat g$ there, and updates

    $$\begin{aligned}
      \hat h &= \hat g\, (\theta - m) / \sigma^2 &
      g &\leftarrow \beta_1 g + (1 - \beta_1)\, \hat g \\
      h &\leftarrow \beta_2 h + (1 - \beta_2)\, \hat h + \tfrac12 (1 - \beta_2)^2 (h - \hat h)^2 / (h + \delta) &
      m &\leftarrow m - \alpha\, \bigl(g / (1 - \beta_1^t) + \delta m\bigr) / (h + \delta)
    \end{aligned}$$

    $h$ estimates the diagonal of the Hessian, smoothed over $1 / (1 - \beta_2)$ steps, and $h + \delta$ stays above 0
    by construction. Implemented from the equations of the paper.

    The step needs a closure, since the gradient is taken at the drawn weights; Lightning passes one unless the
    precision is ``16-mixed``. With accumulated gradients only the last batch of a step uses the drawn weights, so do
    not use accumulation. A parameter without a gradient does not change, and neither does its state.

    Args:
        params: Parameters or groups of them.
        lr: Step length $\alpha$ of the mean; as $\alpha (h_0 + \delta)$ where ``rescale`` is on.
        betas: $\beta_1$ and $\beta_2$, in [0, 1).
        ess: Effective sample size $\lambda$: the training samples of the site, or fewer for a wider posterior.
        hess_init: $h_0$, above 0.
        weight_decay: $\delta$, above 0. In groups that override it (with 0, for norms and biases), the group's value
            pulls the mean towards 0, and this one stays in the curvature, which must be above 0.
        clip: Greatest magnitude of the factor of $\alpha$, per weight; ``None``: no limit.
        rescale: Multiply the learning rate by $h_0 + \delta$, so that the first steps are those of SGD.
        seed: Seed of the draws. Lightning's seed of the run (in a federation one per site and round) is mixed in.

    Raises:
        ConfigError: When a number is out of its range.

    Reference:
        Shen et al., Variational learning is effective for large deep networks, ICML 2024, algorithm 1.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.999),
        ess: float = 1e4,
        hess_init: float = 0.1,
        weight_decay: float = 1e-4,
        clip: float | None = None,
        rescale: bool = True,
        seed: int = 0,
    ) -> None:
        above_zero = {"ess": ess, "hess_init": hess_init, "weight_decay": weight_decay}
        for name, value in above_zero.items():
            if not value > 0:
                raise ConfigError(f"optimizer.{name}: {value} must be above 0")
        if lr < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ConfigError(f"optimizer: lr {lr} must be at least 0, betas {betas} in [0, 1)")
        if clip is not None and not clip > 0:
            raise ConfigError(f"optimizer.clip: {clip} must be above 0, or null")
        settings = {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay, "damping": weight_decay, "ess": ess}
        settings |= {"hess_init": hess_init, "clip": clip, "rescale": rescale, "seed": seed, "draws": 0}
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Draw weights, call the closure, which computes their gradients, and update mean and curvature.

        Raises:
            ConfigError: Without a closure.
        """
        if closure is None:
            raise ConfigError(
                "OnlineNewton computes gradients at drawn weights, so its step needs a closure; with Lightning use "
                "trainer.precision 32-true or bf16-mixed, not 16-mixed, and automatic optimisation"
            )
        means = self._draw()
        drawn = {}
        try:
            with torch.enable_grad():
                loss = closure()
        finally:
            for parameter, mean in means.items():
                drawn[parameter] = parameter - mean
                parameter.copy_(mean)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter in drawn:
                    self._update(parameter, parameter.grad, drawn[parameter], group)
        return loss

    def _draw(self) -> dict[Tensor, Tensor]:
        """Set the parameters to a draw from the posterior, and return their means."""
        means = {}
        for i, group in enumerate(self.param_groups):
            generators: dict[torch.device, torch.Generator] = {}
            for parameter in group["params"]:
                if not parameter.requires_grad:
                    continue
                if parameter.device not in generators:
                    generator = torch.Generator(parameter.device)
                    generators[parameter.device] = generator.manual_seed(_seed(group["seed"], i, group["draws"]))
                state = self.state[parameter]
                if not state:
                    state["step"] = 0
                    state["gradient"] = torch.zeros_like(parameter)
                    state["hessian"] = torch.full_like(parameter, group["hess_init"])
                noise = torch.empty_like(parameter).normal_(generator=generators[parameter.device])
                means[parameter] = parameter.clone()
                parameter.add_(noise * _sigma(state["hessian"], group))
            group["draws"] += 1
        return means

    def _update(self, parameter: Tensor, gradient: Tensor, offset: Tensor, group: dict[str, Any]) -> None:
        """Update one parameter's mean and curvature from the gradient at mean + offset."""
        state, (beta1, beta2), damping = self.state[parameter], group["betas"], group["damping"]
        h, rest = state["hessian"], 1 - beta2
        estimate = gradient * offset / _sigma(h, group).square()
        state["step"] += 1
        state["gradient"].lerp_(gradient, 1 - beta1)
        correction = (0.5 * rest**2) * (h - estimate).square() / (h + damping)
        h.mul_(beta2).add_(estimate, alpha=rest).add_(correction)
        mean_gradient = state["gradient"] / (1 - beta1 ** state["step"])
        step = (mean_gradient + group["weight_decay"] * parameter) / (h + damping)
        length = group["lr"] * (group["hess_init"] + damping if group["rescale"] else 1.0)
        if group["clip"] is not None:
            step = step.clamp(-group["clip"], group["clip"])
        parameter.sub_(step, alpha=length)


class NewtonCurvature(Curvature):
    """Read the curvature from the ``OnlineNewton`` optimizer of the site's training, at no extra cost.

    The optimizer's curvature needs about 1 / (1 - beta2) steps to leave its initial value, so keep its state between
    rounds (``federation.optimizer_state: keep``).

    Raises:
        ConfigError: At the end of training, when the site uses another optimizer.
    """

    @override
    def finish(
        self, module: nn.Module, loader: Iterable[Any] | None = None, trainer: L.Trainer | None = None
    ) -> dict[str, Tensor]:
        used: list[Any] = [] if trainer is None else trainer.optimizers
        optimizers = [optimizer for optimizer in used if isinstance(optimizer, OnlineNewton)]
        if not optimizers:
            raise ConfigError(
                "aggregator.curvature: NewtonCurvature reads the curvature of the optimizer OnlineNewton, but the "
                "sites use another one; set optimizer to federation.OnlineNewton, or use SquaredGradients"
            )
        curvature = {}
        for name, parameter in module.named_parameters():
            for optimizer in optimizers:
                state = optimizer.state.get(parameter)
                if state and state["step"] > 0:
                    curvature[name] = state["hessian"].detach().float().clamp(min=0).cpu()
        return curvature


def _sigma(hessian: Tensor, group: dict[str, Any]) -> Tensor:
    """Return the posterior's standard deviation of every weight."""
    damping, ess = float(group["damping"]), float(group["ess"])
    return (hessian + damping).mul_(ess).rsqrt_()


def _seed(seed: int, group: int, draw: int) -> int:
    """Return a seed for every draw of every group, the same on all processes of a run."""
    return zlib.crc32(f"{seed} {os.environ.get('PL_GLOBAL_SEED', '')} {group} {draw}".encode())
