"""Builds the Trainers of the sites, and the strategy that trains them, from the server's Trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import lightning as L

from callbacks.federation.site_loggers import SiteLoggers
from federation.aggregators.base import Aggregator
from federation.client.lightning_internals import SiteBar, budget, build_site_trainer
from federation.client.site_trainer import InProcessTrainer, IsolatedTrainer, SiteTrainer
from federation.exchange.collectives import Processes
from federation.privacy.policy import PrivacyPolicy
from federation.site_loaders import Site
from mtmedformer.errors import ConfigError
from mtmedformer.protocols import StopsTraining

Placement = Literal["auto", "sequential", "isolated", "per_rank", "ddp"]
LocalSteps = Literal["raised", "equal", "epochs"] | int


@dataclass(frozen=True)
class SiteTrainers:
    """Builds a fresh Trainer for each site and round.

    Attributes:
        factory: The user's configured Trainer.
        server: The Trainer that counts rounds.
        loggers: Loggers of the sites.
        placement: Where the sites train, with ``auto`` resolved.
    """

    factory: Callable[..., L.Trainer]
    server: L.Trainer
    loggers: SiteLoggers
    placement: Placement

    def training(self, site: str) -> L.Trainer:
        """Return a Trainer for a site's local training; in an isolated process without bar and logger."""
        isolated = self.placement == "isolated"
        has_bar = self.server.progress_bar_callback is not None and self.server.is_global_zero and not isolated
        return build_site_trainer(
            self._limited(),
            self.server,
            [] if isolated else self.loggers.get(self.server, site),
            SiteBar(f"  {site}") if has_bar else None,
            distributed=self.placement == "ddp",
        )

    def validation(self) -> L.Trainer:
        """Return a Trainer for the validation of a site's own model."""
        return build_site_trainer(self._limited(), self.server, validates=True)

    def local_steps(self, setting: LocalSteps, sites: Mapping[str, Site], pooled: bool) -> dict[str, int]:
        """Return the optimizer steps per round of the sites that do not take the budget of their own Trainer.

        Args:
            setting: ``epochs``: no site; ``raised``: half the mean over the sites of the steps of
                ``site_trainer.max_epochs`` epochs, for the sites whose epochs are shorter; ``equal``: the mean, for all
                sites; or a number. ``site_trainer.max_steps`` overrides it.
            sites: The sites that train.
            pooled: Whether one site trains on the images of all; it takes as many steps as all sites together.

        Raises:
            ConfigError: When the number of batches of a site is unknown.
        """
        trainer = build_site_trainer(self._limited(), self.server)
        epochs, steps = budget(trainer)
        if setting == "epochs" or steps != -1 or (pooled and isinstance(setting, str)):
            return {}
        if isinstance(setting, int):
            return {"pooled": setting * len(sites)} if pooled else dict.fromkeys(sites, setting)
        world = self.server.world_size if self.placement == "ddp" else 1
        share = epochs / trainer.accumulate_grad_batches / world
        own = {name: share * _batches(site, trainer) for name, site in sites.items()}
        mean = sum(own.values()) / max(1, len(own))
        if setting == "equal":
            return dict.fromkeys(sites, max(1, round(mean)))
        return {name: max(1, round(mean / 2)) for name, count in own.items() if count < mean / 2}

    def stop_requested(self) -> bool:
        """Return whether the run is to stop: by SIGTERM, or by a callback."""
        callbacks = self.server.callbacks  # type: ignore[attr-defined]
        return self.server.received_sigterm or any(c.stopping for c in callbacks if isinstance(c, StopsTraining))

    def strategy(
        self,
        sites: Mapping[str, L.LightningDataModule],
        template: L.LightningModule,
        aggregator: Aggregator,
        deadline: float | None,
        privacy: Mapping[str, PrivacyPolicy],
        validates: bool,
    ) -> SiteTrainer:
        """Return what trains a site, and validates it if ``validates``: in this process, or in a process of its own."""
        local = InProcessTrainer(
            sites,
            template,
            aggregator,
            self.training,
            self.stop_requested,
            deadline,
            privacy,
            processes_of(self.server),
            self.validation if validates else None,
        )
        if self.placement != "isolated":
            return local
        writes = not self.server.fast_dev_run  # type: ignore[attr-defined]
        return IsolatedTrainer(local, Path(self.server.default_root_dir) if writes else None)

    def _limited(self) -> Callable[..., L.Trainer]:
        """Return the factory, limited to the batches of the server's ``fast_dev_run``."""
        batches = int(self.server.fast_dev_run)  # type: ignore[attr-defined]
        limits = {"limit_train_batches": batches, "limit_val_batches": batches}
        return partial(self.factory, **limits) if batches else self.factory


def _batches(site: Site, trainer: L.Trainer) -> int:
    """Return the training batches per epoch of a site, with the limit of its Trainer."""
    limit = trainer.limit_train_batches
    try:
        batches = len(site.train_dataloader())
    except TypeError as error:  # the length of an iterable data set
        raise ConfigError(
            f"site {site.site}: the length of its training data is unknown, so the steps of a round cannot be divided "
            "equally; set federation.local_steps to a number, or to epochs"
        ) from error
    return int(batches * limit) if isinstance(limit, float) else min(batches, limit)


def resolve_placement(placement: Placement, trainer: L.Trainer) -> Placement:
    """Return the placement with ``auto`` resolved: ``per_rank`` for several processes, ``sequential`` for one."""
    if trainer.world_size > 1:
        return "per_rank" if placement == "auto" else placement
    return "isolated" if placement == "isolated" else "sequential"


def processes_of(trainer: L.Trainer) -> Processes:
    """Return the processes of a Trainer."""
    return Processes(trainer.global_rank, trainer.world_size, trainer.strategy.root_device)
