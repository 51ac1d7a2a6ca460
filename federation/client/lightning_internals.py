"""How a site's Trainer runs inside the server's without either noticing: every private name of Lightning, in one place.

Lightning says that Trainers were not made to be nested; they can be as long as no object is shared. What is private
here is pinned by a test each (``tests/federation/client/test_lightning_internals.py``) and by ``lightning>=2.6,<2.7``.
"""

from __future__ import annotations

import copy
import logging
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.seed import isolate_rng
from torchmetrics import Metric

from mtmedformer.errors import ConfigError

SEEDS = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")

TrainerFactory = Callable[..., L.Trainer]


def copy_module(module: L.LightningModule) -> L.LightningModule:
    """Return a deep copy that belongs to no Trainer; the parts that ``torch.compile`` had taken are compiled again."""
    trainer, module._trainer = module._trainer, None
    try:
        twin = copy.deepcopy(module)
    finally:
        module._trainer = trainer
    for own, other in zip(module.modules(), twin.modules(), strict=True):
        if getattr(own, "_compiled_call_impl", None) is not None:
            other.compile()
    return twin


@contextmanager
def as_single_process(module: L.LightningModule) -> Iterator[None]:
    """Let a one-device Trainer within a process group behave as rank 0 of a world of one.

    Metrics of the module no longer reach for the group, where they would mix sites and wait for ranks that never come;
    loggers, which are silent on every other rank, write.
    """
    everyone: Any = rank_zero_only
    rank, everyone.rank = everyone.rank, 0
    keep_metrics_local(module)
    try:
        yield
    finally:
        everyone.rank = rank


def keep_metrics_local(module: torch.nn.Module) -> None:
    """Stop a module's metrics from gathering over the process group."""
    for part in module.modules():
        if isinstance(part, Metric):
            part.distributed_available_fn = never


def never() -> bool:
    """Return ``False``; a function with a name, so that metrics which hold it can be copied and pickled."""
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
    """Keep what every Trainer says of itself (devices, ranks, why it stopped) from being said every round."""
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
    logger: Logger | None = None,
    bar: ProgressBar | None = None,
    distributed: bool = False,
    validates: bool = False,
) -> L.Trainer:
    """Build a fresh Trainer for one site and round.

    Args:
        factory: The user's configured Trainer; what it sets of epochs, steps, limits, clipping, accumulation, precision
            and callbacks stays.
        server: The Trainer that counts rounds; its device and, where the factory chose none, its precision are used.
        logger: The site's logger; ``None`` logs nowhere.
        bar: The site's progress bar; ``None`` shows none.
        distributed: Train on all devices of the server together, instead of on this process's device alone.
        validates: Leave validation on; the server validates every round anyway, so a site's training goes without.
    """
    device = server.strategy.root_device
    fixed: dict[str, Any] = {
        "accelerator": "gpu" if device.type == "cuda" else device.type,
        "devices": server.num_devices if distributed else [device.index] if device.type == "cuda" else 1,
        "num_nodes": server.num_nodes if distributed else 1,
        "logger": logger or False,
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
    # the server's handlers stay in charge: two chained ones wait for each other in a broadcast and never end
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    return trainer


def _strategy(server: L.Trainer, distributed: bool) -> Strategy:
    if not distributed:
        return SingleDeviceStrategy(device=server.strategy.root_device)
    assert isinstance(server.strategy, DDPStrategy)
    return DDPStrategy(timeout=server.strategy._timeout, **server.strategy._ddp_kwargs)


def note_sigterm_per_process(trainer: L.Trainer) -> None:
    """Let each process note SIGTERM for itself and pass it on to those it launched, before handlers are registered.

    Lightning's own handler broadcasts from within the signal handler. Where it interrupts processes between different
    collectives, as it does in the middle of training, each then waits for another's broadcast for ever.
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


def continue_from(trainer: L.Trainer, epochs: int, steps: int) -> None:
    """Let a fresh Trainer count on from what its site has done in earlier rounds, for as much as its budget again.

    Samplers then draw new orders, loggers go on along their axis, and a resumed run does as an uninterrupted one.
    """
    more_epochs, more_steps = budget(trainer)
    loop = trainer.fit_loop
    loop.max_epochs = -1 if more_epochs == -1 else epochs + more_epochs
    loop.epoch_loop.max_steps = -1 if more_steps == -1 else steps + more_steps
    done: list[Any] = [loop.epoch_progress.total, loop.epoch_progress.current]
    for progress in done:
        progress.ready = progress.started = progress.processed = progress.completed = epochs
    loop.epoch_loop._batches_that_stepped = steps
    loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.ready = steps
    loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = steps
    loop.epoch_loop.manual_optimization.optim_step_progress.total.completed = steps


def server_step(trainer: L.Trainer, optimizer: torch.optim.Optimizer) -> None:
    """Take the server's optimiser step and count it, past gradient scalers: it is no step along a gradient.

    Without the count ``global_step`` would stand still, and no checkpoint would ever be written. It is kept for manual
    and automatic optimisation alike, since the module is given back its own once the rounds are over.
    """
    loop = trainer.fit_loop.epoch_loop
    counts = [loop.manual_optimization.optim_step_progress, loop.automatic_optimization.optim_progress.optimizer.step]
    for progress in counts:
        progress.increment_ready()
    optimizer.step()
    for progress in counts:
        progress.increment_completed()


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
