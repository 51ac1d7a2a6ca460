"""Settings of Lightning's Trainer that a run cannot have: refused by name, before anything is built or written.

``docs/training_options.md`` lists what works and what is refused, with reasons.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from importlib.util import find_spec
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ParallelStrategy
from torch import nn

from mtmedformer.errors import ConfigError
from mtmedformer.normalization import BATCH_NORMS

PRECISIONS = frozenset({"32-true", "32", "16-mixed", "16", "bf16-mixed", "bf16", "bf16-true", "64-true", "64"})
"""Values of ``trainer.precision`` that train right."""

HALVED = "16-true"
"""Trains with no optimizer whose state underflows, such as AdamW; a trained model can be applied in it."""

SHARDED = ("fsdp", "deepspeed", "model_parallel", "modelparallel", "xla", "single_xla")
"""Beginnings of the names of strategies that divide the weights over devices, or need other hardware."""

IN_MEMORY = ("spawn", "fork", "notebook")
"""Parts of the names of strategies whose processes are copies of this one, not commands."""

REFUSED_CALLBACKS = {
    "LearningRateFinder": "it gives all layers one learning rate, which schedule and layer_decay then replace, and "
    "config.yaml would not have it. Search with 'mtmedformer sweep' over optimizer.lr",
    "BatchSizeFinder": "it changes data.batch_size after config.yaml is written, so the run could be neither repeated "
    "nor resumed. Set data.batch_size",
    "BackboneFinetuning": "it needs a module with the attribute backbone; train the encoder more slowly with "
    "model.layer_decay",
}
"""Lightning's callbacks that do not work with these models, and what to use instead."""


def check_settings(config: Namespace, command: str) -> None:
    """Check the seed and the section ``trainer`` of a command.

    Args:
        config: The configuration of the command.
        command: ``fit``, ``validate``, ``test`` or ``predict``.

    Raises:
        ConfigError: A setting that cannot work; the message names it, the reason and the fix.
    """
    seed, trainer = config.get("seed_everything"), config.trainer
    if not isinstance(seed, bool | None) and not 0 <= seed < 2**32:
        raise ConfigError(f"seed_everything={seed}: a seed is a whole number from 0 to {2**32 - 1}")
    precision = str(trainer.precision or "32-true")
    if precision not in PRECISIONS and not (precision == HALVED and command != "fit"):
        why = "the optimizer's state underflows in half precision" if precision == HALVED else "it is not supported"
        raise ConfigError(f"trainer.precision={precision}: {why}; choose 32-true, bf16-mixed, 16-mixed or bf16-true")
    if trainer.barebones:
        raise ConfigError(
            "trainer.barebones=true: a run without logs, checkpoints and callbacks keeps nothing; to measure speed use "
            "--trainer.profiler=simple"
        )
    if next(_names(trainer.profiler)).lower().startswith("xla"):
        raise ConfigError("trainer.profiler=xla: it needs a TPU; choose simple, advanced or pytorch")
    _check_strategy(trainer.strategy)
    _check_optimizer(config)
    for callback in trainer.callbacks or ():
        for key, value in (callback.get("init_args") or {}).items():
            if isinstance(value, Enum):  # a default that jsonargparse cannot write into config.yaml (Timer)
                callback.init_args[key] = value.value
    if command == "fit":
        _check_fit(trainer, federated=config.get("federation") is not None)


def _check_optimizer(config: Namespace) -> None:
    optimizer, schedule = (next(_names(config.get(key))) for key in ("optimizer", "lr_scheduler"))
    if optimizer == "SparseAdam":
        raise ConfigError("optimizer=SparseAdam: it needs sparse gradients, which no layer here has; use AdamW")
    if schedule in {"SequentialLR", "ChainedScheduler"}:
        raise ConfigError(
            f"lr_scheduler={schedule}: it is made of schedules of the same optimizer, which a configuration cannot "
            "name; use WarmupCosine, or a class of your own that takes the optimizer and builds them"
        )


def check_validation(trainer: Namespace, batches: int) -> None:
    """Check that an epoch is long enough for its validations.

    Args:
        trainer: The section ``trainer`` of ``fit``.
        batches: Batches of an epoch, per process.

    Raises:
        ConfigError: The first validation would come after the end of the epoch.
    """
    interval, limit = trainer.val_check_interval, trainer.limit_train_batches
    if trainer.check_val_every_n_epoch is None or not isinstance(interval, int) or trainer.overfit_batches:
        return
    if isinstance(limit, int):
        batches = min(batches, limit)
    if interval > batches:
        raise ConfigError(
            f"trainer.val_check_interval={interval}: an epoch has {batches} batches; to count batches over epochs, set "
            "trainer.check_val_every_n_epoch=null"
        )


def check_batch_norm(trainer: Trainer, model: nn.Module) -> None:
    """Check that the batch normalisation of a model can be synchronized, where the trainer is to do so.

    Raises:
        ConfigError: The processes are on CPUs, for which torch has no synchronized batch normalisation.
    """
    strategy = trainer.strategy
    on_cpus = isinstance(strategy, ParallelStrategy) and strategy.root_device.type == "cpu"
    if on_cpus and any(isinstance(module, BATCH_NORMS) for module in model.modules()):
        raise ConfigError(
            "trainer.sync_batchnorm=true: torch synchronizes batch normalisation between GPUs only; leave it out, or "
            "choose an encoder without batch normalisation"
        )


def _check_strategy(strategy: Any) -> None:
    names = list(_names(strategy))
    if any(name.lower().startswith(SHARDED) for name in names):
        raise ConfigError(
            f"trainer.strategy={names[0]}: checkpoints hold the whole model, which this strategy divides over devices; "
            "use ddp"
        )
    if any(word in name.lower() for name in names for word in IN_MEMORY):
        raise ConfigError(
            f"trainer.strategy={names[0]}: results in the memory of its processes would be lost; use ddp, which starts "
            "the command once per device"
        )


def _check_fit(trainer: Namespace, federated: bool) -> None:
    for key in ("max_epochs", "max_steps", "limit_train_batches"):
        if trainer.get(key) is not None and trainer[key] == 0:
            raise ConfigError(f"trainer.{key}=0: nothing would be trained")
    for key in ("accumulate_grad_batches", "check_val_every_n_epoch", "log_every_n_steps"):
        if trainer.get(key) is not None and trainer[key] < 1:
            raise ConfigError(f"trainer.{key}={trainer[key]}: it is at least 1")
    if (trainer.gradient_clip_val or 0) < 0:
        raise ConfigError(f"trainer.gradient_clip_val={trainer.gradient_clip_val}: it is a norm above 0, or null")
    if trainer.val_check_interval == 0:
        raise ConfigError(
            "trainer.val_check_interval=0: it is a number of batches of at least 1, or a share of the epoch above 0; "
            "trainer.limit_val_batches=0 turns validation off"
        )
    precision = str(trainer.precision)
    if federated and precision in {"bf16-true", "64-true", "64"}:
        raise ConfigError(f"trainer.precision={precision}: updates of sites need 32-true weights; use bf16-mixed")
    for callback in trainer.callbacks or ():
        name = next(_names(callback)).rpartition(".")[2]
        if name in REFUSED_CALLBACKS:
            raise ConfigError(f"trainer.callbacks: {name} cannot be used, because {REFUSED_CALLBACKS[name]}")
        if name == "LearningRateMonitor" and trainer.logger is False:
            raise ConfigError("trainer.callbacks: LearningRateMonitor needs a logger, but trainer.logger is false")
        if name == "DeviceStatsMonitor" and find_spec("psutil") is None:
            raise ConfigError("trainer.callbacks: DeviceStatsMonitor needs psutil: pip install psutil")


def _names(value: Any) -> Iterator[str]:
    """Yield the name of a class or of a shortcut in the configuration, and its start method where it has one."""
    if isinstance(value, Namespace):
        yield str(value.class_path).rpartition(".")[2]
        yield str((value.get("init_args") or {}).get("start_method", ""))
    else:
        yield str(value)
