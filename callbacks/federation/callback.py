"""Turns ``fit`` into a federation: one epoch of the Trainer is one round over all sites."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from callbacks.federation.checks import check_server, federated_data
from callbacks.federation.round_words import faults_in_words, round_line, say
from callbacks.federation.server import Server
from callbacks.federation.site_files import write_model, write_quarantine
from callbacks.federation.site_loggers import SiteLoggers
from callbacks.federation.site_matrix import show_sites, write_sites
from callbacks.federation.site_validation import mean_and_worst, metrics_by_site, validate_own
from federation.aggregators.base import Aggregator
from federation.aggregators.bayesian import BayesianAggregator
from federation.alignment.groups import permutation_groups
from federation.client.lightning_internals import (
    SiteBar,
    build_site_trainer,
    copy_module,
    keep_metrics_local,
    note_sigterm_per_process,
)
from federation.client.subprocess import SiteTimeoutError, train_isolated
from federation.client.train import RoundPlan, SiteResult, SiteState, TrainingInterrupt, state_of, train_site
from federation.exchange.schema import State, schema_of, state_hash
from federation.partition import Holding
from federation.privacy.policy import PrivacyPolicy
from federation.privacy.site_policies import by_site
from federation.server.admission import Policy, plain
from federation.server.drift import Drift
from federation.server.participation import Participation, check_participation, taking_part
from federation.server.round import Gathering, Group
from federation.server.run_state import RunState, write_state
from federation.site_loaders import Site
from mtmedformer.errors import ConfigError, UserError


class Federation(L.Callback):
    """Trains the sites of a ``FederatedDataModule`` in rounds and merges what they learnt, an epoch a round.

    Each site gets a copy of the module with the global weights, a Trainer of its own and a random stream of its own;
    its update is added in the order of the site names, so the result is the same to the last bit however many processes
    share the work. The server step is the Trainer's own optimiser step: validation, checkpoints, early stopping,
    progress bars, loggers and ``--ckpt_path`` count rounds. A checkpoint holds the plain module.

    A site that raises, is late or sends what cannot be used is left out of the round and told of, as ``policy`` says;
    ``run_state.json`` in the run folder always says whether the run is running, degraded, failed or finished, and why.

    Args:
        aggregator: How updates become the next global weights; ``null`` is the Bayesian aggregator.
        site_trainer: The Trainer of a site. Its ``max_epochs`` (or ``max_steps``) is the budget of one round, by
            default one epoch; gradient clipping, accumulation and limits of training belong here too.
        placement: ``sequential``: one process trains all sites; ``isolated``: each site's round has a process of its
            own, of one thread, whose death is the site's alone (not on GPUs); ``per_rank``: every process trains some;
            ``ddp``: all processes train each site together, and a site that fails on one of them ends the run.
            ``auto`` is ``per_rank`` where there are several processes.
        sites_at_once: Isolated sites that train at the same time.
        optimizer_state: Whether a site's optimiser starts every round anew or keeps its moments. The learning-rate
            schedule runs over the whole federation either way.
        participation: Share of the sites that take part in a round, drawn with the seed (1 for all); or a list of
            rounds, each a list of site names, that is gone through again and again.
        align: Permute a site's hidden units and attention heads to the order of the global model before its update is
            sent. In an ordinary round none have moved, and the check costs little.
        validate_sites: Also validate each site's own model on its own data, as ``site/<site>/val/…``. Done in any
            case where sites keep something for themselves (norms, personal models).
        policy: What is done about sites that fail: quorum, deadline, retries, outliers.
        privacy: What sites do to their updates before they leave: one policy for all, or one by site name; a site
            without one sends all there is. See ``docs/privacy.md``.

    Raises:
        ConfigError: When a value cannot be.
    """

    runs_rounds = True

    def __init__(
        self,
        aggregator: Aggregator | None = None,
        site_trainer: Callable[[], L.Trainer] = L.Trainer,
        placement: Literal["auto", "sequential", "isolated", "per_rank", "ddp"] = "auto",
        sites_at_once: int = 1,
        optimizer_state: Literal["reset", "keep"] = "reset",
        participation: Participation = 1.0,
        align: bool = True,
        validate_sites: bool = False,
        policy: Policy = Policy(),  # noqa: B008 (frozen)
        privacy: PrivacyPolicy | dict[str, PrivacyPolicy] | None = None,
    ) -> None:
        self.aggregator = aggregator or BayesianAggregator()
        self.site_trainer = site_trainer
        self.placement, self.optimizer_state, self.participation = placement, optimizer_state, participation
        self.sites_at_once, self.align, self.validate_sites, self.policy = sites_at_once, align, validate_sites, policy
        check_participation(participation)
        if sites_at_once < 1 or (sites_at_once > 1 and placement != "isolated"):
            raise ConfigError(
                f"federation.sites_at_once is {sites_at_once}; sites train at the same time with placement: isolated, "
                "or in several processes with placement: per_rank and trainer.devices"
            )
        self.privacy = privacy
        self._privacy: dict[str, PrivacyPolicy] = {}
        self.sites: dict[str, SiteState] = {}
        self.history: list[dict[str, Any]] = []
        self.holdings: list[Holding] = []
        self.loggers = SiteLoggers()
        self.state: RunState | None = None
        self._target: State = {}
        self._server: Server | None = None
        self._began = 0.0

    @property
    def exit_code(self) -> int:
        """What the command line returns at the end: 0 finished, 1 failed, 3 degraded."""
        return self.state.exit_code if self.state else 0

    # --- set up -------------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Keep a pristine copy of the module for the sites, and make the Trainer's own module the server.

        Raises:
            ConfigError: When the data has no sites, or a setting of the Trainer means nothing to a server.
        """
        if stage != "fit":
            return
        check_server(trainer, self.placement, self.policy, self._factory(trainer))
        note_sigterm_per_process(trainer)
        warnings.filterwarnings("ignore", r"It is recommended to use `self.log\(.*sync_dist=True")  # equal on all
        self._template = copy_module(pl_module)
        self._schema = schema_of(pl_module)
        self._privacy = by_site(self.privacy, list(federated_data(trainer).sites), self.aggregator)
        for privacy in self._privacy.values():
            privacy.check(pl_module, self._schema, self.aggregator, self._placed(trainer) == "ddp")
        self._symmetries = permutation_groups(pl_module) if self.align and self.aggregator.exchange.merged else ()
        keep_metrics_local(pl_module)  # every process validates everything, so that all decide alike
        self._server = Server(trainer, pl_module, self.target)
        self.holdings = federated_data(trainer).holdings()
        if trainer.is_global_zero:
            show_sites(self.holdings)
            if not getattr(trainer, "fast_dev_run", False):
                write_sites(self.holdings, Path(trainer.default_root_dir))
                for name, site in federated_data(trainer).sites.items():
                    write_quarantine(Path(trainer.default_root_dir), name, site)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the sites' own runs in W&B, once it is known which run the server is."""
        self.loggers.open(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the seed of the run, from which every site draws its own."""
        self._seed = int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed() % 2**31))
        names = list(federated_data(trainer).sites)
        check_participation(self.participation, names)
        self._say_state(trainer, f"{len(names)} sites")

    # --- a round ------------------------------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Train the sites and merge their updates; the step that follows puts the result in place.

        Raises:
            RoundError: When the policy does not let the round count.
        """
        self._began = time.perf_counter()
        state = self.aggregator.starting_state(state_of(pl_module))
        plan = RoundPlan(
            round=trainer.current_epoch,
            rounds=int(trainer.max_epochs or 1),
            state=state,
            base=state_hash(state),
            schema=self._schema,
            seed=self._seed,
            keep_optimizer=self.optimizer_state == "keep",
            distributed=self._placed(trainer) == "ddp",
            symmetries=self._symmetries,
        )
        folder = None if getattr(trainer, "fast_dev_run", False) else Path(trainer.default_root_dir)
        gathering = Gathering(plan, self.policy, self._group(trainer), folder)
        try:
            self._gather(trainer, plan, gathering)
            self._merge(trainer, pl_module, plan, gathering)
        finally:
            gathering.close()
        self._validate_own(trainer, pl_module)

    def _gather(self, trainer: L.Trainer, plan: RoundPlan, gathering: Gathering) -> None:
        """Train the sites of the round, each on the processes it is placed on."""
        data = federated_data(trainer)
        pooled = self.aggregator.data == "pooled"
        sites = {"pooled": data.pooled()} if pooled else data.sites
        names = list(sites) if pooled else taking_part(self.participation, plan.round, list(sites), self._seed)
        apart = self._placed(trainer) == "per_rank"
        owners = {name: i % trainer.world_size if apart else 0 for i, name in enumerate(names)}
        mine = [name for name in names if not apart or owners[name] == trainer.global_rank]
        gathering.run(owners, lambda name: self._train(trainer, plan, sites[name]), mine, self.sites_at_once)

    def _merge(self, trainer: L.Trainer, pl_module: L.LightningModule, plan: RoundPlan, gathering: Gathering) -> None:
        """Add what was admitted, and keep what the sites keep and what there is to tell."""
        self.aggregator.start(plan.state, self._schema)
        drift = Drift(self.aggregator, self._schema)
        for update in gathering.updates():
            drift.add(update)
            self.aggregator.add(update)
        self._target = self.aggregator.finish()
        pulls = drift.finish(plan.state, self._target)
        told: dict[str, Any] = {}
        for site, arrival in gathering.arrivals.items():
            if arrival.fault is None and arrival.state is not None:
                self.sites[site] = arrival.state
                if self._placed(trainer) == "isolated" and (logger := self.loggers.get(trainer, site)) is not None:
                    logger.log_metrics(arrival.logged, arrival.state.steps)
                told[site] = arrival.told | pulls.get(site, {})
                logged = {f"site/{site}/{key}": value for key, value in arrival.logged.items()}
                pl_module.log_dict(logged, on_step=False, on_epoch=True, batch_size=1, rank_zero_only=False)
            elif arrival.state is not None:  # refused, but it has left the site, whose policy must not forget that
                self.sites[site] = replace(self.sites.get(site, SiteState()), privacy=arrival.state.privacy)
        entry = {"round": plan.round, "sites": told, "faults": plain(gathering.faults)}
        self.history.append({**entry, "seconds": time.perf_counter() - self._began})

    def _train(self, trainer: L.Trainer, plan: RoundPlan, site: Site) -> SiteResult:
        stopping = [c for c in trainer.callbacks if hasattr(c, "stopping")]  # type: ignore[attr-defined]
        deadline = time.monotonic() + (self.policy.deadline or float("inf"))

        def asked_to_stop() -> bool:
            return trainer.received_sigterm or any(callback.stopping for callback in stopping)

        try:
            if self._placed(trainer) == "isolated":
                work = partial(self._train_here, trainer, plan, site, quiet=True)
                return train_isolated(work, None, self.policy.deadline, asked_to_stop)
            return self._train_here(trainer, plan, site, lambda: asked_to_stop() or time.monotonic() > deadline)
        except TrainingInterrupt:
            stops = asked_to_stop()
            if plan.distributed:
                stops = trainer.strategy.reduce_boolean_decision(stops, all=False)
            if not stops:
                raise SiteTimeoutError from None
            raise (SIGTERMException if trainer.received_sigterm else KeyboardInterrupt) from None

    def _train_here(
        self, trainer: L.Trainer, plan: RoundPlan, site: Site, stop: Callable[[], bool], quiet: bool = False
    ) -> SiteResult:
        """Train a site in this process, in a Trainer of its own; a quiet one has no bar and no logger."""
        bar = None
        if trainer.progress_bar_callback is not None and trainer.is_global_zero and not quiet:
            bar = SiteBar(f"  {site.site}")
        make = partial(build_site_trainer, self._factory(trainer), trainer, distributed=plan.distributed)
        return train_site(
            site.site,
            self._template,
            site,
            plan,
            self.sites.get(site.site, SiteState()),
            self.aggregator,
            lambda: make(None if quiet else self.loggers.get(trainer, site.site), bar),
            stop,
            self._privacy.get(site.site),
        )

    def _validate_own(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validate each site's own model on its own data, where it has one or where that was asked for."""
        own = self._sites_have_their_own()
        if not (own or self.validate_sites) or self.aggregator.data == "pooled":
            return
        make = partial(build_site_trainer, self._factory(trainer), trainer, validates=True)
        sites = federated_data(trainer).sites
        found = validate_own(sites, self._template, self._group(trainer), self.model_of, make)
        logged = {f"site/{site}/val/{key}": v for site, values in found.items() for key, v in values.items()}
        logged |= mean_and_worst(found) if own else {}
        pl_module.log_dict(logged, on_step=False, on_epoch=True, batch_size=1, rank_zero_only=False)
        for site, values in found.items():
            self.history[-1]["sites"].setdefault(site, {})["metrics"] = values

    def model_of(self, site: str) -> State:
        """Return the weights that a site would use now: the global ones, with what it keeps for itself."""
        return self.sites.get(site, SiteState()).weights(self._target)

    # --- after a round ------------------------------------------------------------------------------------------------

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log every metric by site too, and the mean and the worst site, which a checkpoint may monitor."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        logged = metrics_by_site(pl_module)
        pl_module.log_dict({key: value for key, value in logged.items() if value == value})
        if self.history:
            self.history[-1]["validation"] = logged

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say in one line how the round went."""
        self._target = {}
        if self.history and trainer.is_global_zero:
            say(trainer, round_line(self.history[-1], int(trainer.max_epochs or 1), time.perf_counter() - self._began))
        self._say_state(trainer, faults_in_words(self.history))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export the sites' own models, where they have any; each loads with ``model.init_weights``."""
        self._say_state(trainer, faults_in_words(self.history), ended=True)
        if not self._sites_have_their_own() or not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
            return
        self._target = state_of(pl_module)
        for name in federated_data(trainer).sites:
            write_model(Path(trainer.default_root_dir), name, self.model_of(name))

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Say that the run failed, and why, in words that hold nothing of a patient."""
        if self._server is None:
            return
        told = str(exception) if isinstance(exception, UserError) else f"{type(exception).__name__}"
        if isinstance(exception, KeyboardInterrupt | SIGTERMException):
            told = "interrupted"
        done = len(self.history) if trainer.state.fn == "fit" else 0
        self._say_state(trainer, f"{told}, after {done} rounds", ended=True, failed=True)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the module its own methods back."""
        if self._server is not None:
            self._server.release()
            self._server = None
        self.loggers.close()

    def state_dict(self) -> dict[str, Any]:
        """Return what the sites and the aggregator keep between rounds: tensors and plain containers."""
        return {
            "sites": {name: state.plain() for name, state in self.sites.items()},
            "aggregator": self.aggregator.state_dict(),
            "loggers": self.loggers.state_dict(),
            "history": self.history,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the last whole round ended."""
        self.sites = {name: SiteState(**kept) for name, kept in state_dict["sites"].items()}
        self.aggregator.load_state_dict(state_dict["aggregator"])
        self.loggers.load_state_dict(state_dict["loggers"])
        self.history = list(state_dict["history"])

    # --- small parts --------------------------------------------------------------------------------------------------

    def target(self, key: str) -> Tensor | None:
        """Return the next global value of a weight, or ``None`` where no round has been run."""
        return self._target.get(key)

    def _sites_have_their_own(self) -> bool:
        own = self.aggregator.personal is not None or not self.aggregator.exchange.global_model
        return own or any(privacy.blocks is not None for privacy in self._privacy.values())

    def _say_state(self, trainer: L.Trainer, reason: str, ended: bool = False, failed: bool = False) -> None:
        """Write ``run_state.json``; every process knows the state, for its exit code."""
        if getattr(trainer, "fast_dev_run", False):
            return
        missing = bool(self.history and self.history[-1].get("faults"))
        word: Any = "failed" if failed else "degraded" if missing else "finished" if ended else "running"
        done, rounds = len(self.history), int(trainer.max_epochs or 1)
        if trainer.is_global_zero:
            self.state = write_state(Path(trainer.default_root_dir), word, reason, done, rounds, ended)
        else:
            self.state = RunState(word, reason, done, rounds, ended)

    def _group(self, trainer: L.Trainer) -> Group:
        return Group(trainer.global_rank, trainer.world_size, trainer.strategy.root_device)

    def _placed(self, trainer: L.Trainer) -> str:
        if trainer.world_size > 1:
            return "per_rank" if self.placement == "auto" else self.placement
        return "isolated" if self.placement == "isolated" else "sequential"

    def _factory(self, trainer: L.Trainer) -> Callable[..., L.Trainer]:
        fast = int(getattr(trainer, "fast_dev_run", False))
        factory: Callable[..., L.Trainer] = self.site_trainer
        return partial(factory, limit_train_batches=fast, limit_val_batches=fast) if fast else factory
