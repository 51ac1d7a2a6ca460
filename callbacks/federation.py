"""Turns ``fit`` into a federation: one epoch of the Trainer is one round over all sites."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from safetensors.torch import save_file
from torch import Tensor

from callbacks.site_loggers import SiteLoggers
from callbacks.site_matrix import show_sites, write_sites
from federation.aggregators.aggregator import Aggregator
from federation.aggregators.bayesian import BayesianAggregator
from federation.alignment import permutation_groups
from federation.blocks import State, schema_of, state_hash
from federation.client import Interrupted, RoundPlan, SiteResult, SiteState, state_of, train_site, validate_site
from federation.datamodule import FederatedDataModule, Site
from federation.drift import Drift
from federation.exchange import share
from federation.isolation import (
    SiteBar,
    budget,
    copy_module,
    keep_metrics_home,
    note_sigterm_alone,
    server_step,
    site_trainer,
)
from federation.partition import Holding
from federation.update import summary
from mtmedformer.errors import ConfigError
from mtmedformer.metrics.task_metrics import TaskMetrics


class Federation(L.Callback):
    """Trains the sites of a ``FederatedDataModule`` in rounds and merges what they learnt, an epoch a round.

    Each site gets a copy of the module with the global weights, a Trainer of its own and a random stream of its own;
    its update is added in the order of the site names, so the result is the same to the last bit however many processes
    share the work. The server step is the Trainer's own optimiser step: validation, checkpoints, early stopping,
    progress bars, loggers and ``--ckpt_path`` count rounds. A checkpoint holds the plain module.

    Args:
        aggregator: How updates become the next global weights; ``null`` is the Bayesian aggregator.
        client_trainer: The Trainer of a site. Its ``max_epochs`` (or ``max_steps``) is the budget of one round, by
            default one epoch; gradient clipping, accumulation and limits of training belong here too.
        placement: ``sequential``: one process trains all sites; ``per_rank``: every process trains some; ``ddp``: all
            processes train each site together. ``auto`` is ``per_rank`` where there are several processes.
        optimizer_state: Whether a site's optimiser starts every round anew or keeps its moments. The learning-rate
            schedule runs over the whole federation either way.
        participation: Share of the sites that take part in a round, drawn with the seed (1 for all); or a list of
            rounds, each a list of site names, that is gone through again and again.
        align: Bring hidden units and attention heads of a site that changed places home to those of the global model
            before its update leaves. In an ordinary round none do, and it costs little.
        validate_sites: Also validate each site's own model on its own data, as ``client/<site>/val/…``. Done in any
            case where sites keep something for themselves (norms, personal models).

    Raises:
        ConfigError: When a value cannot be.
    """

    runs_rounds = True

    def __init__(
        self,
        aggregator: Aggregator | None = None,
        client_trainer: Callable[[], L.Trainer] = L.Trainer,
        placement: Literal["auto", "sequential", "per_rank", "ddp"] = "auto",
        optimizer_state: Literal["reset", "keep"] = "reset",
        participation: float | list[list[str]] = 1.0,
        align: bool = True,
        validate_sites: bool = False,
    ) -> None:
        self.aggregator = aggregator or BayesianAggregator()
        self.client_trainer = client_trainer
        self.placement, self.optimizer_state, self.participation = placement, optimizer_state, participation
        self.align, self.validate_sites = align, validate_sites
        if isinstance(participation, float | int) and not 0 < participation <= 1:
            raise ConfigError(f"federation.participation is {participation}; give a share in (0, 1], or lists of sites")
        if participation == []:
            raise ConfigError("federation.participation is an empty list; give a list of site names for each round")
        self.sites: dict[str, SiteState] = {}
        self.history: list[dict[str, Any]] = []
        self.holdings: list[Holding] = []
        self.loggers = SiteLoggers()
        self._target: State = {}
        self._overridden: list[str] = []
        self._began = 0.0

    # --- set up -------------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Keep a pristine copy of the module for the sites, and make the Trainer's own module the server.

        Raises:
            ConfigError: When the data has no sites, or a setting of the Trainer means nothing to a server.
        """
        if stage != "fit":
            return
        self._check(trainer)
        note_sigterm_alone(trainer)
        warnings.filterwarnings("ignore", r"It is recommended to use `self.log\(.*sync_dist=True")  # equal on all
        self._template = copy_module(pl_module)
        self._schema = schema_of(pl_module)
        self._symmetries = permutation_groups(pl_module) if self.align and self.aggregator.merges else ()
        keep_metrics_home(pl_module)  # every process validates everything, so that all decide alike
        pl_module.automatic_optimization = False
        for name, method in (
            ("configure_optimizers", lambda module: ServerStep(module, self)),
            ("training_step", lambda module, batch, batch_idx: server_step(trainer, trainer.optimizers[0])),
            ("on_train_batch_end", _nothing),
            ("on_train_epoch_end", _nothing),
            ("on_before_optimizer_step", _nothing),
        ):
            setattr(pl_module, name, MethodType(method, pl_module))
            self._overridden.append(name)
        self.holdings = self._data(trainer).holdings()
        if trainer.is_global_zero:
            show_sites(self.holdings)
            if not getattr(trainer, "fast_dev_run", False):
                write_sites(self.holdings, Path(trainer.default_root_dir))
                self._write_quarantines(trainer)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the sites' own runs in W&B, once it is known which run the server is."""
        self.loggers.open(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the seed of the run, from which every site draws its own."""
        self._seed = int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed() % 2**31))
        names = list(self._data(trainer).sites)
        if isinstance(self.participation, list):
            unknown = sorted({name for names_of_round in self.participation for name in names_of_round} - set(names))
            if unknown:
                raise ConfigError(f"federation.participation: no site is called {', '.join(unknown)}")

    # --- a round ------------------------------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Train the sites and merge their updates; the step that follows puts the result in place."""
        self._began = time.perf_counter()
        state = state_of(pl_module)
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
        self.aggregator.start(state, self._schema)
        told: dict[str, Any] = {}
        drift = Drift(self.aggregator, self._schema)
        for result in self._results(trainer, plan):
            site = result.update.site
            drift.add(result.update)
            self.aggregator.add(result.update)
            self.sites[site] = result.state
            told[site] = {**summary(result.update), "moved": result.moved}
            logged = {f"client/{site}/{key}": value for key, value in result.logged.items()}
            pl_module.log_dict(logged, on_step=False, on_epoch=True, batch_size=1, rank_zero_only=False)
        self._target = self.aggregator.finish()
        for site, found in drift.finish(state, self._target).items():
            told[site] |= found
        self.history.append({"round": plan.round, "sites": told, "seconds": time.perf_counter() - self._began})
        self._validate_own(trainer, pl_module)

    def _results(self, trainer: L.Trainer, plan: RoundPlan) -> Iterator[SiteResult]:
        """Yield the results of the round's sites in the order of their names, each on every process."""
        data = self._data(trainer)
        sites = {"pooled": data.pooled()} if self.aggregator.pooled else data.sites
        names = list(sites) if self.aggregator.pooled else self.participants(plan.round, list(sites))
        rank, world, placed = trainer.global_rank, trainer.world_size, self._placed(trainer)
        owners = {name: i % world if placed == "per_rank" else 0 for i, name in enumerate(names)}
        mine = [name for name in names if placed != "per_rank" or owners[name] == rank]
        done: dict[str, SiteResult] = {}
        if placed == "per_rank":  # all of mine first: nobody waits for a process that is still at work for another site
            done = {name: self._train(trainer, plan, sites[name]) for name in mine}
        for name in names:
            result = done.pop(name, None)
            if result is None and name in mine:
                result = self._train(trainer, plan, sites[name])
            yield share(result, owners[name], trainer.strategy.root_device) if world > 1 else _known(result)

    def _train(self, trainer: L.Trainer, plan: RoundPlan, site: Site) -> SiteResult:
        bar = None
        if trainer.progress_bar_callback is not None and trainer.is_global_zero:
            bar = SiteBar(f"  {site.site}")
        make = partial(site_trainer, self._factory(trainer), trainer, distributed=plan.distributed)
        stopping = [c for c in trainer.callbacks if hasattr(c, "stopping")]  # type: ignore[attr-defined]
        try:
            return train_site(
                site.site,
                self._template,
                site,
                plan,
                self.sites.get(site.site, SiteState()),
                self.aggregator,
                lambda: make(self.loggers.get(trainer, site.site), bar),
                lambda: trainer.received_sigterm or any(c.stopping for c in stopping),
            )
        except Interrupted:
            raise (SIGTERMException if trainer.received_sigterm else KeyboardInterrupt) from None

    def participants(self, round: int, names: list[str]) -> list[str]:
        """Return the sites that take part in a round, in the order of their names; at least one.

        Args:
            round: Number of the round, from 0.
            names: All sites.
        """
        if isinstance(self.participation, list):
            return sorted(self.participation[round % len(self.participation)])
        count = max(1, round_half_up(self.participation * len(names)))
        drawn = np.random.default_rng([self._seed, round]).permutation(len(names))[:count]
        return [names[i] for i in sorted(drawn)]

    def _validate_own(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validate each site's own model on its own data, where it has one or where that was asked for."""
        own = self.aggregator.personal_norms or self.aggregator.personal_models or not self.aggregator.merges
        if not (own or self.validate_sites) or self.aggregator.pooled:
            return
        world, rank, scores = trainer.world_size, trainer.global_rank, []
        for i, (name, site) in enumerate(self._data(trainer).sites.items()):
            found: dict[str, float] | None = None
            if i % world == rank and site.val_dataloader():
                make = partial(site_trainer, self._factory(trainer), trainer, validates=True)
                found = validate_site(self._template, site, self.model_of(name), make)
            if world > 1:
                found = share(found, i % world, trainer.strategy.root_device)
            if found:
                logged = {f"client/{name}/val/{key}": value for key, value in found.items()}
                pl_module.log_dict(logged, on_step=False, on_epoch=True, batch_size=1, rank_zero_only=False)
                self.history[-1]["sites"].setdefault(name, {})["metrics"] = found
                scores.append(found.get("score", float("nan")))
        if own and scores:
            mean = {"client/mean_score": float(np.nanmean(scores)), "client/worst_score": float(np.nanmin(scores))}
            pl_module.log_dict(mean, on_step=False, on_epoch=True, batch_size=1, rank_zero_only=False)

    def model_of(self, site: str) -> State:
        """Return the weights that a site would use now: the global ones, with what it keeps for itself."""
        state = self._target | self.sites.get(site, SiteState()).home
        personal = self.aggregator.personal(site, self._target)
        return state | (personal or {}) | self.sites.get(site, SiteState()).own

    # --- after a round ------------------------------------------------------------------------------------------------

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log every metric by site too, and the mean and the worst site, which a checkpoint may monitor."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        primary: dict[str, list[float]] = {}
        logged: dict[str, float] = {}
        for task, metric in getattr(pl_module, "val_metrics", {}).items():
            if not isinstance(metric, TaskMetrics):
                continue
            images = metric.seen()
            for site in sorted(set(images.sites)):
                rows = images.rows[[other == site for other in images.sites]]
                values = metric.overall(rows)
                primary.setdefault(site, []).append(values.get(metric.primary, float("nan")))
                logged |= {f"val/{task}/{k}/site={site}": v for k, v in values.items() if "/" not in k}
        scores = {site: _mean(values) for site, values in primary.items()}
        logged |= {f"client/{site}/val/score": score for site, score in scores.items()}
        known = [score for score in scores.values() if score == score]
        if known:
            logged |= {"val/site_mean": sum(known) / len(known), "val/site_worst": min(known)}
        pl_module.log_dict({key: value for key, value in logged.items() if value == value})
        if self.history:
            self.history[-1]["validation"] = logged

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say in one line how the round went."""
        self._target = {}
        if not trainer.is_global_zero or not self.history:
            return
        last = self.history[-1]
        words = [f"round {trainer.current_epoch + 1}/{trainer.max_epochs}", f"{len(last['sites'])} sites"]
        scores = {k.split("/")[1]: v for k, v in last.get("validation", {}).items() if k.endswith("/val/score")}
        known = {site: score for site, score in scores.items() if score == score}
        if known:
            worst = min(known, key=lambda site: known[site])
            words.append(f"score {_mean(list(known.values())):.3f}, worst {worst} {known[worst]:.3f}")
        words.append(f"{time.perf_counter() - self._began:.1f} s")
        _say(trainer, " · ".join(words))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export the sites' own models, where they have any; each loads with ``model.init_weights``."""
        own = self.aggregator.personal_norms or self.aggregator.personal_models or not self.aggregator.merges
        if not own or not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
            return
        self._target = state_of(pl_module)
        for name in self._data(trainer).sites:
            folder = Path(trainer.default_root_dir, "sites", name)
            folder.mkdir(parents=True, exist_ok=True)
            state = {key: value.contiguous().clone() for key, value in self.model_of(name).items()}
            save_file(state, folder / "model.partial")
            os.replace(folder / "model.partial", folder / "model.safetensors")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the module its own methods back."""
        for name in self._overridden:
            delattr(pl_module, name)
        if self._overridden:
            pl_module.automatic_optimization = True
        self._overridden = []
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

    def _placed(self, trainer: L.Trainer) -> str:
        several = trainer.world_size > 1
        return ("per_rank" if several else "sequential") if self.placement == "auto" or not several else self.placement

    def _factory(self, trainer: L.Trainer) -> Callable[..., L.Trainer]:
        fast = int(getattr(trainer, "fast_dev_run", False))
        factory: Callable[..., L.Trainer] = self.client_trainer
        return partial(factory, limit_train_batches=fast, limit_val_batches=fast) if fast else factory

    def _write_quarantines(self, trainer: L.Trainer) -> None:
        """Write what each site's data set had to leave out into the site's own folder."""
        for name, site in self._data(trainer).sites.items():
            quarantine = getattr(site.source, "quarantine", None)
            if quarantine is not None:
                folder = Path(trainer.default_root_dir, "sites", name)
                folder.mkdir(parents=True, exist_ok=True)
                quarantine.write(folder)

    @staticmethod
    def _data(trainer: L.Trainer) -> FederatedDataModule:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, FederatedDataModule):
            raise ConfigError(
                f"federation: the data is a {type(data).__name__}; make it a federation.FederatedDataModule with the "
                "data set of each site under data.sites, or one data set under data.data and what cuts it under data.by"
            )
        return data

    def _check(self, trainer: L.Trainer) -> None:
        self._data(trainer)
        for name, value, neutral in (
            ("gradient_clip_val", trainer.gradient_clip_val, (None, 0, 0.0)),
            ("accumulate_grad_batches", trainer.accumulate_grad_batches, (1,)),
            ("max_steps", trainer.max_steps, (-1,)),
            ("limit_train_batches", trainer.limit_train_batches, (1, 1.0)),
        ):
            if value not in neutral and not getattr(trainer, "fast_dev_run", False):
                raise ConfigError(
                    f"trainer.{name}={value} means nothing to rounds; set federation.client_trainer.{name} instead"
                )
        if trainer.max_epochs in (None, -1):
            raise ConfigError("trainer.max_epochs counts the rounds; set it to 1 or more")
        if self.placement == "sequential" and trainer.world_size > 1:
            raise ConfigError(
                f"federation.placement=sequential, but trainer.devices starts {trainer.world_size} processes; choose "
                "per_rank or ddp, or one device"
            )
        if trainer.world_size > 1 and not isinstance(trainer.strategy, DDPStrategy):
            raise ConfigError(
                f"trainer.strategy: {type(trainer.strategy).__name__} cannot hold a federation; choose ddp"
            )
        budget(site_trainer(self._factory(trainer), trainer))


class ServerStep(torch.optim.Optimizer):
    """Puts the merged weights in place, bit for bit, as the server's optimiser step.

    Args:
        module: The server's module.
        federation: Holds the next global weights.
    """

    def __init__(self, module: L.LightningModule, federation: Federation) -> None:
        super().__init__([p for p in module.parameters()], {"lr": 1.0})
        self.module, self.federation = module, federation

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Copy every merged weight and buffer."""
        for key, value in self.module.state_dict().items():
            merged = self.federation.target(key)
            if merged is not None:
                value.copy_(merged)


def round_half_up(number: float) -> int:
    """Return the nearest whole number; a half goes up."""
    return int(number + 0.5)


def _nothing(module: L.LightningModule, *args: Any) -> None:
    """Take the place of a hook that belongs to training on images, of which the server has none."""


def _known(result: SiteResult | None) -> SiteResult:
    assert result is not None
    return result


def _mean(values: list[float]) -> float:
    known = [v for v in values if v == v]
    return sum(known) / len(known) if known else float("nan")


def _say(trainer: L.Trainer, line: str) -> None:
    bar = trainer.progress_bar_callback
    if isinstance(bar, ProgressBar):
        bar.print(line)
    else:
        print(line, flush=True)
