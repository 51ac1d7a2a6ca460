"""Local training: what a site does, counts and keeps while its own Trainer runs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer

from federation.aggregators.base import SiteObjective
from federation.alignment.align import align, permute_optimizer
from federation.alignment.groups import PermutationGroups
from federation.bayes.curvature import Curvature
from federation.exchange.schema import Schema, State
from mtmedformer.batch import Batch
from mtmedformer.errors import ConfigError
from mtmedformer.protocols import StepSchedule


class TrainingInterrupt(BaseException):
    """Local training stops on request, as by ``KeyboardInterrupt``; nothing of this round is kept."""


@dataclass(frozen=True)
class RoundPlan:
    """The settings of one round, equal for all sites.

    Attributes:
        round: Number of the round, from 0.
        rounds: Number of rounds of the whole federation.
        state: The global weights, on the CPU.
        base: Their ``state_hash``.
        schema: The model's schema.
        seed: Seed of the run.
        keep_optimizer: Whether a site's optimizer keeps its moments of the last round.
        distributed: Whether all processes train each site together.
        symmetries: Groups of the module's units that are aligned to the global model before an update leaves; none
            leaves every unit where it is.
        steps: Optimizer steps by site; the others take the budget of their Trainer.
    """

    round: int
    rounds: int
    state: State
    base: str
    schema: Schema
    seed: int = 0
    keep_optimizer: bool = False
    distributed: bool = False
    symmetries: PermutationGroups = ()
    steps: Mapping[str, int] = field(default_factory=dict)


@dataclass
class SiteState:
    """What a site keeps to itself between rounds.

    Attributes:
        epochs: Local epochs done.
        steps: Optimiser steps taken.
        local: Weights that never leave the site, by key.
        schedulers: State of the learning-rate schedules, which run over the whole federation.
        optimizers: State of the optimisers, where it is kept.
        own: The site's personal model, where it trains one apart from the global model.
        deviation: What the site's personal model adds to the global one, where it trains one that follows that.
        privacy: What its privacy policy keeps (``federation.privacy.accounting.PrivacyMemory``).
    """

    epochs: int = 0
    steps: int = 0
    local: State = field(default_factory=dict)
    schedulers: list[dict[str, Any]] = field(default_factory=list)
    optimizers: list[dict[str, Any]] = field(default_factory=list)
    own: State = field(default_factory=dict)
    deviation: State = field(default_factory=dict)
    privacy: dict[str, Any] = field(default_factory=dict)

    def weights(self, state: State) -> State:
        """Return the weights that the site uses, given the global ones: with all that it keeps to itself."""
        moved = {key: state[key] + change for key, change in self.deviation.items()}
        return state | self.local | moved | self.own

    def plain(self) -> dict[str, Any]:
        """Return it as plain containers of tensors and numbers, as a checkpoint may hold."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


class LocalTraining(L.Callback):
    """Watches a site's local training: counts labels, measures curvature, applies the client objective.

    Args:
        plan: The settings of the round.
        memory: What the site kept from its earlier rounds.
        objective: What the site does differently.
        curvature: What measures the curvature.
        local_keys: Keys that never leave the site; the client objective does not apply to them.
        stop: Whether to give up the round; called after every batch.
        held: Labelled training images of the site, by task; of any task under ``None``. Empty where it is unknown.

    Attributes:
        images: Images with at least one label in the batches of the round; repetitions count.
        labelled: The same by the task they are labelled for.
        curvatures: Curvature by parameter, once training is over.
        moved: By group of units, the share that alignment moved, where it moved any.
    """

    def __init__(
        self,
        plan: RoundPlan,
        memory: SiteState,
        objective: SiteObjective,
        curvature: Curvature,
        local_keys: frozenset[str],
        stop: Callable[[], bool],
        held: Mapping[str | None, int],
    ) -> None:
        self.held = held
        self.plan, self.memory, self.objective = plan, memory, objective
        self.curvature, self.local_keys, self.stop = curvature, local_keys, stop
        self.changes_gradients = objective.changes_gradients
        self.images = 0
        self.labelled: Counter[str] = Counter()
        self.curvatures: dict[str, Tensor] = {}
        self.schedulers: list[dict[str, Any]] = []
        self.optimizers: list[dict[str, Any]] = []
        self.moved: dict[str, float] = {}
        self._rates: list[float] = []
        self._start: State = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore optimizer and schedule of the site's last round, and keep the weights the round began with."""
        if self.plan.keep_optimizer:
            for optimizer, state in zip(trainer.optimizers, self.memory.optimizers, strict=False):
                optimizer.load_state_dict(state)
        _resume_schedules(trainer, self.plan, self.memory)
        if self.changes_gradients:
            names = dict(pl_module.named_parameters())
            self._start = {k: self.plan.state[k].to(names[k].device) for k in names if k not in self.local_keys}
        self.curvature.start(pl_module)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Measure the site's own gradients, then add the objective's term to gradients that a label reached."""
        self.curvature.observe(pl_module)
        self._rates.append(float(optimizer.param_groups[0]["lr"]))
        if not self.changes_gradients:
            return
        parameters = {name: p for name, p in pl_module.named_parameters() if name in self._start and p.grad is not None}
        for block in self.plan.schema.blocks:
            held = [(key, parameters[key]) for key in block.keys if key in parameters]
            if block.task is None or any(bool(p.grad.any()) for _, p in held if p.grad is not None):
                for key, parameter in held:
                    added = self.objective.gradient(key, parameter, self._start[key])
                    if added is not None and parameter.grad is not None:
                        parameter.grad += added

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the labelled samples, and give up the round on request."""
        if isinstance(batch, Batch):
            present = {name: target.present for name, target in batch.targets.items()}
            self.labelled.update({name: int(mask.sum()) for name, mask in present.items()})
            known = torch.stack(list(present.values())) if present else torch.zeros(1, 1)
            self.images += int(known.any(dim=0).sum())
        else:
            self.images += len(batch[0]) if isinstance(batch, list | tuple) else len(batch)
        stop = self.stop()
        if trainer.world_size > 1:  # the processes that train a site together stop together
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        if stop:
            raise TrainingInterrupt

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Finish the measurement, and keep the optimizer and the schedule for the next round."""
        self.curvatures = self.curvature.finish(pl_module, trainer.train_dataloader, trainer)
        self._align(trainer, pl_module)
        self.schedulers = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
        if self.plan.keep_optimizer:
            self.optimizers = [_on_cpu(optimizer.state_dict()) for optimizer in trainer.optimizers]
        if trainer.world_size > 1:
            names = sorted(self.labelled)
            counts = torch.tensor([self.images, *(self.labelled[n] for n in names)], device=pl_module.device)
            total = [int(n) for n in trainer.strategy.reduce(counts, reduce_op="sum").tolist()]
            self.images, self.labelled = total[0], Counter(dict(zip(names, total[1:], strict=True)))

    def _align(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Permute units to the order of the global model, with their curvature and the optimizer's moments."""
        if not self.plan.symmetries:
            return
        found = align(state_of(pl_module), self.plan.state, self.plan.symmetries, self.curvatures)
        if found.permutations:
            pl_module.load_state_dict(found.state)
            self.curvatures = dict(found.precision)
            self.moved = {name: share for name, share in found.moved.items() if share > 0}
            for optimizer in trainer.optimizers:
                permute_optimizer(optimizer, pl_module, found.permutations)

    def num_examples(self, task: str | None) -> int:
        """Return the different labelled images that reached a block of this task; of any task with ``None``.

        Repetitions do not count: a small site that takes many steps has no more evidence than its images.
        """
        seen = self.images if task is None else self.labelled[task]
        return min(seen, self.held.get(task, seen))

    def mean_rate(self) -> float:
        """Return the mean learning rate of the steps taken, 0 if there was none."""
        return math.fsum(self._rates) / len(self._rates) if self._rates else 0.0


def state_of(module: torch.nn.Module) -> State:
    """Return a copy of a module's weights on the CPU."""
    return {key: value.detach().cpu().clone() for key, value in module.state_dict().items()}


def _resume_schedules(trainer: L.Trainer, plan: RoundPlan, memory: SiteState) -> None:
    """Stretch the schedules over all rounds, and restore their state of the site's last round.

    Raises:
        ConfigError: When the schedule was begun with another learning rate.
    """
    epochs, steps = _budget(trainer, memory)
    per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
    total = plan.rounds * min(steps if steps > 0 else math.inf, epochs * per_epoch if epochs > 0 else math.inf)
    for i, config in enumerate(trainer.lr_scheduler_configs):
        scheduler: Any = config.scheduler
        if i < len(memory.schedulers):
            before, now = memory.schedulers[i].get("base_lrs", []), scheduler.state_dict().get("base_lrs", [])
            if list(before) != list(now):
                raise ConfigError(
                    f"optimizer.lr={max(now):g}, but the federation to resume was trained with {max(before):g}; keep "
                    "that value, or start a new run from its weights with model.init_weights=PATH"
                )
            scheduler.load_state_dict(memory.schedulers[i])
            rates = memory.schedulers[i].get("_last_lr", [])
            for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=False):
                group["lr"] = rate
        if isinstance(scheduler, StepSchedule):
            scheduler.spread(int(total))


def _budget(trainer: L.Trainer, memory: SiteState) -> tuple[int, int]:
    """Return a round's epochs and steps once the Trainer counts on from earlier rounds; -1 where there is no limit."""
    epochs, steps = trainer.max_epochs, trainer.max_steps
    assert epochs is not None
    return -1 if epochs == -1 else epochs - memory.epochs, -1 if steps == -1 else steps - memory.steps


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: _on_cpu(part) for key, part in value.items()}
    return [_on_cpu(part) for part in value] if isinstance(value, list | tuple) else value
