"""Results of a round: of one site, of its update on disk, and of the round as a whole."""

from __future__ import annotations

from dataclasses import dataclass, field

from federation.client.train import SiteState
from federation.exchange.schema import State
from federation.exchange.update import Update
from federation.server.admission import Fault
from federation.server.history import RoundRecord, SiteRecord


@dataclass
class SiteOutcome:
    """The result of a site's round on every process, without the arrays of its update.

    Attributes:
        site: Name of the site.
        fault: The reason if its update is not used, or ``None``.
        config_error: Message of a configuration error, which ends the run.
        state: State that the site keeps for its next round.
        logged: Its training metrics.
        record: Its entry in the history.
    """

    site: str
    fault: Fault | None = None
    config_error: str = ""
    state: SiteState | None = None
    logged: dict[str, float] = field(default_factory=dict)
    record: SiteRecord | None = None


@dataclass(frozen=True)
class Decoded:
    """An update read from disk, or the reason why it cannot be used."""

    update: Update | None = None
    fault: str = ""


class MergeError(Exception):
    """The update of one site cannot be merged.

    Attributes:
        site: Name of the site.
        reason: The kind of the error, without data of a patient.
    """

    def __init__(self, site: str, reason: str) -> None:
        super().__init__(f"{site}: {reason}")
        self.site, self.reason = site, reason


@dataclass(frozen=True)
class RoundResult:
    """The result of a round, equal on all processes.

    Attributes:
        merged: The next global state.
        states: State of each site that trained, by name.
        logged: Training metrics of every admitted site, by name.
        record: The round's entry in the history.
    """

    merged: State
    states: dict[str, SiteState]
    logged: dict[str, dict[str, float]]
    record: RoundRecord
