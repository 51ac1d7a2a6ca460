"""Builds the Trainers of the sites, and the strategy that trains them, from the server's Trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import lightning as L

from callbacks.federation.site_loggers import SiteLoggers
from federation.aggregators.base import Aggregator
from federation.client.lightning_internals import SiteBar, build_site_trainer
from federation.client.site_trainer import InProcessTrainer, IsolatedTrainer, SiteTrainer
from federation.exchange.collectives import Processes
from federation.privacy.policy import PrivacyPolicy
from mtmedformer.protocols import StopsTraining

Placement = Literal["auto", "sequential", "isolated", "per_rank", "ddp"]


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
            None if isolated else self.loggers.get(self.server, site),
            SiteBar(f"  {site}") if has_bar else None,
            distributed=self.placement == "ddp",
        )

    def validation(self) -> L.Trainer:
        """Return a Trainer for the validation of a site's own model."""
        return build_site_trainer(self._limited(), self.server, validates=True)

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
    ) -> SiteTrainer:
        """Return what trains a site: in this process, or isolated in a process of its own."""
        local = InProcessTrainer(
            sites,
            template,
            aggregator,
            self.training,
            self.stop_requested,
            deadline,
            privacy,
            processes_of(self.server),
        )
        return IsolatedTrainer(local) if self.placement == "isolated" else local

    def _limited(self) -> Callable[..., L.Trainer]:
        """Return the factory, limited to the batches of the server's ``fast_dev_run``."""
        batches = int(self.server.fast_dev_run)  # type: ignore[attr-defined]
        limits = {"limit_train_batches": batches, "limit_val_batches": batches}
        return partial(self.factory, **limits) if batches else self.factory


def resolve_placement(placement: Placement, trainer: L.Trainer) -> Placement:
    """Return the placement with ``auto`` resolved: ``per_rank`` for several processes, ``sequential`` for one."""
    if trainer.world_size > 1:
        return "per_rank" if placement == "auto" else placement
    return "isolated" if placement == "isolated" else "sequential"


def processes_of(trainer: L.Trainer) -> Processes:
    """Return the processes of a Trainer."""
    return Processes(trainer.global_rank, trainer.world_size, trainer.strategy.root_device)
