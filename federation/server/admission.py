"""The policy for sites that fail: quorum, deadline, retries; and outliers among the updates of a round."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Literal

from mtmedformer.errors import ConfigError, UserError

SPREAD = 1 / 3  # least spread of the logarithms of the norms: where sites agree closely, small deviations are admitted


class RoundError(UserError):
    """Too few updates were admitted; the run ends and can be resumed after the last complete round."""

    exit_code = 1


@dataclass(frozen=True)
class Fault:
    """A failure of a site in a round, and the action taken.

    Attributes:
        site: Name of the site.
        fault: The kind of the error, without its message, which may contain file names.
        action: The action of the server.
    """

    site: str
    fault: str
    action: str = "left out of this round"


@dataclass(frozen=True)
class Policy:
    """How the server handles sites that fail.

    Args:
        quorum: Least number of admitted updates per round: a share of the sites of the round, in (0, 1), or a number of
            sites. A round with fewer ends the run.
        deadline: Time limit of a site per round, in seconds; ``null`` is no limit. It is checked after every batch;
            with ``placement: isolated`` the process of a site that hangs is killed.
        missing: ``continue``: merge the admitted updates; ``fail``: end the run at the first site without one.
        retries: How often the training of a failed site is repeated within the round.
        outlier: Largest distance of a site's change of a block from the median over the sites, in robust standard
            deviations of the logarithm of its norm; a site above it is left out. ``null`` admits every size. Applied
            with three or more sites.

    Raises:
        ConfigError: A value is out of range.
    """

    quorum: float | int = 0.5
    deadline: float | None = None
    missing: Literal["continue", "fail"] = "continue"
    retries: int = 0
    outlier: float | None = 6.0

    def __post_init__(self) -> None:
        if self.quorum <= 0 or (self.quorum > 1 and self.quorum != int(self.quorum)):
            raise ConfigError(f"federation.policy.quorum is {self.quorum}; give a share in (0, 1) or a number of sites")
        if self.deadline is not None and self.deadline <= 0:
            raise ConfigError(f"federation.policy.deadline is {self.deadline}; give seconds above 0, or null")
        if self.retries < 0:
            raise ConfigError(f"federation.policy.retries is {self.retries}; give 0 or more")
        if self.outlier is not None and self.outlier <= 0:
            raise ConfigError(f"federation.policy.outlier is {self.outlier}; give a number above 0, or null")

    def needed(self, sites: int) -> int:
        """Return the least number of admitted updates for a round of so many sites: at least 1, at most all."""
        share = isinstance(self.quorum, float) and self.quorum < 1
        number = math.ceil(self.quorum * sites - 1e-9) if share else int(self.quorum)
        return min(max(1, number), sites)

    def check(self, round: int, sites: int, admitted: int, faults: list[Fault]) -> None:
        """Check that a round has enough admitted updates.

        Raises:
            RoundError: Too few updates were admitted, or a site is missing and ``missing`` is ``fail``.
        """
        reasons = "; ".join(f"{fault.site}: {fault.fault}" for fault in faults)
        if faults and self.missing == "fail":
            raise RoundError(f"round {round + 1}: {reasons}; federation.policy.missing=fail ends the run")
        needed = self.needed(sites)
        if admitted < needed:
            raise RoundError(
                f"round {round + 1}: {admitted} of {sites} sites were admitted and federation.policy.quorum requires "
                f"{needed}; {reasons}. See sites/<site>/faults.log; continue with --ckpt_path=last"
            )


def outliers(norms: Mapping[str, Mapping[str, float]], limit: float | None) -> dict[str, str]:
    """Return the sites whose change of some block is far larger than the others', each with the reason.

    The distance is that of the logarithm of the norm from the median over the sites, in robust standard deviations
    (1.4826 times the median absolute deviation, Hampel 1974). It is at least 1/3: with a limit of 6, no change
    below e² = 7.4 times the median is refused. Small changes are always admitted.

    Args:
        norms: By site and block, the L2 norm of the change.
        limit: Distance above which a site is an outlier; ``None`` admits all.
    """
    reasons: dict[str, str] = {}
    if limit is None:
        return reasons
    for block in sorted({name for held in norms.values() for name in held}):
        logs = {site: math.log(held[block]) for site, held in norms.items() if held.get(block, 0.0) > 0}
        if len(logs) < 3:
            continue
        middle = median(logs.values())
        spread = max(1.4826 * median(abs(value - middle) for value in logs.values()), SPREAD)
        for site, value in logs.items():
            if (value - middle) / spread > limit:
                reasons.setdefault(site, f"change of {block} {math.exp(value - middle):.0f} times the median")
    return reasons
