"""Check that a Trainer can run rounds; every error names the key and the fix."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from enum import Enum

import lightning as L
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
)
from lightning.pytorch.strategies import DDPStrategy

from federation.client.lightning_internals import budget, build_site_trainer, private_settings, process_timeout
from federation.datamodule import FederatedDataModule
from federation.partition import Holding
from federation.privacy.policy import PrivacyPolicy
from federation.server.admission import Policy
from federation.server.update_checks import Declaration
from federation.site_loaders import Site
from mtmedformer.errors import ConfigError
from mtmedformer.protocols import TaskedData


def federated_data(trainer: L.Trainer) -> FederatedDataModule:
    """Return the Trainer's data.

    Raises:
        ConfigError: It has no sites.
    """
    return check_data(trainer.datamodule)  # type: ignore[attr-defined]


def check_data(data: object) -> FederatedDataModule:
    """Return the data of a federation.

    Raises:
        ConfigError: It has no sites.
    """
    if not isinstance(data, FederatedDataModule):
        raise ConfigError(
            f"federation: the data is a {type(data).__name__}; make it a federation.FederatedDataModule with the "
            "data set of each site under data.sites, or one data set under data.data and what cuts it under data.by"
        )
    return data


def tasks_of(module: L.LightningModule) -> list[str] | None:
    """Return the names of a module's tasks; ``None`` where it does not declare them."""
    return list(module.tasks) if isinstance(module, TaskedData) else None


def declarations(
    sites: Mapping[str, Site],
    holdings: Sequence[Holding],
    site_trainer: L.Trainer,
    privacy: Mapping[str, PrivacyPolicy],
    local_steps: Mapping[str, int],
) -> dict[str, Declaration]:
    """Return by site the most labelled samples that one of its rounds can use, before the first round.

    It is twice the local budget in images, since samplers repeat images, and processes that share a site pad batches.

    Args:
        sites: The sites that train.
        holdings: Their images and labels.
        site_trainer: A configured Trainer of a site.
        privacy: Privacy policy by site.
        local_steps: Optimizer steps per round by site, of those whose budget their Trainer does not set.
    """
    epochs, steps = budget(site_trainer)
    found = {}
    labels = {holding.site: {task for task, count in holding.labels.items() if count} for holding in holdings}
    for name, site in sites.items():
        loader = site.train_dataloader()
        images: int | None = None
        with suppress(TypeError):  # the length of an iterable data set is unknown
            batch = loader.batch_size or 0
            images = max(len(loader.dataset), len(loader) * batch)  # type: ignore[arg-type]
            by_steps = max(steps, local_steps.get(name, 0)) * batch * site_trainer.accumulate_grad_batches
            images = 2 * max(images * max(epochs, 1), by_steps)
        policy = privacy.get(name)
        known = frozenset(labels[name]) if labels.get(name) else None
        found[name] = Declaration(images, known, policy is not None and policy.guarantees)
    return found


def check_server(trainer: L.Trainer, placement: str, policy: Policy, site_trainer: Callable[..., L.Trainer]) -> None:
    """Refuse settings of the Trainer that have no effect on a server.

    Raises:
        ConfigError: There is one.
    """
    _check_settings(trainer)
    if trainer.max_epochs in (None, -1):
        raise ConfigError("trainer.max_epochs counts the rounds; set it to 1 or more")
    if placement == "isolated" and trainer.strategy.root_device.type != "cpu":
        raise ConfigError(
            "federation.placement=isolated forks a process for each site, which a GPU does not survive; choose "
            "sequential or per_rank, or trainer.accelerator=cpu"
        )
    if trainer.world_size > 1:
        _check_group(trainer, placement, policy)
    budget(build_site_trainer(site_trainer, trainer))


def _check_settings(trainer: L.Trainer) -> None:
    private = private_settings(trainer)
    for name, value, neutral in (
        ("overfit_batches", trainer.overfit_batches, (0,)),  # type: ignore[attr-defined]  # sets limit_train_batches
        ("gradient_clip_val", trainer.gradient_clip_val, (None, 0)),
        ("gradient_clip_algorithm", trainer.gradient_clip_algorithm, (None,)),
        ("accumulate_grad_batches", trainer.accumulate_grad_batches, (1,)),
        ("max_steps", trainer.max_steps, (-1,)),
        ("limit_train_batches", trainer.limit_train_batches, (1,)),
        ("detect_anomaly", private["detect_anomaly"], (False,)),
        ("sync_batchnorm", private["sync_batchnorm"], (False,)),
        ("use_distributed_sampler", private["use_distributed_sampler"], (True,)),
    ):
        if value not in neutral and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise ConfigError(
                f"trainer.{name}={_plain(value)} has no effect on rounds; set federation.site_trainer.{name} instead"
            )
    if trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
        raise ConfigError(
            "trainer.reload_dataloaders_every_n_epochs has no effect on rounds, in which every site's loaders are made "
            "anew; remove it"
        )
    every = trainer.check_val_every_n_epoch
    if every is not None and trainer.val_check_interval not in (None, 1):
        raise ConfigError(
            f"trainer.val_check_interval={trainer.val_check_interval}: a round is one step of the server, and is "
            "validated after it; set trainer.check_val_every_n_epoch to validate every n rounds"
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        name = type(callback).__name__
        if isinstance(callback, GradientAccumulationScheduler):
            raise ConfigError(
                f"trainer.callbacks: {name} has no effect on rounds; put it in federation.site_trainer.callbacks"
            )
        if isinstance(callback, BatchSizeFinder | LearningRateFinder):
            raise ConfigError(
                f"trainer.callbacks: {name} cannot search in rounds; run it without the federation section, and set "
                "the value that it finds"
            )


def _plain(value: object) -> object:
    return value.value if isinstance(value, Enum) else value


def _check_group(trainer: L.Trainer, placement: str, policy: Policy) -> None:
    if placement in ("sequential", "isolated"):
        raise ConfigError(
            f"federation.placement={placement}, but trainer.devices starts {trainer.world_size} processes; choose "
            "per_rank or ddp, or one device"
        )
    if not isinstance(trainer.strategy, DDPStrategy):
        raise ConfigError(f"trainer.strategy: {type(trainer.strategy).__name__} cannot hold a federation; choose ddp")
    limit = process_timeout(trainer.strategy)
    if policy.deadline is not None and timedelta(seconds=policy.deadline) >= limit:
        raise ConfigError(
            f"federation.policy.deadline is {policy.deadline:g} s, but processes wait {limit.total_seconds():g} s for "
            "each other; raise trainer.strategy.init_args.timeout above the time one process needs for its sites"
        )
