"""Run a site's Trainer inside the server's Trainer: all private names of Lightning that the federation uses.

Lightning was not designed for nested Trainers; they work as long as they share no object. Each private name is pinned
by a test (``tests/federation/client/test_lightning_internals.py``) and by ``lightning>=2.6,<2.7``.
"""

from __future__ import annotations

import copy
import logging
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loops.optimization.manual import _ManualOptimization
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.seed import isolate_rng
from torchmetrics import Metric

from mtmedformer.errors import ConfigError

SEEDS = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")

TrainerFactory = Callable[..., L.Trainer]


def copy_module(module: L.LightningModule) -> L.LightningModule:
    """Return a deep copy that is attached to no Trainer; compiled parts are compiled again."""
    trainer = module._trainer  # the public getter raises where there is none
    module.trainer = None
    try:
        twin = copy.deepcopy(module)
    finally:
        module.trainer = trainer
    for own, other in zip(module.modules(), twin.modules(), strict=True):
        if own._compiled_call_impl is not None:  # a deep copy drops it, and torch has no public flag
            other.compile()
    return twin


@contextmanager
def as_single_process(module: L.LightningModule) -> Iterator[None]:
    """Let a one-device Trainer within a process group behave as rank 0 of a world of one.

    The module's metrics are not gathered over the group, which would mix sites and wait for ranks that never join;
    loggers, which write on rank 0 only, write.
    """
    everyone: Any = rank_zero_only
    rank, everyone.rank = everyone.rank, 0
    keep_metrics_local(module)
    try:
        yield
    finally:
        everyone.rank = rank


def keep_metrics_local(module: torch.nn.Module) -> None:
    """Let a module's metrics use the values of this process only."""
    for part in module.modules():
        if isinstance(part, Metric):
            part.distributed_available_fn = never


def never() -> bool:
    """Return ``False``; a named function, so that metrics which hold it can be copied and pickled."""
    return False


@contextmanager
def seeded(*key: object) -> Iterator[int]:
    """Seed everything from a key; give the caller's random state and Lightning's seed variables back afterwards."""
    before = {name: os.environ.get(name) for name in SEEDS}
    with isolate_rng():
        try:
            yield L.seed_everything(zlib.crc32(repr(key).encode()), workers=True, verbose=False)
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Suppress what every Trainer logs (devices, ranks, why it stopped), which would repeat every round."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def build_site_trainer(
    factory: TrainerFactory,
    server: L.Trainer,
    loggers: Sequence[Logger] = (),
    bar: ProgressBar | None = None,
    distributed: bool = False,
    validates: bool = False,
) -> L.Trainer:
    """Build a fresh Trainer for one site and round.

    Args:
        factory: The user's configured Trainer; what it sets of epochs, steps, limits, clipping, accumulation, precision
            and callbacks stays.
        server: The Trainer that counts rounds; its device and, where the factory chose none, its precision are used.
        loggers: The site's loggers; none log nowhere.
        bar: The site's progress bar; ``None`` shows none.
        distributed: Train on all devices of the server together, instead of on this process's device alone.
        validates: Leave validation on; the server validates every round anyway, so a site's training goes without.
    """
    device = server.strategy.root_device
    fixed: dict[str, Any] = {
        "accelerator": "gpu" if device.type == "cuda" else device.type,
        "devices": server.num_devices if distributed else [device.index] if device.type == "cuda" else 1,
        "num_nodes": server.num_nodes if distributed else 1,
        "logger": list(loggers) or False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": server.default_root_dir,
        **({} if validates else {"limit_val_batches": 0}),
    }
    with quiet_lightning():
        trainer: L.Trainer = factory(**fixed, strategy=_strategy(server, distributed))
        if trainer.precision != server.precision and trainer.precision == "32-true":
            trainer = factory(**fixed, strategy=_strategy(server, distributed), precision=server.precision)
    if bar is not None:
        trainer.callbacks.append(bar)  # type: ignore[attr-defined]
    # no public switch: the server's handlers stay; two chained ones would wait for each other in a broadcast for ever
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    return trainer


def _strategy(server: L.Trainer, distributed: bool) -> Strategy:
    if not distributed:
        return SingleDeviceStrategy(device=server.strategy.root_device)
    assert isinstance(server.strategy, DDPStrategy)
    return DDPStrategy(timeout=server.strategy._timeout, **server.strategy._ddp_kwargs)


def note_sigterm_per_process(trainer: L.Trainer) -> None:
    """Let each process record SIGTERM and pass it on to the processes it launched; call before handlers are registered.

    Lightning's own handler broadcasts from within the signal handler, and there is no option against it. Where it
    interrupts processes in different collectives, as in the middle of training, each waits for another's broadcast
    for ever.
    """
    connector = trainer._signal_connector

    def note(signum: int, frame: Any) -> None:
        launcher = trainer.strategy.launcher
        if launcher is not None and not connector.received_sigterm:
            launcher.kill(signum)
        connector.received_sigterm = True

    connector._sigterm_notifier_fn = note  # type: ignore[method-assign, assignment]


def budget(trainer: L.Trainer) -> tuple[int, int]:
    """Return the epochs and optimiser steps of one round, -1 where there is no such limit; one epoch if neither is set.

    Raises:
        ConfigError: When a limit could never be reached.
    """
    epochs, steps = trainer.max_epochs, trainer.max_steps
    if epochs is None:
        epochs = 1 if steps == -1 else -1
    if epochs == 0 or steps == 0 or epochs == steps == -1:
        raise ConfigError(
            f"federation.site_trainer: max_epochs={epochs} and max_steps={steps} are no budget for a round; set one "
            "of them to 1 or more"
        )
    return epochs, steps


def private_settings(trainer: L.Trainer) -> dict[str, Any]:
    """Return the arguments of a Trainer that it keeps under private names only."""
    connector = trainer._accelerator_connector
    return {
        "detect_anomaly": trainer._detect_anomaly,
        "sync_batchnorm": connector._layer_sync is not None,
        "use_distributed_sampler": connector.use_distributed_sampler,
    }


def continue_from(trainer: L.Trainer, epochs: int, steps: int, more: int | None = None) -> None:
    """Set the counters of a fresh Trainer to those of its site's earlier rounds, and add the round's budget to them.

    Samplers then draw new orders, loggers continue along their axis, and a resumed run equals an uninterrupted one.

    Args:
        trainer: The Trainer.
        epochs: Epochs of the earlier rounds.
        steps: Optimizer steps of the earlier rounds.
        more: Optimizer steps of this round; ``None`` takes the Trainer's own budget.
    """
    more_epochs, more_steps = budget(trainer) if more is None else (-1, more)
    loop = trainer.fit_loop
    loop.max_epochs = -1 if more_epochs == -1 else epochs + more_epochs
    loop.epoch_loop.max_steps = -1 if more_steps == -1 else steps + more_steps
    done: list[Any] = [loop.epoch_progress.total, loop.epoch_progress.current]
    for counts in done:
        counts.ready = counts.started = counts.processed = counts.completed = epochs
    loop.epoch_loop.on_load_checkpoint({"_batches_that_stepped": steps})  # the axis of the loggers
    step = loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
    step.ready = step.completed = steps
    loop.epoch_loop.manual_optimization.optim_step_progress.total.completed = steps


class ServerLoop(_ManualOptimization):
    """Takes the server's optimizer step in place of the module's ``training_step``, and counts it.

    Private: ``_ManualOptimization``, the only place where a Trainer calls ``training_step``; a Trainer has no option
    for another step. Without the count ``global_step`` would stand still, and no checkpoint would be written. Both
    kinds of optimization are counted, since the module has its own kind again after the rounds.

    Args:
        trainer: The Trainer that counts rounds.
        optimizer: The server's optimizer. It steps without gradient scaler: it follows no gradient.
    """

    def __init__(self, trainer: L.Trainer, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(trainer)
        self.optimizer = optimizer
        self.replaced = trainer.fit_loop.epoch_loop.manual_optimization
        self.optim_step_progress = self.replaced.optim_step_progress
        trainer.fit_loop.epoch_loop.manual_optimization = self

    def advance(self, kwargs: OrderedDict[str, Any]) -> None:
        """Take one step of the server."""
        loop = self.trainer.fit_loop.epoch_loop
        counts = [self.optim_step_progress, loop.automatic_optimization.optim_progress.optimizer.step]
        for progress in counts:
            progress.increment_ready()
        self.optimizer.step()
        for progress in counts:
            progress.increment_completed()

    def release(self) -> None:
        """Give the Trainer its own loop back."""
        self.trainer.fit_loop.epoch_loop.manual_optimization = self.replaced


def process_timeout(strategy: DDPStrategy) -> timedelta:
    """Return how long processes wait for each other in a collective; the strategy has no public getter."""
    return strategy._timeout or timedelta(minutes=30)


class SiteBar(TQDMProgressBar):
    """The bar of one site's local epochs, one line below the rounds; Rich's bars cannot be nested.

    Args:
        label: What stands before the bar.
    """

    def __init__(self, label: str) -> None:
        super().__init__(leave=False, process_position=1)
        self.label = label

    def on_train_epoch_start(self, trainer: L.Trainer, *args: object) -> None:
        """Put the label before the bar."""
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description(self.label)
