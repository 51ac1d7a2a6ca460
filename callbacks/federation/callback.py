"""Train a federation with ``fit``: one epoch of the Trainer is one round over all sites."""

from __future__ import annotations

import os
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from callbacks.federation.checks import check_data, check_server, declarations, federated_data, tasks_of
from callbacks.federation.console import print_line, round_line, show_sites
from callbacks.federation.server import Server
from callbacks.federation.site_files import write_model, write_sites
from callbacks.federation.site_loggers import SiteLoggers
from callbacks.federation.site_trainers import LocalSteps, Placement, SiteTrainers, processes_of, resolve_placement
from callbacks.federation.site_validation import mean_and_worst, metrics_by_site, primary_metrics, validate_own
from federation.aggregators.base import Aggregator
from federation.aggregators.bayesian import BayesianAggregator
from federation.client.lightning_internals import note_sigterm_per_process
from federation.client.site_trainer import SiteTrainer
from federation.client.train import SiteState, state_of
from federation.exchange.schema import State, schema_of
from federation.exchange.update import WAITING
from federation.partition import Holding
from federation.privacy.policy import PrivacyPolicy, policies_by_site
from federation.server.admission import Policy
from federation.server.history import RoundRecord, SiteRecord, compact, faults_text
from federation.server.participation import Participation, check_participation, taking_part
from federation.server.run_state import RunState, Status, write_state
from federation.site_loaders import Site
from mtmedformer.errors import ConfigError, UserError
from mtmedformer.module import MultiTaskModule


class Federation(L.Callback):
    """Trains the sites of a ``FederatedDataModule`` in rounds and merges their updates; one epoch is one round.

    Each site gets a copy of the module with the global weights, its own Trainer and its own random stream. Updates are
    added in the order of the site names, so that the result is equal to the last bit for any number of processes.
    The server's step takes the place of the Trainer's optimizer step: validation, checkpoints, early stopping, progress
    bars, loggers and ``--ckpt_path`` count rounds. A checkpoint holds the plain module. The module's own hooks
    ``on_train_batch_end`` and ``on_train_epoch_end`` run at the server too, once per round, with empty ``outputs`` and
    with ``self.automatic_optimization`` false.

    A site that fails, exceeds the deadline or sends an unusable update is left out of the round and reported, as set in
    ``policy``; ``run_state.json`` in the run folder holds the state of the run (running, degraded, failed or finished)
    and its reason.

    Args:
        aggregator: How updates become the next global weights; ``null`` is the Bayesian aggregator.
        site_trainer: The Trainer of a site. Its ``max_epochs`` (or ``max_steps``) is the budget of one round, by
            default one epoch; gradient clipping, accumulation and limits of training belong here too.
        local_steps: Optimizer steps of a site per round. ``epochs``: those of ``site_trainer.max_epochs`` epochs on its
            own images. ``raised``: the same, but at least half the mean over the sites, so that a small site does not
            fall behind. ``equal``: every site takes the mean. A number: this many steps. ``site_trainer.max_steps``
            overrides it.
        placement: ``sequential``: one process trains all sites; ``isolated``: each site trains in a process of its own,
            with one thread, so that a crash affects this site only (not on GPUs); ``per_rank``: every process trains
            some sites; ``ddp``: all processes train each site together, and a site that fails on one ends the run.
            ``auto`` is ``per_rank`` where there are several processes.
        sites_at_once: Isolated sites that train at the same time.
        optimizer_state: ``reset``: a site's optimizer starts anew every round; ``keep``: it keeps its moments. The
            learning-rate schedule runs over the whole federation in both cases.
        participation: Share of the sites that take part in a round, drawn with the seed (1 for all); or a list of
            rounds, each a list of site names, which is repeated.
        align: Align the order of a site's hidden units and attention heads to that of the global model before its
            update is sent. In ordinary rounds the order does not change, and the check costs little.
        validate_sites: Validate each site's model after its local training, before the merge, on the site's own
            validation images, as ``site/<site>/trained/…``; the report compares it with the merged model. A site's own
            model that is not exchanged whole (norms, personal models) is always validated, as ``site/<site>/val/…``.
        policy: Handling of sites that fail: quorum, deadline, retries, outliers.
        privacy: Privacy policy of the updates: one for all sites, or one per site name; a site without a policy sends
            its whole update. See ``docs/privacy.md``.

    Raises:
        ConfigError: A value is out of range.
    """

    runs_rounds = True

    def __init__(
        self,
        aggregator: Aggregator | None = None,
        site_trainer: Callable[[], L.Trainer] = L.Trainer,
        local_steps: LocalSteps = "raised",
        placement: Placement = "auto",
        sites_at_once: int = 1,
        optimizer_state: Literal["reset", "keep"] = "reset",
        participation: Participation = 1.0,
        align: bool = True,
        validate_sites: bool = True,
        policy: Policy = Policy(),  # noqa: B008 (frozen)
        privacy: PrivacyPolicy | dict[str, PrivacyPolicy] | None = None,
    ) -> None:
        self.aggregator = aggregator or BayesianAggregator()
        self.site_trainer, self.local_steps = site_trainer, local_steps
        self.placement, self.optimizer_state, self.participation = placement, optimizer_state, participation
        self.sites_at_once, self.align, self.validate_sites, self.policy = sites_at_once, align, validate_sites, policy
        check_participation(participation)
        if isinstance(local_steps, int) and local_steps < 1:
            raise ConfigError(
                f"federation.local_steps is {local_steps}; set 1 or more steps, or raised, equal or epochs"
            )
        if sites_at_once < 1 or (sites_at_once > 1 and placement != "isolated"):
            raise ConfigError(
                f"federation.sites_at_once is {sites_at_once}; sites train at the same time with placement: isolated, "
                "or in several processes with placement: per_rank and trainer.devices"
            )
        self.privacy = privacy
        self.sites: dict[str, SiteState] = {}
        self.history: list[RoundRecord] = []
        self.holdings: list[Holding] = []
        self.loggers = SiteLoggers()
        self.state: RunState | None = None
        self._exported: State = {}
        self._server: Server | None = None
        self._began = 0.0
        self._started = False
        self._steps: dict[str, int] = {}

    @property
    def server(self) -> Server:
        """The server, from ``setup`` to ``teardown``."""
        assert self._server is not None
        return self._server

    @property
    def exit_code(self) -> int:
        """Exit code of the command: 0 finished, 1 failed, 3 degraded."""
        return self.state.exit_code if self.state else 0

    # --- set up -------------------------------------------------------------------------------------------------------

    def check(self, trainer: L.Trainer, pl_module: L.LightningModule, datamodule: object) -> None:
        """Check the settings of the federation; the command line does so before any file is written.

        Args:
            trainer: The Trainer that counts rounds, also before ``fit``.
            pl_module: Its module.
            datamodule: Its data; settings that refer to sites are checked once their names are known.

        Raises:
            ConfigError: The data has no sites, a setting of the Trainer has no effect on a server, a site is unknown,
                or a privacy policy does not fit.
        """
        data = check_data(datamodule)
        check_server(trainer, self.placement, self.policy, self.site_trainer)
        check_participation(self.participation, data.site_names)
        if data.sites:
            training = data.training_sites(tasks_of(pl_module))
            check_participation(self.participation, data.site_names, training)
            schema, distributed = schema_of(pl_module), self.placement == "ddp" and trainer.world_size > 1
            for own in policies_by_site(self.privacy, list(data.sites), self.aggregator).values():
                own.check(pl_module, schema, self.aggregator, distributed)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Keep an untrained copy of the module for the sites, and make the Trainer the server.

        Raises:
            ConfigError: As in ``check``.
        """
        if stage != "fit":
            return
        data = federated_data(trainer)
        if isinstance(pl_module, MultiTaskModule) and pl_module.awaits_tasks:  # before the module's own setup
            pl_module.add_heads(data.tasks)
        self.check(trainer, pl_module, data)
        note_sigterm_per_process(trainer)
        self._exported = {}
        self._started = False
        warnings.filterwarnings("ignore", r"It is recommended to use `self.log\(.*sync_dist=True")  # equal on all
        placement = resolve_placement(self.placement, trainer)
        self._trainers = SiteTrainers(self.site_trainer, trainer, self.loggers, placement)
        self._server = Server(
            trainer,
            pl_module,
            self.aggregator,
            self.policy,
            policies_by_site(self.privacy, list(data.sites), self.aggregator),
            self._trainers,
            self.align,
            self.optimizer_state == "keep",
        )
        self.holdings = data.holdings()
        if trainer.is_global_zero:
            show_sites(self.holdings, data.notes(tasks_of(pl_module)))

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the server's optimizer, and open the sites' own runs, once the server's run is known."""
        self.server.start()
        self.loggers.open(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the seed of the run, from which every site derives its own; write the first files of the run."""
        self.server.seed = int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed() % 2**31))
        self._started = True
        sites, training = federated_data(trainer).sites, self._training_sites(trainer)
        pooled = self.aggregator.data == "pooled"
        self._steps = self._trainers.local_steps(self.local_steps, training, pooled)
        if not pooled:
            site_trainer = self._trainers.validation()
            self.server.declared = declarations(training, self.holdings, site_trainer, self.server.privacy, self._steps)
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            shutil.rmtree(Path(trainer.default_root_dir, WAITING), ignore_errors=True)  # of a killed process
            write_sites(self.holdings, sites, Path(trainer.default_root_dir))
        trainer.strategy.barrier()  # no process writes updates before
        self._write_state(trainer, f"{len(training)} sites")

    # --- a round ------------------------------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Run a round; the optimizer step that follows puts the merged weights in place.

        Raises:
            RoundError: Too few updates were admitted.
        """
        self._began = time.perf_counter()
        data, pooled = federated_data(trainer), self.aggregator.data == "pooled"
        sites = {"pooled": data.pooled()} if pooled else self._training_sites(trainer)
        names = list(sites)
        if not pooled:
            names = taking_part(self.participation, trainer.current_epoch, names, self.server.seed)
        folder = None if trainer.fast_dev_run else Path(trainer.default_root_dir)  # type: ignore[attr-defined]
        result = self.server.run_round(names, self.sites, self.strategy(sites), self.sites_at_once, folder, self._steps)
        self.sites.update(result.states)
        self.history.append(result.record)
        self._log(pl_module, {"round": result.record.round + 1})
        for site, metrics in result.logged.items():
            for logger in self.loggers.get(trainer, site) if self._trainers.placement == "isolated" else ():
                logger.log_metrics(metrics, result.states[site].steps)  # the isolated process could not
            self._log(pl_module, {f"site/{site}/{key}": value for key, value in metrics.items()})
        if self.server.sites_have_own_models and not pooled:
            self._validate_own(trainer, pl_module)

    def strategy(self, sites: dict[str, Any]) -> SiteTrainer:
        """Return the object that trains a site of this round; a subclass may return another."""
        template, privacy = self.server.template, self.server.privacy
        validates = self.validate_sites and self.aggregator.exchange.merged and self.aggregator.data == "sites"
        return self._trainers.strategy(sites, template, self.aggregator, self.policy.deadline, privacy, validates)

    def _validate_own(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validate each site's own model on its own data."""
        sites, processes = self._training_sites(trainer), processes_of(trainer)
        metrics = validate_own(sites, self.server.template, processes, self.model_of, self._trainers.validation)
        logged = {f"site/{site}/val/{key}": v for site, values in metrics.items() for key, v in values.items()}
        self._log(pl_module, logged | mean_and_worst(metrics))
        for site, values in metrics.items():
            self.history[-1].sites.setdefault(site, SiteRecord()).metrics = values

    @staticmethod
    def _training_sites(trainer: L.Trainer) -> dict[str, Site]:
        return federated_data(trainer).training_sites(tasks_of(trainer.lightning_module))

    @staticmethod
    def _log(module: L.LightningModule, metrics: dict[str, float]) -> None:
        module.log_dict(metrics, on_step=False, on_epoch=True, batch_size=1, rank_zero_only=False)

    def model_of(self, site: str) -> State:
        """Return the weights that a site uses now: the merged ones, with those that the site keeps to itself."""
        merged = self._exported if self._server is None else self._exported or self._server.merged
        return self.sites.get(site, SiteState()).weights(merged)

    # --- after a round ------------------------------------------------------------------------------------------------

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log every metric by site too, and the mean and the worst site, which a checkpoint may monitor."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        metrics = metrics_by_site(pl_module)
        pl_module.log_dict({key: value for key, value in metrics.items() if value == value})
        if self.history:
            self.history[-1].validation = metrics

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print one line about the round."""
        self.server.end_round()
        if self.history and trainer.is_global_zero:
            rounds, seconds = int(trainer.max_epochs or 1), time.perf_counter() - self._began
            print_line(trainer, round_line(self.history[-1], rounds, seconds))
        compact(self.history, primary_metrics(pl_module))
        self._write_state(trainer, faults_text(self.history))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export the sites' own models, where they have any; each loads with ``model.init_weights``."""
        self._write_state(trainer, faults_text(self.history), ended=True)
        if not self.server.sites_have_own_models or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._exported = state_of(pl_module)
        for name in self._training_sites(trainer):
            write_model(Path(trainer.default_root_dir), name, self.model_of(name))

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Write that the run failed and the reason, without data of a patient; release the Trainer and the module."""
        if self._server is None:
            return
        reason = str(exception) if isinstance(exception, UserError) else type(exception).__name__
        if isinstance(exception, KeyboardInterrupt | SIGTERMException):
            reason = "interrupted"
        if self._started:  # a run that fails before leaves no file
            self._write_state(trainer, f"{reason}, after {len(self.history)} rounds", ended=True, failed=True)
        self._release()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Release the Trainer and the module, and close the loggers of the sites."""
        self._release()
        self.loggers.close()

    def _release(self) -> None:
        if self._server is not None:
            self._server.release()
            self._server = None

    def _write_state(self, trainer: L.Trainer, reason: str, ended: bool = False, failed: bool = False) -> None:
        """Write ``run_state.json``; every process keeps the state, for its exit code."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        degraded = bool(self.history and self.history[-1].faults)
        status: Status = "failed" if failed else "degraded" if degraded else "finished" if ended else "running"
        done, rounds = len(self.history), int(trainer.max_epochs or 1)
        if trainer.is_global_zero:
            self.state = write_state(Path(trainer.default_root_dir), status, reason, done, rounds, ended)
        else:
            self.state = RunState(status, reason, done, rounds, ended)

    # --- resume -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the sites and the aggregator between rounds, as tensors and plain containers."""
        return {
            "sites": {name: state.plain() for name, state in self.sites.items()},
            "aggregator": self.aggregator.state_dict(),
            "loggers": self.loggers.state_dict(),
            "history": [record.to_dict() for record in self.history],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the last complete round."""
        self.sites = {name: SiteState(**kept) for name, kept in state_dict["sites"].items()}
        self.aggregator.load_state_dict(state_dict["aggregator"])
        self.loggers.load_state_dict(state_dict["loggers"])
        self.history = [RoundRecord.from_dict(record) for record in state_dict["history"]]
