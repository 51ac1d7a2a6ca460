"""Parameter groups with layer-wise learning rates, and learning-rate schedules over the whole training."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping
from typing import Any, Literal

import lightning as L
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from mtmedformer.errors import ConfigError
from mtmedformer.protocols import MonitoringSchedule, StepSchedule

Interval = Literal["step", "epoch"]

CONFIGURED = "configured_lr"
"""Key of a parameter group: its learning rate as configured, which a schedule changes but does not overwrite."""


class WarmupCosine(LRScheduler):
    """Raises the learning rate linearly, then lowers it along half a cosine, once over the whole training.

    ``MultiTaskModule`` sets the number of optimizer steps with ``spread`` before the first step. In a training without
    an end (``max_epochs=-1``, ended by time or early stopping) the rate rises in the first epoch and then stays.

    Args:
        optimizer: The wrapped optimizer.
        warmup: Share of the training in which the rate rises, in [0, 1).
        floor: Final learning rate as a share of the optimizer's, in [0, 1].

    Raises:
        ConfigError: When a share is out of its range.

    Reference:
        Loshchilov & Hutter, SGDR, ICLR 2017, equation 5, without restarts.
    """

    def __init__(self, optimizer: Optimizer, warmup: float = 0.05, floor: float = 0.01) -> None:
        if not (0 <= warmup < 1 and 0 <= floor <= 1):
            raise ConfigError(f"lr_scheduler: warmup {warmup} must be in [0, 1) and floor {floor} in [0, 1]")
        self.warmup, self.floor, self.total_steps, self.endless = warmup, floor, 1, False
        super().__init__(optimizer)

    def spread(self, total_steps: int, endless: bool = False) -> None:
        """Set the number of optimizer steps of the whole training, or of the first epoch of one without an end."""
        self.total_steps, self.endless = max(1, total_steps), endless
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate

    def get_lr(self) -> list[float | Tensor]:
        """Return each parameter group's learning rate at the current step."""
        return [float(base) * self._factor(self.last_epoch) for base in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Return the state without the number of steps, so that a resumed run may be longer."""
        return {k: v for k, v in super().state_dict().items() if k not in {"warmup", "floor", "total_steps", "endless"}}

    def _factor(self, step: int) -> float:
        rise = self.total_steps if self.endless else max(1, round(self.warmup * self.total_steps))
        if step < rise:
            return (step + 1) / (rise + 1)
        if self.endless:
            return 1.0
        progress = min(1.0, (step - rise) / max(1, self.total_steps - rise))
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress))


def parameter_groups(
    module: nn.Module,
    depths: Mapping[str, int],
    without_decay: Collection[str],
    lr: float,
    weight_decay: float,
    layer_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """Return parameter groups: no weight decay on vectors, a smaller learning rate in shallower layers.

    Args:
        module: The module whose trainable parameters are grouped.
        depths: Depth of parameters by name, 0 nearest to the image; others have the largest depth.
        without_decay: Names of further parameters without weight decay.
        lr: Learning rate at the largest depth.
        weight_decay: Weight decay of matrices and kernels; norms and biases have none.
        layer_decay: Factor of the learning rate from one depth to the next shallower one, in (0, 1].
    """
    deepest = max(depths.values(), default=0)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        rate = lr * layer_decay ** (deepest - depths.get(name, deepest))
        decayed = parameter.ndim > 1 and name not in without_decay
        groups.setdefault((rate, weight_decay if decayed else 0.0), []).append(parameter)
    return [{"params": p, "lr": rate, "weight_decay": decay, CONFIGURED: rate} for (rate, decay), p in groups.items()]


def scheduled(
    optimizer: Optimizer,
    scheduler: Any,
    trainer: L.Trainer,
    interval: Interval | None = None,
    monitor: str | None = None,
) -> OptimizerLRScheduler:
    """Return optimizer and schedule in Lightning's form, stepped per optimizer step or per epoch.

    Args:
        optimizer: The optimizer.
        scheduler: Its schedule.
        trainer: The trainer, which estimates the number of optimizer steps.
        interval: When it is stepped; ``None``: per optimizer step for a ``StepSchedule``, ``OneCycleLR`` and
            ``CyclicLR``, per epoch for any other.
        monitor: Name of the logged metric that the schedule follows; ``None`` is the schedule's own.

    Raises:
        ConfigError: A ``StepSchedule`` per epoch, a schedule shorter than the training, or one that follows a metric
            without the name of one.
    """
    per_step = isinstance(scheduler, StepSchedule | OneCycleLR | CyclicLR)
    entry: dict[str, Any] = {"scheduler": scheduler, "interval": interval or ("step" if per_step else "epoch")}
    if isinstance(scheduler, StepSchedule):
        if interval == "epoch":
            name = type(scheduler).__name__
            raise ConfigError(f"model.lr_interval=epoch: {name} is stepped per optimizer step; leave it out")
        _spread(scheduler, trainer)
    if isinstance(scheduler, OneCycleLR) and entry["interval"] == "step":
        steps = trainer.estimated_stepping_batches
        if steps > scheduler.total_steps:
            raise ConfigError(
                f"lr_scheduler.total_steps={scheduler.total_steps}: OneCycleLR ends before the training, which has "
                f"{steps} optimizer steps; set at least that many"
            )
    followed = monitor or (scheduler.monitor if isinstance(scheduler, MonitoringSchedule) else None)
    if isinstance(scheduler, ReduceLROnPlateau) and followed is None:
        raise ConfigError("lr_scheduler: ReduceLROnPlateau follows a metric; set model.lr_monitor, such as val/score")
    if followed is not None:
        entry["monitor"] = followed
        if entry["interval"] == "epoch" and followed.startswith("val/"):
            entry["frequency"] = trainer.check_val_every_n_epoch or 1  # it has a new value after a validation only
    return {"optimizer": optimizer, "lr_scheduler": entry}  # type: ignore[return-value]


def check_schedule(schedule: Any) -> None:
    """Step a schedule of torch once and read its state, to find arguments with which it would fail in training.

    Args:
        schedule: A schedule of an optimizer that is not used afterwards.

    Raises:
        ConfigError: It fails.
    """
    if not type(schedule).__module__.startswith("torch.optim"):
        return
    try:
        if not isinstance(schedule, ReduceLROnPlateau):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler.step\(\)` before")
                schedule.step()
        schedule.state_dict()
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"lr_scheduler: {type(schedule).__name__} fails with these arguments: {error}") from error


def step_followers(trainer: L.Trainer) -> None:
    """Step the schedules that follow a metric per epoch; called at the end of an epoch, before checkpoints are written.

    Lightning steps them after the checkpoint, and not at all in an epoch that is resumed.

    Raises:
        ConfigError: The metric was not logged.
    """
    for config in trainer.lr_scheduler_configs:
        if follows_per_epoch(config.scheduler, trainer) and (trainer.current_epoch + 1) % config.frequency == 0:
            value = trainer.callback_metrics.get(str(config.monitor))
            if value is None:
                known = ", ".join(sorted(trainer.callback_metrics))
                raise ConfigError(
                    f"lr_scheduler.monitor={config.monitor}: no such metric was logged; there are {known}"
                )
            config.scheduler.step(value)  # type: ignore[arg-type]


def follows_per_epoch(scheduler: Any, trainer: L.Trainer) -> bool:
    """Return whether a schedule of a trainer follows a metric per epoch."""
    configs = trainer.lr_scheduler_configs
    return any(one.scheduler is scheduler and one.reduce_on_plateau and one.interval == "epoch" for one in configs)


def _spread(scheduler: StepSchedule, trainer: L.Trainer) -> None:
    """Set the length of a schedule: the steps of the whole training, or of the first epoch if that has no end."""
    steps = trainer.estimated_stepping_batches
    if math.isfinite(steps):
        scheduler.spread(int(steps))
        return
    trainer.fit_loop.setup_data()
    if not math.isfinite(trainer.num_training_batches):
        raise ConfigError(f"lr_scheduler: {type(scheduler).__name__} needs trainer.max_epochs or trainer.max_steps")
    scheduler.spread(math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches), endless=True)
