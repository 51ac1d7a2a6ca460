r"""Secure summation by pairwise masks: the server receives the total over sites and no single summand.

A library building block: ``fit`` does not use it (see ``docs/privacy.md``).

After Bonawitz et al., Practical Secure Aggregation for Privacy-Preserving Machine Learning, CCS 2017, in its terms:

- *Fixed-point encoding modulo $2^{64}$*: $x \mapsto \lfloor x\, 2^{32} \rceil \bmod 2^{64}$, where masks can
  be uniform and sums are exact.
- *Pairwise masks*: every two sites share a seed; one adds the random stream derived from it and the session, the
  other subtracts it.
- *Self masks*: each site adds a stream derived from a seed of its own. It hides an update that arrives after the server
  declared its site dropped and removed its pairwise masks.
- *Dropout recovery*: seeds are Shamir-shared among the sites. For every site the server receives either its self seed
  (it delivered) or its pairwise seeds (it dropped out), never both; the other sites enforce this.

Not included: the agreement on pairwise seeds, which the caller provides (the paper uses Diffie-Hellman); the channels
between sites, which the server must not read (the paper encrypts the shares); signatures. The protocol protects against
a server that follows it but inspects what it receives, also if fewer sites than the threshold collude with it. A sum
over two sites reveals to each of them the summand of the other, as every sum does.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from federation.privacy.random_stream import KEY_BYTES, new_key, words

FRACTION = 32
"""Binary digits after the point: steps of 2.3e-10, sums within ±2³¹."""

PRIME = 2**521 - 1
"""Order of the field; a Mersenne prime above every secret."""

Masked = dict[str, NDArray[np.uint64]]
"""The masked summands of a site by name: uniform modulo 2⁶⁴ without the masks."""


def encode(value: Tensor, sites: int) -> NDArray[np.uint64]:
    """Return the fixed-point form of a tensor, modulo 2⁶⁴, flat.

    Args:
        value: Finite numbers.
        sites: Number of summands; a sum of that many values of this size must fit.

    Raises:
        OverflowError: When the sum could leave the range.
    """
    limit = 2.0 ** (63 - FRACTION) / sites
    if not bool((value.abs() < limit).all()):  # also when it is not a number
        raise OverflowError(f"values beyond ±{limit:g} do not fit a sum over {sites} sites; scale them down")
    return (value.double().cpu() * 2.0**FRACTION).round_().to(torch.int64).reshape(-1).numpy().view(np.uint64)


def decode(total: NDArray[np.uint64], shape: tuple[int, ...]) -> Tensor:
    """Return float64 of a sum of encoded numbers."""
    return torch.from_numpy(total.view(np.int64).astype(np.float64) * 2.0**-FRACTION).reshape(shape)


def split(secret: bytes, shares: int, threshold: int) -> list[int]:
    """Split a secret by Shamir's scheme: the values at 1, 2, … of a random polynomial whose value at 0 is the secret.

    Args:
        secret: 32 bytes.
        shares: Number of shares.
        threshold: Number of shares that restore the secret, in 1 … ``shares``; fewer contain no information on it.

    Reference:
        Shamir, How to Share a Secret, Communications of the ACM 22, 1979.
    """
    coefficients = [int.from_bytes(secret, "big"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return [sum(c * pow(x, power, PRIME) for power, c in enumerate(coefficients)) % PRIME for x in range(1, shares + 1)]


def join(shares: dict[int, int]) -> bytes:
    """Restore a secret from ``threshold`` shares, by their position (from 0) in ``split``.

    Raises:
        OverflowError: When the shares do not belong together (detected for most such sets).
    """
    total = 0
    for i, value in shares.items():
        top = bottom = 1
        for j in shares:
            if j != i:
                top, bottom = top * (j + 1) % PRIME, bottom * (j - i) % PRIME
        total += value * top * pow(bottom, -1, PRIME)
    return (total % PRIME).to_bytes(KEY_BYTES, "big")


class Member:
    """One site's side of one sum; not reusable.

    Args:
        site: The site's name.
        seeds: The seed shared with every other site, 32 bytes each, by name. Only values derived from it for a session
            are ever revealed, so it can be used for other sessions.
        session: Identifier of this sum, unique under the same seeds; never used twice.
        threshold: Number of sites that must complete the protocol, more than half of all; as many shares reveal a seed.

    Raises:
        ValueError: When the threshold is no majority of the sites, or a seed is not 32 bytes long.
    """

    def __init__(self, site: str, seeds: Mapping[str, bytes], session: str, threshold: int) -> None:
        self.site, self.threshold = site, threshold
        self.sites = sorted([site, *seeds])
        if not len(self.sites) / 2 < threshold <= len(self.sites):
            raise ValueError(
                f"threshold {threshold} of {len(self.sites)} sites; it must be more than half, at most all"
            )
        if any(len(seed) != KEY_BYTES for seed in seeds.values()):
            raise ValueError(f"a pairwise seed is not {KEY_BYTES} bytes long")
        self._pairs = {other: _session_seed(seed, session) for other, seed in seeds.items()}
        self._own = new_key()
        self._held: dict[str, dict[str, int]] = {}
        self._masked = self._revealed = False

    def shares(self) -> dict[str, dict[str, int]]:
        """Return by recipient its shares of this site's seeds: ``self``, and ``pair <site>`` for every other site."""
        secrets = {"self": self._own, **{f"pair {other}": seed for other, seed in self._pairs.items()}}
        cut = {name: split(secret, len(self.sites), self.threshold) for name, secret in secrets.items()}
        return {site: {name: cut[name][i] for name in secrets} for i, site in enumerate(self.sites)}

    def keep(self, sender: str, share: dict[str, int]) -> None:
        """Store the shares received from another site, or from this one."""
        self._held[sender] = share

    def mask(self, values: Mapping[str, Tensor]) -> Masked:
        """Return this site's masked summands; every site must use the same names and shapes.

        Raises:
            RuntimeError: On a second call: two sums under one mask would reveal their difference.
        """
        if self._masked:
            raise RuntimeError(f"{self.site}: a mask serves one sum only; start another session")
        self._masked = True
        return {
            name: encode(value, len(self.sites)) + self._mask(name, value.numel()) for name, value in values.items()
        }

    def reveal(self, delivered: Sequence[str]) -> dict[str, dict[str, int]]:
        """Return the shares that remove the masks: of self seeds of delivered sites, of pairwise seeds of the others.

        Raises:
            RuntimeError: On a second call, or when too few sites delivered.
        """
        if self._revealed:
            raise RuntimeError(f"{self.site}: both seeds of a site would reveal its summand; shares are sent only once")
        if len(delivered) < self.threshold:
            raise RuntimeError(f"{self.site}: {len(delivered)} sites delivered, {self.threshold} are required")
        self._revealed = True
        stays = set(delivered)
        return {
            sender: {name: share for name, share in held.items() if _needed(name, sender in stays, stays)}
            for sender, held in self._held.items()
        }

    def _mask(self, name: str, count: int) -> NDArray[np.uint64]:
        total = words(self._own, name, count)
        for other, seed in self._pairs.items():
            stream = words(seed, name, count)
            total = total + stream if self.site < other else total - stream
        return total


class SecureSum:
    """The server's side of one sum.

    Args:
        sites: Names of all sites.
        threshold: The same as at every site.
        shapes: Shape of every summand by name.
    """

    def __init__(self, sites: Sequence[str], threshold: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.sites, self.threshold, self.shapes = sorted(sites), threshold, dict(shapes)
        self.delivered: list[str] = []
        self._total: Masked = {}

    def add(self, site: str, masked: Masked) -> None:
        """Add the masked summands of a site."""
        self.delivered.append(site)
        for name in self.shapes:
            self._total[name] = self._total[name] + masked[name] if name in self._total else masked[name].copy()

    def finish(self, revealed: Mapping[str, dict[str, dict[str, int]]]) -> dict[str, Tensor]:
        """Return the sums over the sites that delivered, float64.

        Args:
            revealed: By site that answered, the result of its ``reveal``.

        Raises:
            RuntimeError: When fewer than the threshold answered.
        """
        if len(revealed) < self.threshold:
            raise RuntimeError(f"{len(revealed)} sites answered, {self.threshold} are required: the sum is lost")
        for site in self.sites:
            if site in self.delivered:
                self._add(self._seed(revealed, site, "self"), sign=-1)
                continue
            for other in self.delivered:  # their mask of the pair was not cancelled
                seed = self._seed(revealed, site, f"pair {other}")
                self._add(seed, sign=-1 if other < site else 1)
        return {name: decode(self._total[name], shape) for name, shape in self.shapes.items()}

    def _seed(self, revealed: Mapping[str, dict[str, dict[str, int]]], site: str, name: str) -> bytes:
        known = {self.sites.index(by): shares[site][name] for by, shares in revealed.items()}
        return join(dict(list(known.items())[: self.threshold]))

    def _add(self, seed: bytes, sign: int) -> None:
        for name, total in self._total.items():
            stream = words(seed, name, total.size)
            self._total[name] = total + stream if sign > 0 else total - stream


def _needed(name: str, delivered: bool, stays: set[str]) -> bool:
    """Return whether a share is needed to remove the masks; of a dropped site only its pairs with delivered sites."""
    return name == "self" if delivered else name.removeprefix("pair ") in stays and name != "self"


def _session_seed(seed: bytes, session: str) -> bytes:
    """Return a pair's seed for one session, from which the pair's own seed cannot be computed."""
    return words(seed, f"session {session}", KEY_BYTES // 8).astype("<u8").tobytes()
