"""One round at the server: train the sites, admit their updates, merge them into the next global state."""

from __future__ import annotations

import gc
import shutil
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from federation.aggregators.base import Aggregator
from federation.client.site_trainer import SiteTrainer
from federation.client.subprocess import SiteCrashError, SiteResultError, SiteTimeoutError, SiteTrainingError
from federation.client.train import RoundPlan, SiteResult, SiteState
from federation.exchange.collectives import Processes
from federation.exchange.schema import State
from federation.exchange.update import WAITING, Update, load_update, save_update
from federation.server.admission import Fault, Policy, RoundError, outliers
from federation.server.drift import Drift
from federation.server.history import RoundRecord, SiteRecord
from federation.server.outcome import Decoded, MergeError, RoundResult, SiteOutcome
from federation.server.update_checks import Declaration, Expected
from mtmedformer.errors import ConfigError, DataError


class Round:
    """One round: trains the sites from the global state, admits their updates and merges them.

    Updates are kept on disk, and one at a time is read into memory. The result does not depend on the number of
    processes or on the order in which sites finish: updates are merged in the order of the site names. Use it as a
    context manager, which deletes the updates.

    Args:
        plan: The round's number, global weights and settings, equal for all sites.
        states: State that each site kept from its earlier rounds, by name; not changed.
        aggregator: Merges the updates.
        policy: Handling of sites that fail.
        trainer: Trains one site.
        processes: The processes that share the work.
        folder: The run folder: updates are kept in ``updates/``, faults are logged in ``sites/<site>/faults.log``;
            ``None`` writes neither.
        declared: What is known of the sites from before the first round, by name; an update that counts more is
            refused.
    """

    def __init__(
        self,
        plan: RoundPlan,
        states: Mapping[str, SiteState],
        aggregator: Aggregator,
        policy: Policy,
        trainer: SiteTrainer,
        processes: Processes = Processes(),  # noqa: B008 (frozen)
        folder: Path | None = None,
        declared: Mapping[str, Declaration] | None = None,
    ) -> None:
        self.plan, self.states, self.aggregator, self.policy = plan, states, aggregator, policy
        self.trainer, self.processes, self.folder = trainer, processes, folder
        self.expected = Expected(
            plan.round,
            plan.base,
            plan.schema,
            plan.state,
            aggregator.exchange.local_keys(plan.schema),
            aggregator.site_objective("").sends_extra,
            declared or {},
        )
        waiting = None if folder is None else folder / WAITING
        if waiting is not None:
            waiting.mkdir(parents=True, exist_ok=True)
        self._waiting = Path(tempfile.mkdtemp(prefix=f"round-{plan.round + 1}-", dir=waiting))

    def __enter__(self) -> Round:
        return self

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self._waiting, ignore_errors=True)
        if self.folder is not None:
            with suppress(OSError):  # not empty: another process has updates there
                self._waiting.parent.rmdir()

    def run(self, sites: Sequence[str], divide: bool = False, at_once: int = 1) -> RoundResult:
        """Train the sites and merge their updates.

        Args:
            sites: The sites of the round, in the order of their names.
            divide: Whether every process trains some of the sites; otherwise each process takes part in all of them.
            at_once: Number of sites that train at the same time, where each has a process of its own.

        Raises:
            ConfigError: A site cannot train because of the configuration.
            SiteResultError: The disk has no room for the result of a site.
            RoundError: Too few updates were admitted.
            TrainingInterrupt: The run was stopped.
        """
        began = time.perf_counter()
        owners = {site: i % self.processes.world if divide else 0 for i, site in enumerate(sites)}
        mine = [site for site in sites if not divide or owners[site] == self.processes.rank]
        outcomes = self._share(owners, self._train(mine, at_once))
        self._admit(outcomes)
        merged = self._merge(outcomes, owners)
        faults = self._faults(outcomes)
        admitted = {site: outcome for site, outcome in outcomes.items() if outcome.fault is None}
        records = {site: outcome.record for site, outcome in admitted.items() if outcome.record is not None}
        return RoundResult(
            merged=merged,
            states=self._kept(outcomes),
            logged={site: outcome.logged for site, outcome in admitted.items()},
            record=RoundRecord(self.plan.round, records, faults, time.perf_counter() - began),
        )

    def _train(self, mine: Sequence[str], at_once: int) -> dict[str, SiteOutcome]:
        """Train the sites of this process."""
        if at_once > 1:
            with ThreadPoolExecutor(at_once) as pool:
                return dict(zip(mine, pool.map(self._attempt, mine), strict=True))
        return {site: self._attempt(site) for site in mine}

    def _share(self, owners: Mapping[str, int], own: Mapping[str, SiteOutcome]) -> dict[str, SiteOutcome]:
        """Return the outcomes of all sites on every process."""
        outcomes = {site: self.processes.share(own.get(site), owner) for site, owner in owners.items()}
        for site, outcome in outcomes.items():
            if outcome.config_error:
                raise ConfigError(f"site {site}: {outcome.config_error}")
        return outcomes

    def _admit(self, outcomes: dict[str, SiteOutcome]) -> None:
        """Refuse outliers, and apply the policy."""
        norms = {s: o.record.norms for s, o in outcomes.items() if o.fault is None and o.record is not None}
        for site, reason in outliers(norms, self.policy.outlier).items():
            outcomes[site].fault = Fault(site, f"refused: {reason}")
        self._faults(outcomes)

    def _faults(self, outcomes: Mapping[str, SiteOutcome]) -> list[Fault]:
        """Return the faults of the round.

        Raises:
            RoundError: The policy does not continue with them.
        """
        faults = [outcome.fault for outcome in outcomes.values() if outcome.fault is not None]
        self.policy.check(self.plan.round, len(outcomes), len(outcomes) - len(faults), faults)
        return faults

    def _merge(self, outcomes: Mapping[str, SiteOutcome], owners: Mapping[str, int]) -> State:
        """Merge the admitted updates; a site whose update cannot be merged is left out, and the merge begins anew."""
        before = self.aggregator.state_dict()
        while True:
            try:
                return self._merged(outcomes, owners)
            except MergeError as error:
                outcomes[error.site].fault = Fault(error.site, error.reason)
                self.aggregator.load_state_dict(before)
                self._faults(outcomes)

    def _merged(self, outcomes: Mapping[str, SiteOutcome], owners: Mapping[str, int]) -> State:
        """Add the admitted updates one at a time, complete their records, and return the next global state.

        Raises:
            MergeError: The update of a site cannot be merged.
            RoundError: A merged weight is not finite.
        """
        counts = {site: o.record.examples() for site, o in outcomes.items() if o.fault is None and o.record is not None}
        self.aggregator.expect(counts, self.plan.schema)
        self.aggregator.start(self.plan.state, self.plan.schema)
        drift = Drift(self.aggregator, self.plan.schema)
        for update in self._updates(outcomes, owners):
            failed = ""
            try:
                drift.add(update)
                self.aggregator.add(update)
            except Exception as error:
                failed = f"its update could not be merged (raised {type(error).__name__})"
                self._log_fault(update.site, "".join(traceback.format_exception(error)))
            if self.processes.any(bool(failed)):
                raise MergeError(update.site, failed or "its update could not be merged on another process")
        merged = self.aggregator.finish()
        wrong = [key for key, value in merged.items() if value is not self.plan.state.get(key) and not _finite(value)]
        if wrong:
            raise RoundError(
                f"round {self.plan.round + 1}: the merged weights are not finite ({wrong[0]}); continue from the last "
                "complete round with --ckpt_path=last and a lower learning rate or another aggregator"
            )
        for site, measured in drift.finish(self.plan.state, merged).items():
            record = outcomes[site].record
            assert record is not None
            record.cosine, record.share = measured.cosine, measured.share
        return merged

    def _updates(self, outcomes: Mapping[str, SiteOutcome], owners: Mapping[str, int]) -> Iterator[Update]:
        """Yield the admitted updates in the order of the site names, each on every process.

        Raises:
            MergeError: The file of a site cannot be read any more.
        """
        for site, outcome in outcomes.items():
            if outcome.fault is None:
                own = self._decode(site) if self.processes.rank == owners[site] else None
                decoded = self.processes.share(own, owners[site])
                if decoded.update is None:
                    raise MergeError(site, decoded.fault)
                yield decoded.update

    def _decode(self, site: str) -> Decoded:
        """Read the update of a site from disk, and check it."""
        try:
            update = load_update(self._file(site))
            reason = self.expected.refusal(site, update)
        except DataError as error:
            self._log_fault(site, str(error))
            return Decoded(fault="refused: its update cannot be read")
        except Exception as error:
            self._log_fault(site, "".join(traceback.format_exception(error)))
            return Decoded(fault=f"refused: its update could not be checked (raised {type(error).__name__})")
        return Decoded(fault=f"refused: {reason}") if reason else Decoded(update)

    def _kept(self, outcomes: Mapping[str, SiteOutcome]) -> dict[str, SiteState]:
        """Return the new states of the sites. A refused update was sent too, so it counts for the privacy account."""
        kept = {}
        for site, outcome in outcomes.items():
            if outcome.state is not None:
                before = self.states.get(site, SiteState())
                kept[site] = outcome.state if outcome.fault is None else replace(before, privacy=outcome.state.privacy)
        return kept

    def _attempt(self, site: str) -> SiteOutcome:
        """Train a site, repeat it as often as the policy allows, and write its update to disk."""
        outcome = SiteOutcome(site)
        for attempt in range(self.policy.retries + 1):
            try:
                result = self.trainer.train(site, self.plan, self.states.get(site, SiteState()))
            except (ConfigError, MisconfigurationException) as error:
                return SiteOutcome(site, config_error=str(error))
            except SiteResultError:
                raise
            except Exception as error:
                if self.plan.distributed and not isinstance(error, SiteTimeoutError):
                    raise  # the other processes still train the site, and would wait for this one for ever
                outcome = SiteOutcome(site, Fault(site, _fault_of(error)))
                self._log_fault(site, "".join(traceback.format_exception(error)))
            else:
                outcome = self._receive(site, result)
            if outcome.fault is None:
                return outcome
            self._log_fault(site, f"attempt {attempt + 1}: {outcome.fault.fault}")
            gc.collect()
            torch.cuda.empty_cache()
        return outcome

    def _receive(self, site: str, result: SiteResult) -> SiteOutcome:
        """Write an update to disk as it was sent, and check what is read back."""
        try:
            save_update(result.update, self._file(site))
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            self._log_fault(site, "".join(traceback.format_exception(error)))
            fault = Fault(site, f"refused: its update has no form ({type(error).__name__})")
            return SiteOutcome(site, fault, state=result.state)
        decoded = self._decode(site)
        if decoded.update is None:
            return SiteOutcome(site, Fault(site, decoded.fault), state=result.state)
        record = SiteRecord.of(decoded.update, result.moved, result.privacy, result.trained)
        logged = result.logged | {f"trained/{key}": value for key, value in result.trained.items()}
        return SiteOutcome(site, state=result.state, logged=logged, record=record)

    def _file(self, site: str) -> Path:
        return self._waiting / f"{site}.safetensors"

    def _log_fault(self, site: str, text: str) -> None:
        """Append to the log of the site, which may contain file names and is not sent."""
        if self.folder is None:
            return
        folder = self.folder / "sites" / site
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "faults.log").open("a") as log:
            log.write(f"round {self.plan.round + 1}: {text.rstrip()}\n")


def _finite(value: Tensor) -> bool:
    return not value.is_floating_point() or bool(torch.isfinite(value).all())


def _fault_of(error: Exception) -> str:
    """Return the kind of an error, without its message, which may contain data of a patient."""
    if isinstance(error, SiteTimeoutError):
        return "not done by the deadline"
    if isinstance(error, SiteCrashError):
        return f"its process ended ({error})"
    kind, message = type(error).__name__, str(error)
    if isinstance(error, SiteTrainingError):
        kind, message = error.kind, error.message
    short = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")
    if kind in ("MemoryError", "OutOfMemoryError") or (kind == "RuntimeError" and any(s in message for s in short)):
        return "out of memory"
    return f"raised {kind}"
