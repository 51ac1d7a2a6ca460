"""DP-SGD within a site: in every batch the gradient of each patient is clipped, and noise is added to the sum."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn

from federation.privacy.random_stream import normals
from mtmedformer.batch import Batch
from mtmedformer.errors import ConfigError
from mtmedformer.losses.hybrid import HybridLoss
from mtmedformer.losses.weighting import FixedWeighting, UncertaintyWeighting

BATCH_NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.LazyBatchNorm1d,
    nn.LazyBatchNorm2d,
    nn.LazyBatchNorm3d,
)
"""Every BatchNorm of torch; timm's variants are subclasses of these."""


@dataclass
class ExamplePrivacy:
    r"""DP-SGD: in every batch, clip the gradient of each unit and add Gaussian noise to the sum.

    $g = \bigl(\sum_u g_u \min(1, C / \lVert g_u \rVert) + \mathcal N(0, \sigma^2 C^2)\bigr) / U$ replaces the batch's
    gradient, over all trained weights and the $U$ units of the batch; $g_u$ is the gradient of the hybrid loss of the
    unit's own images in the batch. It takes one forward and backward pass per unit, which is slower than one per batch
    but correct for every loss, also for losses normalised over the batch.

    Args:
        clip: $C$, greatest L2 norm of the gradient of one unit.
        noise_multiplier: $\sigma$, standard deviation of the noise in units of ``clip``, above 0.
        unit: Protected unit: a ``patient`` with all images, or a single ``image``.

    Raises:
        ConfigError: When a value is out of range.

    Reference:
        Abadi et al., Deep Learning with Differential Privacy, CCS 2016, algorithm 1, without sampling; Kairouz et al.,
        Practical and Private (Deep) Learning without Sampling or Shuffling, ICML 2021, for training without sampling.
    """

    clip: float = 1.0
    noise_multiplier: float = 1.0
    unit: Literal["patient", "image"] = "patient"

    def __post_init__(self) -> None:
        for name, value in {"clip": self.clip, "noise_multiplier": self.noise_multiplier}.items():
            if not 0 < value < math.inf:
                raise ConfigError(f"privacy.examples.{name} is {value}; give a number above 0")
        if self.unit not in ("patient", "image"):
            raise ConfigError(f"privacy.examples.unit is {self.unit!r}; choose patient or image")


class PrivateGradients:
    """Replace a module's gradients by clipped and noised ones for one round of local training.

    Args:
        settings: Clip and noise.
        key: Key of the noise.
        label: Label of this site and round, unique under the same key.
    """

    def __init__(self, settings: ExamplePrivacy, key: bytes, label: str) -> None:
        self.settings, self.key, self.label = settings, key, label
        self.batches = 0
        self._taken: Counter[str] = Counter()
        self._gradients: list[Tensor] = []

    @property
    def releases(self) -> int:
        """Greatest number of batches that one unit contributed to.

        A noised gradient without the unit depends on it only through earlier ones, so it does not count as a release.
        """
        return max(self._taken.values(), default=0)

    def attach(self, module: L.LightningModule, trainer: L.Trainer) -> None:
        """Replace ``training_step`` and ``backward`` of a module under automatic optimisation.

        Raises:
            ConfigError: When the Trainer scales losses, or the module uses manual optimisation.
        """
        if trainer.precision == "16-mixed":
            raise ConfigError(
                "privacy.examples: 16-mixed scales the loss but not the noised gradients; set "
                "federation.site_trainer.precision to bf16-mixed or 32-true"
            )
        if not module.automatic_optimization:
            raise ConfigError("privacy.examples needs automatic optimisation, and this module uses manual optimisation")
        step = module.training_step

        def training_step(batch: Any, batch_idx: int) -> Tensor:
            return self._step(module, step, batch, batch_idx)

        def backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            for parameter, gradient in zip(_trained(module), self._gradients, strict=True):
                gradient = gradient.to(parameter.dtype) / trainer.accumulate_grad_batches
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            self._gradients = []

        module.training_step = training_step  # type: ignore[method-assign]
        module.backward = backward  # type: ignore[method-assign]

    def _step(self, module: L.LightningModule, step: Any, batch: Any, batch_idx: int) -> Tensor:
        """Compute the noised gradient of a batch; return the mean loss for logging."""
        if not isinstance(batch, Batch):
            raise ConfigError(
                f"privacy.examples: a batch is a {type(batch).__name__}, without patient identifiers; use a Batch"
            )
        parameters = _trained(module)
        total = [torch.zeros_like(parameter) for parameter in parameters]
        groups = self._units(batch)
        losses = []
        for unit, rows in groups.items():
            self._taken[unit] += 1
            loss = _loss(step(_rows(batch, rows), batch_idx))
            losses.append(loss.detach())
            if loss.requires_grad:
                add_clipped(total, torch.autograd.grad(loss, parameters, allow_unused=True), self.settings.clip)
        width = self.settings.noise_multiplier * self.settings.clip
        for i, gradient in enumerate(total):
            noise = normals(self.key, f"{self.label}|{self.batches}|{i}", tuple(gradient.shape)) * width
            gradient.add_(noise.to(gradient)).div_(len(groups))
        self.batches += 1
        self._gradients = total
        return torch.stack(losses).mean()

    def _units(self, batch: Batch) -> dict[str, list[int]]:
        """Return the rows of a batch by patient or image."""
        groups: dict[str, list[int]] = {}
        for row, meta in enumerate(batch.meta):
            groups.setdefault(meta.patient if self.settings.unit == "patient" else meta.id, []).append(row)
        return groups


def add_clipped(total: list[Tensor], gradients: tuple[Tensor | None, ...], clip: float) -> None:
    """Add a gradient to a sum in place, scaled down to an L2 norm of at most ``clip``; skip it if it is not finite."""
    known = [gradient for gradient in gradients if gradient is not None]
    if not known:
        return
    norm = float(torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) for g in known]).norm())
    if not math.isfinite(norm):
        return
    scale = min(1.0, clip / norm) if norm > 0 else 1.0
    for sum_, gradient in zip(total, gradients, strict=True):
        if gradient is not None:
            sum_.add_(gradient, alpha=scale)


def refuse_batch_norm(module: nn.Module, key: str, otherwise: str = "") -> None:
    """Refuse BatchNorm, which mixes the images of a batch and keeps statistics of them that no noise covers.

    Raises:
        ConfigError: When there is such a layer.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, BATCH_NORMS):
            raise ConfigError(
                f"{key}: {name} is a {type(layer).__name__}, whose statistics of the images no noise covers; choose an "
                f"encoder without BatchNorm{' ' if otherwise else ''}{otherwise}"
            )


def refuse_coupled_losses(module: nn.Module, distributed: bool) -> None:
    """Refuse settings under which per-patient gradients would be wrong.

    Raises:
        ConfigError: When tasks' gradients are aggregated, when the weights of the tasks are computed from images, or
            when several processes train a site together.
    """
    if distributed:
        raise ConfigError("privacy.examples: federation.placement=ddp averages gradients without it; choose per_rank")
    loss = dict(module.named_children()).get("loss")
    if not isinstance(loss, HybridLoss):
        return
    weighting = loss.weighting
    fixed = isinstance(weighting, FixedWeighting) and not weighting.normalise
    if not fixed and not isinstance(weighting, UncertaintyWeighting):
        raise ConfigError(
            f"privacy.examples: model.loss.weighting {type(weighting).__name__} computes weights from the "
            "images, without noise; set it to FixedWeighting with normalise: false, or to UncertaintyWeighting"
        )


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _rows(batch: Batch, rows: list[int]) -> Batch:
    index = torch.tensor(rows, device=batch.image.device)
    targets = {name: target[index] for name, target in batch.targets.items()}
    return Batch(batch.image[index], targets, [batch.meta[row] for row in rows])


def _loss(output: Any) -> Tensor:
    loss = output["loss"] if isinstance(output, dict) else output
    if not isinstance(loss, Tensor):
        raise ConfigError("privacy.examples: training_step returned no loss")
    return loss
