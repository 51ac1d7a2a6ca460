"""The hybrid loss: combine the losses of the tasks that a batch labels into one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Self

import torch
from torch import Tensor, nn

from mtmedformer.errors import ConfigError
from mtmedformer.losses.gradient_aggregation import GradientAggregation
from mtmedformer.losses.weighting import FixedWeighting, Weighting
from mtmedformer.storage.constructor_arguments import RecordsArguments


class HybridLoss(RecordsArguments, nn.Module):
    r"""Add the task losses as $\sum_t w_t\, f_t(L_t)$ over the tasks that the batch labels.

    $w_t$ are the user's weights and $f$ the weighting strategy. A task that is absent, or has weight 0, changes neither
    the value nor the strategy's state, and stays connected to the result with a zero gradient (DDP needs every
    parameter to take part). The sum depends on the strategy's state: log the raw losses and monitor those, or metrics.

    Args:
        weights: Weight of each task by its name, at least 0; tasks not named have weight 1.
        weighting: Strategy that brings the losses together; default ``FixedWeighting``.

    Example:
        >>> loss = HybridLoss(weights={"mask": 2.0}, weighting=FixedWeighting(normalise=False))
        >>> loss.build(["mask", "class"])
        >>> loss({"mask": torch.tensor(0.5), "class": torch.tensor(3.0)}, present={"mask": 4, "class": 0})
        tensor(1.)
    """

    weight: Tensor

    def __init__(self, weights: dict[str, float] | None = None, weighting: Weighting | None = None) -> None:
        super().__init__()
        self.weights = dict(weights or {})
        self.weighting = weighting or FixedWeighting()
        self.tasks: tuple[str, ...] = ()
        for task, weight in self.weights.items():
            if not 0 <= weight < float("inf"):
                raise ConfigError(f"loss.weights.{task} is {weight}; a weight is a number of at least 0 (0: leave out)")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Keep the precision of weights and running means where that of the model is converted."""

        def moved(tensor: Tensor) -> Tensor:
            converted = fn(tensor)
            return converted if converted.dtype == tensor.dtype else tensor.to(converted.device)

        return super()._apply(moved, recurse)  # type: ignore[no-untyped-call, no-any-return]

    @property
    def aggregates_gradients(self) -> bool:
        """Whether the training step must call ``backward`` of this module instead of the loss's own."""
        return self.weighting.aggregates_gradients

    @property
    def needs_update(self) -> bool:
        """Whether ``update`` must follow each optimiser step."""
        return self.weighting.needs_update

    def build(self, tasks: Sequence[str], dropped: Sequence[str] = ()) -> None:
        """Create the state for these tasks; called once, before any weight is loaded.

        Args:
            tasks: Names of the tasks to learn.
            dropped: Names of configured tasks that this run leaves out; their weights are allowed and unused.

        Raises:
            ConfigError: A weight names a task that does not exist, or every weight is 0.
        """
        for task in self.weights:
            if task not in {*tasks, *dropped}:
                close = get_close_matches(task, list(tasks), n=1)
                hint = f" (did you mean {close[0]!r}?)" if close else ""
                raise ConfigError(f"loss.weights.{task}: no such task{hint}; tasks are {', '.join(sorted(tasks))}")
        self.tasks = tuple(sorted(tasks))
        weight = torch.tensor([float(self.weights.get(task, 1.0)) for task in self.tasks])
        if not weight.any():
            raise ConfigError("loss.weights: every task has weight 0, so nothing would be learned")
        self.register_buffer("weight", weight, persistent=False)  # the configuration's, also when a run is resumed
        self.weighting.build(self.tasks)

    def forward(self, losses: dict[str, Tensor], present: dict[str, int]) -> Tensor:
        """Combine the losses of one batch.

        Args:
            losses: Raw loss of each task, scalars; a task may be left out.
            present: Number of labelled samples of each task in the batch; 0 or left out: absent.

        Returns:
            A scalar. With nothing present it is a zero that still depends on every loss.

        Raises:
            ConfigError: A present loss is NaN or infinite, or negative where the weighting cannot have that.
        """
        values, mask = self._gather(losses, present)
        if not self._any(present):
            return values.sum()
        terms: Tensor = self.weighting(values, mask)
        return (self.weight * terms).sum()

    def factors(self) -> dict[str, float]:
        """Return the current factor of each task's gradient (weight times strategy), for logging."""
        return dict(zip(self.tasks, (self.weight * self.weighting.factors()).tolist(), strict=True))

    def update(self, losses: dict[str, Tensor], present: dict[str, int]) -> None:
        """Pass the losses of the same batch after the optimiser step to the weighting (where ``needs_update``)."""
        if self._any(present):
            self.weighting.update(*self._gather({t: v.detach() for t, v in losses.items()}, present))

    def on_epoch_end(self) -> None:
        """End the epoch of the weighting."""
        self.weighting.on_epoch_end()

    def backward(
        self,
        losses: dict[str, Tensor],
        present: dict[str, int],
        shared: Sequence[nn.Parameter],
        own: Sequence[nn.Parameter],
        scale: float = 1.0,
    ) -> None:
        """Add gradients to ``.grad``: aggregated over the tasks for shared parameters, plain for the heads' own.

        Args:
            losses: As in ``forward``, with their graph, which is freed.
            present: As in ``forward``.
            shared: Parameters that several tasks use (the encoder's).
            own: All other parameters.
            scale: Multiplies the gradients; one over the number of accumulated batches. The losses are aggregated
                unscaled, because not every aggregator is proportional to them (FairGrad).
        """
        if not isinstance(self.weighting, GradientAggregation):
            raise RuntimeError("HybridLoss.backward is for gradient aggregators only: call forward(...).backward()")
        values, mask = self._gather(losses, present)
        values = values * self.weight
        if not self._any(present):
            values.sum().backward()  # type: ignore[no-untyped-call]
            return
        own = [p for p in own if p.requires_grad]
        shared = [p for p in shared if p.requires_grad]
        if own:
            grads = torch.autograd.grad(values.sum(), own, retain_graph=bool(shared), allow_unused=True)
            for parameter, grad in zip(own, grads, strict=True):
                if grad is not None:
                    parameter.grad = grad * scale if parameter.grad is None else parameter.grad + grad * scale
        if shared:
            self.weighting.aggregate(values, mask, shared, scale)

    def no_weight_decay(self) -> set[str]:
        """Return the names of this module's parameters without weight decay: all of them."""
        return {name for name, _ in self.named_parameters()}

    def _any(self, present: dict[str, int]) -> bool:
        return any(present.get(task, 0) > 0 and self.weights.get(task, 1.0) > 0 for task in self.tasks)

    def _gather(self, losses: dict[str, Tensor], present: dict[str, int]) -> tuple[Tensor, Tensor]:
        """Return float (n,) losses, 0 where absent, and bool (n,) presence."""
        if not self.tasks:
            raise RuntimeError("HybridLoss.build must be called before the loss is used")
        unknown = [task for task in losses if task not in self.tasks]
        if unknown:
            raise RuntimeError(f"losses of unknown tasks {unknown}; HybridLoss was built for {list(self.tasks)}")
        zero = torch.zeros((), device=self.weight.device)
        raw = torch.stack([losses[task].float() if task in losses else zero for task in self.tasks])
        labelled = torch.tensor([task in losses and present.get(task, 0) > 0 for task in self.tasks], device=raw.device)
        wrong = ~raw.detach().isfinite()
        if self.weighting.needs_positive:
            wrong = wrong | (raw.detach() < 0)
        if bool((wrong & labelled).any()):
            raise ConfigError(self._complaint(raw.detach(), wrong & labelled))
        mask = labelled & (self.weight > 0)
        return torch.where(mask, raw, 0.0), mask

    def _complaint(self, raw: Tensor, wrong: Tensor) -> str:
        task, value = next((t, v) for t, v, w in zip(self.tasks, raw.tolist(), wrong.tolist(), strict=True) if w)
        if value < 0 and value > -float("inf"):
            name = type(self.weighting).__name__
            return f"the loss of task {task!r} is {value:g}; loss.weighting {name} needs losses of at least 0"
        return (
            f"the loss of task {task!r} is {value:g}: training has diverged; lower the learning rate, set "
            "trainer.gradient_clip_val, or use trainer.precision 32-true (or bf16-mixed instead of 16-mixed)"
        )
