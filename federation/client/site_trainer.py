"""Where a site trains: in this process, or in a process forked for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import lightning as L

from federation.aggregators.base import Aggregator
from federation.client.local_training import RoundPlan, SiteState, TrainingInterrupt
from federation.client.subprocess import SiteTimeoutError, train_isolated
from federation.client.train import SiteResult, train_site
from federation.exchange.collectives import Processes
from federation.exchange.update import WAITING
from federation.privacy.policy import PrivacyPolicy


class SiteTrainer(Protocol):
    """Trains one site for one round; ``federation.server.round.Round`` needs nothing else of a site."""

    def train(self, site: str, plan: RoundPlan, state: SiteState) -> SiteResult:
        """Train a site.

        Args:
            site: Name of the site.
            plan: The round.
            state: What the site kept from its earlier rounds; not changed.

        Raises:
            TrainingInterrupt: When the run is to stop; the round is given up.
            ConfigError: When the configuration is wrong, so that no site can train.
            SiteTimeoutError: When the deadline has passed.
        """
        ...


@dataclass(frozen=True)
class InProcessTrainer:
    """Trains a site in this process, in a Trainer of its own.

    Attributes:
        sites: Data of every site, set up.
        template: The module as it was built, attached to no Trainer.
        aggregator: Decides the sites' objectives and what they measure.
        make_trainer: Builds a fresh, configured Trainer for a site.
        stop: Whether the run is to stop; called after every batch.
        deadline: Seconds per site and round; ``None`` waits as long as it takes.
        privacy: Privacy policy by site.
        processes: The processes of the run.
        make_validator: Builds a fresh Trainer that validates a site's model after its training; ``None``: none does.
    """

    sites: Mapping[str, L.LightningDataModule]
    template: L.LightningModule
    aggregator: Aggregator
    make_trainer: Callable[[str], L.Trainer]
    stop: Callable[[], bool]
    deadline: float | None
    privacy: Mapping[str, PrivacyPolicy]
    processes: Processes
    make_validator: Callable[[], L.Trainer] | None

    def train(self, site: str, plan: RoundPlan, state: SiteState) -> SiteResult:
        """Train a site until its budget, its deadline or the end of the run; see ``SiteTrainer.train``."""
        end = time.monotonic() + (self.deadline or float("inf"))
        try:
            return self.train_until(lambda: self.stop() or time.monotonic() > end, site, plan, state)
        except TrainingInterrupt:
            stops = self.stop()
            if plan.distributed:  # the processes train the site together and must decide alike
                stops = self.processes.any(stops)
            if not stops:
                raise SiteTimeoutError from None
            raise

    def train_until(self, stop: Callable[[], bool], site: str, plan: RoundPlan, state: SiteState) -> SiteResult:
        """Train a site until ``stop``, called after every batch, returns true.

        Raises:
            TrainingInterrupt: When it did.
        """
        return train_site(
            site,
            self.template,
            self.sites[site],
            plan,
            state,
            self.aggregator,
            partial(self.make_trainer, site),
            stop,
            self.privacy.get(site),
            self.make_validator,
        )


@dataclass(frozen=True)
class IsolatedTrainer:
    """Trains a site in a process forked for it: a process that dies ends the round of its site only.

    Attributes:
        local: Trains the site in the forked process.
        folder: The run folder, in which the processes leave their results; ``None``: the system's temporary folder.
    """

    local: InProcessTrainer
    folder: Path | None = None

    def train(self, site: str, plan: RoundPlan, state: SiteState) -> SiteResult:
        """Train a site in a process of its own; see ``SiteTrainer.train``.

        Raises:
            SiteCrashError: When the process was killed.
            SiteTrainingError: When the training raised.
        """

        def work(stop: Callable[[], bool]) -> SiteResult:
            return self.local.train_until(stop, site, plan, state)

        waiting = None if self.folder is None else self.folder / WAITING
        return train_isolated(work, waiting, self.local.deadline, self.local.stop)
