"""Curvature as Fisher information, measured once after a site's local training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import lightning as L
import torch
from torch import Tensor, nn
from typing_extensions import override

from federation.bayes.curvature import Curvature
from mtmedformer.batch import IGNORE, Batch, ClassificationTarget, SegmentationTarget, Task
from mtmedformer.errors import ConfigError
from mtmedformer.metrics.calibration import class_target


@runtime_checkable
class HasHeads(Protocol):
    """A module with task heads, as ``MultiTaskModule``."""

    heads: nn.ModuleDict


class Fisher(Curvature):
    r"""Mean squared gradient of single samples after training, $\lambda_i = \mathbb E[(\partial_i \ell)^2]$.

    For classes, masks and grades $\ell$ is the log likelihood of labels drawn from the model's own predictions (the
    true Fisher information; given labels would measure the remaining slope of the loss), averaged over the known
    classes or pixels, as in the losses. Boxes and numbers have no likelihood to draw from: their loss with the given
    labels is used (the empirical Fisher). Tasks are summed with the weights of the hybrid loss. Only labelled tasks of
    a sample count, and a head's mean is over the samples labelled for it.

    It takes one forward and backward pass per sample, in evaluation mode. ``SquaredGradients`` takes no extra pass; use
    this one where few steps are trained, or where sites are far from their optimum.

    Args:
        samples: Greatest number of samples used, at least 1.
        seed: Seed of the drawn labels and of the order of a loader that shuffles.

    Raises:
        ConfigError: When ``samples`` is less than 1, there is no loader, or the module has no task heads.
    """

    def __init__(self, samples: int = 256, seed: int = 0) -> None:
        if samples < 1:
            raise ConfigError(f"curvature.samples: {samples} must be at least 1")
        self.samples, self.seed = samples, seed

    @override
    def finish(
        self, module: nn.Module, loader: Iterable[Any] | None = None, trainer: L.Trainer | None = None
    ) -> dict[str, Tensor]:
        if loader is None or not isinstance(module, HasHeads):
            raise ConfigError(
                "aggregator.curvature: Fisher needs the training batches and a module with task heads "
                "(MultiTaskModule); use SquaredGradients for other modules"
            )
        parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
        counts = dict.fromkeys(parameters, 0)
        training = {part: part.training for part in module.modules()}
        device = next(iter(parameters.values())).device
        module.eval()
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
            torch.manual_seed(self.seed)
            generator = torch.Generator().manual_seed(self.seed)
            for sample in self._labelled(loader):
                value = _surrogate(module, sample.to(device), generator)
                gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
                for name, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None:
                        sums[name] += gradient.float().square_()
                        counts[name] += 1
        for part, mode in training.items():
            part.training = mode
        counts = _over_processes(trainer, sums, counts)
        return {name: (sums[name] / count).cpu() for name, count in counts.items() if count > 0}

    def _labelled(self, loader: Iterable[Any]) -> Iterator[Batch]:
        """Yield single samples with a label for at least one task."""
        left = self.samples
        for batch in loader:
            for i in range(len(batch)):
                sample = batch.only(i)
                if any(bool(target.present.any()) for target in sample.targets.values()):
                    yield sample
                    left -= 1
                    if left == 0:
                        return


def _surrogate(module: Any, sample: Batch, generator: torch.Generator) -> Tensor:
    """Return the scalar whose gradient is squared: the weighted terms of the tasks that a sample is labelled for."""
    image = sample.image.to(next(module.parameters()).dtype)
    outputs = module(image)
    weights = module.loss.factors()
    size = (int(image.shape[-2]), int(image.shape[-1]))
    terms = []
    for name, head in module.heads.items():
        target = sample.targets.get(name)
        if target is None or not bool(target.present.any()) or weights[name] == 0:
            continue
        task: Task = head.task(name)
        if not task.probabilistic:
            term = torch.stack(list(head.loss(outputs[name], target).values())).sum()
        else:
            term = drawn_likelihood(
                head.predict(outputs[name], size), class_target(task, target), head.multi_label, generator
            )
        terms.append(weights[name] * term)
    return torch.stack(terms).sum() if terms else 0.0 * sum(p.sum() for p in module.encoder.parameters())


def drawn_likelihood(
    probabilities: Tensor,
    target: ClassificationTarget | SegmentationTarget,
    multi_label: bool,
    generator: torch.Generator,
) -> Tensor:
    """Return the mean log likelihood of labels drawn from the predictions, where the given ones are known.

    Args:
        probabilities: (B, K) or (B, K, H, W); over exclusive classes of a mask, background is what they leave of 1.
        target: The given labels; only their known places are used.
        multi_label: Whether classes are independent.
        generator: Draws the labels, on the CPU.
    """
    if isinstance(target, SegmentationTarget):
        known, background = target.masks != IGNORE, not multi_label
    else:
        known, background = ~target.labels.isnan(), False
    known = known & target.present.view(-1, *[1] * (known.ndim - 1))
    p = probabilities.clamp(1e-6, 1 - 1e-6)
    if multi_label:
        draw = torch.bernoulli(p.detach().cpu(), generator=generator).to(p.device)
        return torch.where(draw > 0, p.log(), (1 - p).log())[known].mean()
    if background:
        p = torch.cat([(1 - p.sum(1, keepdim=True)).clamp_min(1e-6), p], dim=1)
    rows = p.movedim(1, -1).flatten(0, -2)
    draw = torch.multinomial(rows.detach().cpu(), 1, generator=generator).to(p.device)
    return rows.gather(1, draw).log()[known.any(1).flatten()].mean()


def _over_processes(trainer: L.Trainer | None, sums: dict[str, Tensor], counts: dict[str, int]) -> dict[str, int]:
    """Sum the measurements over the processes that train a site together, in place; return the counts."""
    if trainer is None or trainer.world_size == 1:
        return counts
    for name, value in sums.items():
        sums[name] = trainer.strategy.reduce(value, reduce_op="sum")
    device = next(iter(sums.values())).device
    total = trainer.strategy.reduce(torch.tensor(list(counts.values()), device=device), reduce_op="sum")
    return dict(zip(counts, (int(n) for n in total.tolist()), strict=True))
