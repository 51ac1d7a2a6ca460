"""What a site remembers and tells of what it released, and what its noise is worth, by Opacus' accountant."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from importlib.util import find_spec
from typing import Any

from federation.exchange.schema import State
from mtmedformer.errors import ConfigError

Releases = list[list[float]]
"""Pairs of noise multiplier and number of releases, in the order they were made; a multiplier of 0 had no noise."""

FLATTER, STEEPER = (1.0003, 1.001, 1.003, 1.01, 1.03), (96, 192, 384, 768, 1536, 3072, 6144, 12288, 24576)
"""Orders of Rényi divergence beyond those of Opacus."""


@dataclass(frozen=True)
class Guarantee:
    r"""What can be said of all releases so far.

    Attributes:
        unit: Whose data are protected: the ``site`` as a whole, a ``patient``, or an ``image``.
        epsilon: ε against replacing the unit's data by any other data; ``None`` where some release had no noise.
        epsilon_zeroed: ε against putting zeros in the place of what the unit contributed, the convention of most
            papers; smaller, because what is hidden is half as far away.
        delta: The δ of both.
        releases: Number of releases that the unit can have been part of.
    """

    unit: str
    epsilon: float | None
    epsilon_zeroed: float | None
    delta: float
    releases: int


@dataclass
class PrivacyMemory:
    """What the policy of a site keeps from round to round; it stays at the site.

    Attributes:
        key: Key of the noise in hexadecimal, where the policy was given no seed.
        residual: What rounding has cut off so far, by name of the weight.
        updates: Updates that were sent, by the noise on them.
        examples: Gradients that were taken during local training, by the noise on them.
        norms: Norm of every update before it was clipped, which tells what to set ``clip`` to.
        unit: Whose data ``examples`` is about; empty before there were any.
    """

    key: str = ""
    residual: State = field(default_factory=dict)
    updates: Releases = field(default_factory=list)
    examples: Releases = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    unit: str = ""

    def plain(self) -> dict[str, Any]:
        """Return it as plain containers of tensors and numbers, as a checkpoint may hold."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    def twin(self) -> PrivacyMemory:
        """Return a copy that can be changed; tensors are shared, and replaced rather than changed."""
        updates, examples = [list(pair) for pair in self.updates], [list(pair) for pair in self.examples]
        return PrivacyMemory(self.key, dict(self.residual), updates, examples, list(self.norms), self.unit)


@dataclass(frozen=True)
class PrivacyReport:
    """What left a site in a round; it holds nothing that did not leave.

    Attributes:
        names: Names of the arrays that were sent.
        bytes: Their bytes, as sent.
        sha256: ``federation.exchange.update.sha256`` of the update as sent.
        norm: L2 norm of the whole change before clipping; ``None`` under noise, which it would betray.
        clipped: The same after clipping, before noise and rounding; ``None`` under noise.
        norms: L2 norm of the change as sent, by block.
        site: What noise on updates guarantees so far; ``None`` without it.
        example: What noise on gradients guarantees so far; ``None`` without it.
    """

    names: list[str]
    bytes: int
    sha256: str
    norm: float | None
    clipped: float | None
    norms: dict[str, float]
    site: Guarantee | None
    example: Guarantee | None

    def plain(self) -> dict[str, Any]:
        """Return it as plain JSON values, with unit, ε and δ of the widest guarantee in front of both."""
        widest = self.site or self.example
        spent = asdict(widest) if widest else {"unit": None, "epsilon": None, "delta": None}
        return {**{name: spent[name] for name in ("unit", "epsilon", "delta")}, **asdict(self)}


def add(releases: Releases, noise_multiplier: float, number: int = 1) -> None:
    """Count releases, in place."""
    if releases and releases[-1][0] == noise_multiplier:
        releases[-1][1] += number
    elif number:
        releases.append([noise_multiplier, number])


def guarantee(releases: Releases, unit: str, delta: float) -> Guarantee:
    """Return what the releases of one unit amount to."""
    number = int(sum(count for _, count in releases))
    replaced, zeroed = epsilon(releases, delta, distance=2.0), epsilon(releases, delta)
    return Guarantee(unit, replaced, zeroed, delta, number)


def epsilon(releases: Releases, delta: float, distance: float = 1.0) -> float | None:
    r"""Return the ε at δ of Gaussian releases that follow one another, or ``None`` where one had no noise to speak of.

    Every release is taken to include the unit (sampling rate 1): who takes part in a round is known to the server and
    the order of training is a shuffle, so no amplification by sampling is claimed.

    Args:
        releases: Noise multipliers and how often each was used.
        delta: δ, in (0, 1).
        distance: How far apart two releases without noise can be, in units of the clip.

    Reference:
        Mironov, Rényi Differential Privacy, CSF 2017; ``opacus.accountants.RDPAccountant``.
    """
    if any(noise == 0 for noise, _ in releases):
        return None
    if not releases:
        return 0.0
    require_accountant()
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(noise / distance, 1.0, int(number)) for noise, number in releases]
    orders = [*FLATTER, *RDPAccountant.DEFAULT_ALPHAS, *STEEPER]  # its own end where much or very little noise is best
    found = float(accountant.get_epsilon(delta, alphas=orders))
    return found if math.isfinite(found) else None


def require_accountant() -> None:
    """Refuse noise whose worth cannot be told.

    Raises:
        ConfigError: When Opacus is not installed.
    """
    if find_spec("opacus") is None:
        raise ConfigError("privacy: noise is counted by Opacus, which is missing; pip install 'mtmedformer[privacy]'")
