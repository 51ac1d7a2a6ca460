"""Weightings that turn the raw losses of the tasks into the terms of one sum.

Every weighting obeys the partial-label law: a task without a labelled sample in the batch contributes nothing and
leaves its part of the state as it was. State lives in buffers or parameters, one entry per task in sorted order of the
task names, so that a resumed run goes on with the same weights. The processes exchange nothing: under DDP each rank
uses its own losses, and the broadcast of buffers keeps the state of rank 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor, nn
from torch.optim.adam import adam
from torchjd.scalarization import UW
from typing_extensions import override

from mtmedformer.errors import ConfigError
from mtmedformer.storage.constructor_arguments import RecordsArguments


class Weighting(RecordsArguments, nn.Module, ABC):
    """Base of modules that weight the losses of a batch; ``HybridLoss`` multiplies them by the user's weights and adds.

    Attributes:
        aggregates_gradients: Whether ``aggregate`` must fill the gradients of the shared parameters.
        needs_update: Whether ``update`` must be called after the optimiser step with the losses of the same batch.
        needs_positive: Whether a negative loss is refused.
    """

    aggregates_gradients: bool = False
    needs_update: bool = False
    needs_positive: bool = True

    def build(self, tasks: Sequence[str]) -> None:
        """Create the state for these tasks; called once, before any weight is loaded."""

    @abstractmethod
    def forward(self, losses: Tensor, present: Tensor) -> Tensor:
        """Weigh the losses of one batch. State moves only in training mode.

        Args:
            losses: float (n,), raw losses in the order of ``build``, 0 where absent.
            present: bool (n,), at least one True: which tasks have a labelled sample.

        Returns:
            float (n,), terms of the sum, 0 where absent, all connected to ``losses``.
        """

    @abstractmethod
    def factors(self) -> Tensor:
        """Return the current factor of each loss's gradient, float (n,), detached."""

    def update(self, losses: Tensor, present: Tensor) -> None:
        """Update the state from the losses of the same batch after the optimiser step (where ``needs_update``)."""

    def on_epoch_end(self) -> None:
        """End an epoch of training."""


class FixedWeighting(Weighting):
    """Divide each loss by its scale at the start of training, so that weights of 1:1:1 mean equal parts.

    The scale of a task is the mean of its first ``warmup`` non-zero losses: a running mean until then (the first term
    is exactly 1), frozen afterwards. Without ``normalise`` the losses are added as they are.

    Args:
        normalise: Whether to divide by the scale.
        warmup: Labelled batches of a task before its scale is frozen. A scale below 0.001 counts as 0.001.
    """

    FLOOR = 1e-3

    mean: Tensor
    seen: Tensor

    def __init__(self, normalise: bool = True, warmup: int = 20) -> None:
        super().__init__()
        if warmup < 1:
            raise ConfigError(f"loss.weighting.warmup is {warmup}; it must be at least 1 batch")
        self.normalise = normalise
        self.warmup = warmup
        self.needs_positive = normalise

    @override
    def build(self, tasks: Sequence[str]) -> None:
        """Create the running means."""
        self.register_buffer("mean", torch.zeros(len(tasks)))
        self.register_buffer("seen", torch.zeros(len(tasks), dtype=torch.long))

    @override
    def forward(self, losses: Tensor, present: Tensor) -> Tensor:
        """Return the losses over their scales."""
        if self.training:
            new = present & (self.seen < self.warmup) & (losses.detach() > 0)
            self.seen += new
            self.mean += torch.where(new, (losses.detach() - self.mean) / self.seen.clamp(min=1), 0.0)
        return losses * self.factors()

    @override
    def factors(self) -> Tensor:
        """Return one over each scale; 1 for a task not seen yet."""
        if not self.normalise:
            return torch.ones_like(self.mean)
        return torch.where(self.seen > 0, 1 / self.mean.clamp(min=self.FLOOR), 1.0)


class UncertaintyWeighting(Weighting):
    r"""Learn one log-variance $s$ per task: $\frac12 e^{-s} L + \frac12 s$, over the tasks of the batch.

    For a constant loss the optimum is $s = \log L$. The sum may be negative. The log-variances are parameters: the
    optimiser must have them, without weight decay (``no_weight_decay``).

    Reference:
        Kendall, Gal, Cipolla, Multi-Task Learning Using Uncertainty to Weigh Losses, CVPR 2018; torchjd's ``UW``.
    """

    @override
    def build(self, tasks: Sequence[str]) -> None:
        """Create the log-variances, at 0."""
        self.uncertainty = nn.ModuleDict({task: UW(1) for task in tasks})

    @override
    def forward(self, losses: Tensor, present: Tensor) -> Tensor:
        """Return the terms of the tasks that are present."""
        terms = torch.stack([uw(losses[i : i + 1]) for i, uw in enumerate(self.uncertainty.values())])
        return torch.where(present, terms, 0.0)

    @override
    def factors(self) -> Tensor:
        """Return half the precisions."""
        return 0.5 * torch.exp(-torch.cat([p.detach() for p in self.uncertainty.parameters()]))


class DynamicWeightAverage(Weighting):
    r"""Give more weight to tasks whose loss fell less between the last two epochs.

    $\lambda_k = K \,\mathrm{softmax}_k(r_k / T)$ with $r_k$ the mean loss of the last epoch over that of the one
    before, 1 until both exist. Means are over the batches that label the task. A task never labelled takes no part: it
    has $\lambda = 1$ and does not count in $K$. An epoch that does not label a task leaves its history as it was.

    Args:
        temperature: $T$; larger makes the weights more alike.

    Reference:
        Liu, Johns, Davison, End-to-End Multi-Task Learning with Attention, CVPR 2019, eq. 7. Written out here because
        torchjd's ``DWA`` keeps no state across resume and cannot miss a task.
    """

    total: Tensor
    batches: Tensor
    last: Tensor
    before: Tensor

    def __init__(self, temperature: float = 2.0) -> None:
        super().__init__()
        if temperature <= 0:
            raise ConfigError(f"loss.weighting.temperature is {temperature}; it must be above 0")
        self.temperature = temperature

    @override
    def build(self, tasks: Sequence[str]) -> None:
        """Create the sums of the epoch and the means of the last two (NaN: none yet)."""
        self.register_buffer("total", torch.zeros(len(tasks)))
        self.register_buffer("batches", torch.zeros(len(tasks)))
        self.register_buffer("last", torch.full((len(tasks),), torch.nan))
        self.register_buffer("before", torch.full((len(tasks),), torch.nan))

    @override
    def forward(self, losses: Tensor, present: Tensor) -> Tensor:
        """Return the losses times the epoch's weights."""
        if self.training:
            self.total += torch.where(present, losses.detach(), 0.0)
            self.batches += present
        return losses * self.factors()

    @override
    def factors(self) -> Tensor:
        """Return the weights of the current epoch; those of tasks with a history add up to their number."""
        known = ~self.last.isnan()
        rate = torch.where(self.before > 0, self.last / self.before, 1.0)  # NaN > 0 is False
        share = torch.softmax((rate / self.temperature).masked_fill(~known, -torch.inf), dim=0)
        return torch.where(known, known.sum() * share, 1.0)

    @override
    def on_epoch_end(self) -> None:
        """Move the means of the epoch into the history."""
        seen = self.batches > 0
        self.before.copy_(torch.where(seen, self.last, self.before))
        self.last.copy_(torch.where(seen, self.total / self.batches, self.last))
        self.total.zero_()
        self.batches.zero_()


class RandomWeighting(Weighting):
    """Draw weights anew for every batch: the softmax of normal numbers over the tasks of the batch (they add up to 1).

    Args:
        seed: Seed of the draws; the n-th draw of a task depends on the seed, n and the task's name alone.

    Reference:
        Lin et al., Reasonable Effectiveness of Random Weighting, TMLR 2022, algorithm 2.
    """

    needs_positive = False

    draws: Tensor
    drawn: Tensor

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed

    @override
    def build(self, tasks: Sequence[str]) -> None:
        """Create the counter of draws."""
        self.tasks = tuple(tasks)
        self.register_buffer("draws", torch.zeros((), dtype=torch.long))
        self.register_buffer("drawn", torch.full((len(tasks),), 1 / len(tasks)))

    @override
    def forward(self, losses: Tensor, present: Tensor) -> Tensor:
        """Return the losses times this batch's weights; in evaluation equal weights."""
        if self.training:
            seeds = (stream(self.seed, int(self.draws), task) for task in self.tasks)
            logits = torch.cat([torch.randn(1, generator=torch.Generator().manual_seed(s)) for s in seeds])
            logits = logits.to(losses.device)
            share = torch.softmax(logits.masked_fill(~present, -torch.inf), dim=0)
            self.drawn.copy_(torch.where(present, share, self.drawn))
            self.draws += 1
            return losses * share
        return losses / present.sum()

    @override
    def factors(self) -> Tensor:
        """Return the weights drawn last for each task."""
        return self.drawn.clone()


class FAMOWeighting(Weighting):
    r"""Let all losses fall at one rate: $c \sum_i z_i \log L_i$, $z$ learned, $c = 1 / \sum_i z_i / L_i$.

    ``update`` needs the losses of the same batch after the optimiser step: one more forward a step. $z$ is a softmax
    over the tasks of the batch; a task that is absent keeps its logit and its Adam state. The sum may be negative.

    Args:
        lr: Learning rate of the logits.
        weight_decay: Weight decay of the logits.

    Reference:
        Liu et al., FAMO: Fast Adaptive Multitask Optimization, NeurIPS 2023, algorithm 2. Written out here because
        torchjd's ``FAMO`` loses its Adam state on resume and cannot miss a task; with every task present both agree.
    """

    EPSILON = 1e-8
    needs_update = True

    logits: Tensor
    first_moment: Tensor
    second_moment: Tensor
    steps: Tensor
    last: Tensor

    def __init__(self, lr: float = 0.025, weight_decay: float = 1e-3) -> None:
        super().__init__()
        if lr < 0 or weight_decay < 0:
            raise ConfigError(f"loss.weighting.lr ({lr}) and weight_decay ({weight_decay}) must not be negative")
        self.lr = lr
        self.weight_decay = weight_decay
        self._before: tuple[Tensor, Tensor] | None = None

    @override
    def build(self, tasks: Sequence[str]) -> None:
        """Create the logits, at 0, and their Adam state."""
        for name in ("logits", "first_moment", "second_moment", "steps"):
            self.register_buffer(name, torch.zeros(len(tasks)))
        self.register_buffer("last", torch.ones(len(tasks)))

    @override
    def forward(self, losses: Tensor, present: Tensor) -> Tensor:
        """Return the terms of the tasks that are present."""
        share, shifted = self._share(present), losses + self.EPSILON
        weight = share / (share / shifted.detach()).sum()
        if self.training:
            self._before = (losses.detach(), present)
            self.last.copy_(torch.where(present, weight / shifted.detach(), self.last))
        return torch.where(present, weight * torch.log(shifted), 0.0)

    @override
    def factors(self) -> Tensor:
        """Return the multipliers of the last batch of each task."""
        return self.last.clone()

    @torch.no_grad()
    def update(self, losses: Tensor, present: Tensor) -> None:
        """Raise the logits of the tasks whose log-loss fell least."""
        if self._before is None:
            raise RuntimeError("FAMOWeighting.update was called before the losses of the batch were weighted")
        before, labelled = self._before
        labelled = labelled & present
        fall = torch.log(before + self.EPSILON) - torch.log(losses + self.EPSILON)
        fall = torch.where(labelled, fall, 0.0)
        share = self._share(labelled)
        grad = share * (fall - (share * fall).sum())
        rows = labelled.nonzero().flatten().tolist()
        adam(
            params=[self.logits[i] for i in rows],
            grads=[grad[i] for i in rows],
            exp_avgs=[self.first_moment[i] for i in rows],
            exp_avg_sqs=[self.second_moment[i] for i in rows],
            max_exp_avg_sqs=[],
            state_steps=[self.steps[i] for i in rows],
            foreach=False,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=self.lr,
            weight_decay=self.weight_decay,
            eps=1e-8,
            maximize=False,
        )
        self._before = None

    def _share(self, present: Tensor) -> Tensor:
        return torch.softmax(self.logits.masked_fill(~present, -torch.inf), dim=0)


def stream(*key: int | str) -> int:
    """Return the seed of the random stream that belongs to a key, for example (seed, step)."""
    return int.from_bytes(blake2b(repr(key).encode(), digest_size=7).digest())
