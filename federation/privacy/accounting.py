"""Privacy accounting: the releases of a site, the (ε, δ) of their noise by Opacus' accountant, and the report."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from typing import Any

from federation.exchange.schema import State
from mtmedformer.errors import ConfigError

Releases = list[list[float]]
"""Pairs of noise multiplier and number of releases, in order; a multiplier of 0 stands for releases without noise."""

FLATTER, STEEPER = (1.0003, 1.001, 1.003, 1.01, 1.03), (96, 192, 384, 768, 1536, 3072, 6144, 12288, 24576)
"""Orders of Rényi divergence beyond those of Opacus."""


@dataclass(frozen=True)
class Guarantee:
    r"""The (ε, δ) guarantee of all releases so far.

    Attributes:
        unit: Protected unit: the whole ``site``, a ``patient``, or an ``image``.
        epsilon: ε for replacing the unit's data by any other data; ``None`` if a release had no noise.
        epsilon_zeroed: ε for replacing the unit's contribution by zeros, the convention of most papers; smaller,
            because the distance is half as large.
        delta: δ of both.
        releases: Number of releases that the unit can have contributed to.
    """

    unit: str
    epsilon: float | None
    epsilon_zeroed: float | None
    delta: float
    releases: int


@dataclass
class PrivacyMemory:
    """The state of a site's privacy policy between rounds; it stays at the site.

    Attributes:
        key: Key of the noise in hexadecimal, if the policy has no seed.
        residual: Rounding error not yet sent, by key.
        updates: Updates sent, by their noise.
        examples: Gradients computed in local training, by their noise.
        norms: Norm of every update before clipping; a basis for the choice of ``clip``.
        unit: Protected unit of ``examples``; empty before the first.
    """

    key: str = ""
    residual: State = field(default_factory=dict)
    updates: Releases = field(default_factory=list)
    examples: Releases = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    unit: str = ""

    def plain(self) -> dict[str, Any]:
        """Return it as plain containers of tensors and numbers, as a checkpoint may hold."""
        return dict(vars(self))

    def twin(self) -> PrivacyMemory:
        """Return a copy to be changed; it shares tensors, which are replaced and never changed in place."""
        updates, examples = [list(pair) for pair in self.updates], [list(pair) for pair in self.examples]
        return PrivacyMemory(self.key, dict(self.residual), updates, examples, list(self.norms), self.unit)


@dataclass(frozen=True)
class PrivacyReport:
    """What a site sent in one round, and the guarantees so far; contains nothing that was not sent.

    Attributes:
        names: Names of the arrays that were sent.
        bytes: Their bytes, as sent.
        sha256: ``federation.exchange.update.sha256`` of the update as sent.
        norm: L2 norm of the whole change before clipping; ``None`` with noise, because the noise does not cover it.
        clipped: The same after clipping, before noise and rounding; ``None`` under noise.
        norms: L2 norm of the change as sent, by block.
        site: Guarantee of the noise on updates so far; ``None`` without noise.
        example: Guarantee of the noise on gradients so far; ``None`` without noise.
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
        """Return it as plain JSON values, with unit, ε and δ of the widest guarantee first."""
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
    """Return the guarantee of the releases of one unit."""
    number = int(sum(count for _, count in releases))
    replaced, zeroed = epsilon(releases, delta, distance=2.0), epsilon(releases, delta)
    return Guarantee(unit, replaced, zeroed, delta, number)


def epsilon(releases: Releases, delta: float, distance: float = 1.0) -> float | None:
    r"""Return ε at δ of consecutive Gaussian releases; ``None`` if one had no noise, or too little for a finite ε.

    Every release is counted as if it contained the unit (sampling rate 1): the server knows which sites take part, and
    the order of training is a shuffle, so no amplification by sampling applies.

    Args:
        releases: Noise multipliers and how often each was used.
        delta: δ, in (0, 1).
        distance: Greatest distance of two releases without noise, in units of the clip.

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
    orders = [
        *FLATTER,
        *RDPAccountant.DEFAULT_ALPHAS,
        *STEEPER,
    ]  # beyond its own orders, for very much or very little noise
    value = float(accountant.get_epsilon(delta, alphas=orders))
    return value if math.isfinite(value) else None


def require_accountant() -> None:
    """Check that Opacus is installed, without which ε cannot be computed.

    Raises:
        ConfigError: When Opacus is not installed.
    """
    if find_spec("opacus") is None:
        raise ConfigError(
            "privacy: Opacus computes the guarantee of the noise and is missing; pip install 'mtmedformer[privacy]'"
        )
