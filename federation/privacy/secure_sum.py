r"""Sums over sites of which the server learns the total and no summand: secure aggregation by pairwise masks.

After Bonawitz et al., Practical Secure Aggregation for Privacy-Preserving Machine Learning, CCS 2017, with its terms:

- *Fixed-point encoding modulo $2^{64}$*: $x \mapsto \lfloor x\, 2^{32} \rceil \bmod 2^{64}$, where masks can
  be uniform and sums are exact.
- *Pairwise masks*: every two sites share a seed; one adds the stream that comes of it and of the session, the other
  subtracts it.
- *Self masks*: each site adds a stream of its own seed, which hides an update that arrives after the server took its
  site for dropped and undid its pairwise masks.
- *Dropout recovery*: seeds are Shamir-shared among the sites. For every site the server learns either its self seed
  (it delivered) or its pairwise seeds (it dropped out), never both: the other sites see to that.

Not here, and so the limits: the agreement on pairwise seeds, which are handed in (the paper agrees on them by
Diffie-Hellman); the channels on which sites hand each other their shares, which the server must not read (the paper
encrypts them); signatures. This protects from a server that is curious but keeps to the protocol, also where fewer
sites than the threshold side with it. A sum over two sites tells each of them the other's summand, as every sum must.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from federation.privacy.random_stream import KEY_BYTES, new_key, words
from federation.privacy.shamir import join, split

FRACTION = 32
"""Binary digits after the point: steps of 2.3e-10, sums within ±2³¹."""

Masked = dict[str, NDArray[np.uint64]]
"""By name, what a site sends: uniform modulo 2⁶⁴ to all who lack a mask."""


def encode(value: Tensor, sites: int) -> NDArray[np.uint64]:
    """Return the fixed-point form of a tensor, modulo 2⁶⁴, flat.

    Args:
        value: Finite numbers.
        sites: Number of summands; the sum of as many numbers of this size must fit.

    Raises:
        OverflowError: When the sum could leave the range.
    """
    limit = 2.0 ** (63 - FRACTION) / sites
    if not bool((value.abs() < limit).all()):  # also when it is not a number
        raise OverflowError(f"numbers beyond ±{limit:g} do not fit the sum of {sites} sites; scale them down")
    return (value.double().cpu() * 2.0**FRACTION).round_().to(torch.int64).reshape(-1).numpy().view(np.uint64)


def decode(total: NDArray[np.uint64], shape: tuple[int, ...]) -> Tensor:
    """Return float64 of a sum of encoded numbers."""
    return torch.from_numpy(total.view(np.int64).astype(np.float64) * 2.0**-FRACTION).reshape(shape)


class Member:
    """One site's side of one sum; it serves once.

    Args:
        site: The site's name.
        seeds: The seed it shares with every other site, 32 bytes each, by name. Only what is derived from it for the
            session is ever shared out, so it serves for other sessions too.
        session: What tells this sum from every other under the same seeds; never used twice.
        threshold: Sites that must stay to the end, more than half of all; so many shares give a seed away.

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
        """Return, by recipient, its share of this site's seeds, by ``self`` or the name of the other site of a pair."""
        secrets = {"self": self._own, **{f"pair {other}": seed for other, seed in self._pairs.items()}}
        cut = {name: split(secret, len(self.sites), self.threshold) for name, secret in secrets.items()}
        return {site: {name: cut[name][i] for name in secrets} for i, site in enumerate(self.sites)}

    def keep(self, sender: str, share: dict[str, int]) -> None:
        """Keep what another site, or this one, has shared."""
        self._held[sender] = share

    def mask(self, values: Mapping[str, Tensor]) -> Masked:
        """Return what is sent of this site's summands; every site must have the same names and shapes.

        Raises:
            RuntimeError: When it was asked for before: two sums under one mask would give their difference away.
        """
        if self._masked:
            raise RuntimeError(f"{self.site}: one mask, one sum; begin another session")
        self._masked = True
        return {
            name: encode(value, len(self.sites)) + self._mask(name, value.numel()) for name, value in values.items()
        }

    def reveal(self, delivered: Sequence[str]) -> dict[str, dict[str, int]]:
        """Return the shares that undo the masks: of self seeds for who delivered, of pairwise seeds for who did not.

        Raises:
            RuntimeError: When it was asked before, or when too few delivered.
        """
        if self._revealed:
            raise RuntimeError(f"{self.site}: both seeds of a site would lay its summand bare; this site answers once")
        if len(delivered) < self.threshold:
            raise RuntimeError(f"{self.site}: {len(delivered)} sites delivered, and {self.threshold} must")
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
        threshold: As every site has it.
        shapes: Shape of every summand by name.
    """

    def __init__(self, sites: Sequence[str], threshold: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.sites, self.threshold, self.shapes = sorted(sites), threshold, dict(shapes)
        self.delivered: list[str] = []
        self._total: Masked = {}

    def add(self, site: str, masked: Masked) -> None:
        """Add what a site sent."""
        self.delivered.append(site)
        for name in self.shapes:
            self._total[name] = self._total[name] + masked[name] if name in self._total else masked[name].copy()

    def finish(self, revealed: Mapping[str, dict[str, dict[str, int]]]) -> dict[str, Tensor]:
        """Return the sums over the sites that delivered, float64.

        Args:
            revealed: By site that answered, what its ``reveal`` returned.

        Raises:
            RuntimeError: When fewer than the threshold answered.
        """
        if len(revealed) < self.threshold:
            raise RuntimeError(f"{len(revealed)} sites answered, and {self.threshold} must: the sum is lost")
        for site in self.sites:
            if site in self.delivered:
                self._add(self._seed(revealed, site, "self"), sign=-1)
                continue
            for other in self.delivered:  # what they added for the pair has nobody to cancel it
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
    """Tell whether a share is needed to undo the masks; of a dropped site only the pairs with sites that stayed are."""
    return name == "self" if delivered else name.removeprefix("pair ") in stays and name != "self"


def _session_seed(seed: bytes, session: str) -> bytes:
    """Return the seed of a pair for one session, from which the pair's own cannot be told."""
    return words(seed, f"session {session}", KEY_BYTES // 8).astype("<u8").tobytes()
