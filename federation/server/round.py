"""One round at the server: train the sites, look at what came, and hand on what is admitted, one update at a time."""

from __future__ import annotations

import gc
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from federation.client.subprocess import SiteCrashError, SiteTimeoutError, SiteTrainingError
from federation.client.train import RoundPlan, SiteResult, SiteState, TrainingInterrupt
from federation.exchange.collectives import share
from federation.exchange.update import Update, load_update, save_update, summary
from federation.server.admission import Fault, Policy, outliers, refusal
from mtmedformer.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """The processes that share the work.

    Attributes:
        rank: Number of this process.
        world: Number of processes.
        device: Where this process's tensors travel.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (a value)

    def share(self, value: T | None, owner: int) -> T:
        """Return what the owner has, on every process."""
        if self.world > 1:
            return share(value, owner, self.device)
        assert value is not None
        return value


@dataclass
class Arrival:
    """What every process learns of a site's round, but for the arrays of its update.

    Attributes:
        site: Name of the site.
        fault: Why it delivered nothing that can be used, or ``None``.
        mistake: A mistake in the configuration, which no site can mend.
        state: What the site keeps.
        logged: Its training metrics.
        told: What the history says of it.
    """

    site: str
    fault: Fault | None = None
    mistake: str = ""
    state: SiteState | None = None
    logged: dict[str, float] = field(default_factory=dict)
    told: dict[str, Any] = field(default_factory=dict)


class Gathering:
    """Gathers the updates of one round; updates wait on disk, so that memory holds one at a time.

    Args:
        plan: What the server said of the round.
        policy: What it does about sites that fail.
        group: The processes that share the work.
        folder: The run folder: updates wait in ``updates/``, what befell a site goes to ``sites/<site>/faults.log``.
            ``None`` leaves nothing behind.

    Attributes:
        arrivals: What came of each site, in the order of the names.
        faults: What sites did not do.
    """

    def __init__(self, plan: RoundPlan, policy: Policy, group: Group, folder: Path | None) -> None:
        self.plan, self.policy, self.group, self.folder = plan, policy, group, folder
        self.arrivals: dict[str, Arrival] = {}
        self.faults: list[Fault] = []
        if folder is not None:
            (folder / "updates").mkdir(parents=True, exist_ok=True)
        waiting = None if folder is None else folder / "updates"
        self._waiting = Path(tempfile.mkdtemp(prefix=f"round-{plan.round + 1}-", dir=waiting))

    def run(
        self, owners: dict[str, int], train: Callable[[str], SiteResult], mine: Sequence[str], at_once: int = 1
    ) -> None:
        """Train this process's sites, exchange what came, and decide who is admitted; all processes decide alike.

        Args:
            owners: By site, in the order of the names, the process that has its update.
            train: Trains one site.
            mine: The sites this process trains.
            at_once: Sites that are trained at the same time, where ``train`` does so in processes of their own.

        Raises:
            ConfigError: When a site cannot train because of a mistake in the configuration.
            RoundError: When the policy does not let the round count.
        """
        if at_once > 1:
            with ThreadPoolExecutor(at_once) as pool:
                own = dict(zip(mine, pool.map(lambda site: self._attempt(site, train), mine), strict=True))
        else:
            own = {site: self._attempt(site, train) for site in mine}
        self.arrivals = {site: self.group.share(own.get(site), owner) for site, owner in owners.items()}
        mistakes = [f"site {a.site}: {a.mistake}" for a in self.arrivals.values() if a.mistake]
        if mistakes:
            raise ConfigError(mistakes[0])
        strangers = outliers(
            {s: a.told["norms"] for s, a in self.arrivals.items() if a.fault is None}, self.policy.outlier
        )
        for site, reason in strangers.items():
            self.arrivals[site].fault = Fault(site, f"refused: {reason}")
        self.faults = [a.fault for a in self.arrivals.values() if a.fault is not None]
        admitted = sum(a.fault is None for a in self.arrivals.values())
        self.policy.check(self.plan.round, len(owners), admitted, self.faults)
        self._owners = owners

    def updates(self) -> Iterator[Update]:
        """Yield the admitted updates in the order of the names, each on every process."""
        for site, arrival in self.arrivals.items():
            if arrival.fault is None:
                file = self._file(site)
                yield self.group.share(load_update(file) if file.exists() else None, self._owners[site])
                file.unlink(missing_ok=True)

    def close(self) -> None:
        """Take away what is left on disk."""
        shutil.rmtree(self._waiting, ignore_errors=True)
        if self.folder is not None:
            with suppress(OSError):  # another process's are still there
                self._waiting.parent.rmdir()

    def _file(self, site: str) -> Path:
        return self._waiting / f"{site}.safetensors"

    def _attempt(self, site: str, train: Callable[[str], SiteResult]) -> Arrival:
        """Train a site, as often as the policy allows, and put its update by."""
        arrival = Arrival(site)
        for attempt in range(self.policy.retries + 1):
            try:
                result = train(site)
            except (TrainingInterrupt, KeyboardInterrupt):
                raise
            except ConfigError as error:
                return Arrival(site, mistake=str(error))
            except Exception as error:
                if self.plan.distributed and not isinstance(error, SiteTimeoutError):
                    raise  # the other processes are still within the site's training, and wait there for this one
                arrival = Arrival(site, Fault(site, _kind(error)))
                self._note(site, "".join(traceback.format_exception(error)))
            else:
                arrival = self._receive(site, result)
            if arrival.fault is None:
                return arrival
            self._note(site, f"attempt {attempt + 1}: {arrival.fault.fault}")
            gc.collect()
            torch.cuda.empty_cache()
        return arrival

    def _receive(self, site: str, result: SiteResult) -> Arrival:
        update = result.update
        reason = refusal(update, self.plan.round, self.plan.base, self.plan.schema)
        if update.site != site:
            reason = "update of another site"
        if reason:
            return Arrival(site, Fault(site, f"refused: {reason}"), state=result.state)
        save_update(update, self._file(site))
        told = {**summary(update), "moved": result.moved}
        if result.privacy:
            told["privacy"] = result.privacy
        return Arrival(site, None, "", result.state, result.logged, told)

    def _note(self, site: str, text: str) -> None:
        """Write what befell a site to the site's own log: it may name files, and stays there."""
        if self.folder is None:
            return
        folder = self.folder / "sites" / site
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "faults.log").open("a") as log:
            log.write(f"round {self.plan.round + 1}: {text.rstrip()}\n")


def _kind(error: Exception) -> str:
    """Say what kind of error it is, in words that hold nothing of a patient."""
    if isinstance(error, SiteTimeoutError):
        return "not done by the deadline"
    if isinstance(error, SiteCrashError):
        return f"its process ended ({error})"
    kind, words = (
        (error.kind, error.words) if isinstance(error, SiteTrainingError) else (type(error).__name__, str(error))
    )
    short = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")
    if kind in ("MemoryError", "OutOfMemoryError") or (kind == "RuntimeError" and any(w in words for w in short)):
        return "out of memory"
    return f"raised {kind}"
