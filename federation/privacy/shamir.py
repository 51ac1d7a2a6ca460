"""Shamir's secret sharing: any ``threshold`` of the shares give the secret back, fewer say nothing of it."""

from __future__ import annotations

import secrets

from federation.privacy.random_stream import KEY_BYTES

PRIME = 2**521 - 1
"""Order of the field; a Mersenne prime above every secret."""


def split(secret: bytes, shares: int, threshold: int) -> list[int]:
    """Return the values at 1, 2, … of a random polynomial whose value at 0 is the secret.

    Args:
        secret: 32 bytes.
        shares: How many to make.
        threshold: How many of them give the secret back, in 1 … ``shares``.

    Reference:
        Shamir, How to Share a Secret, Communications of the ACM 22, 1979.
    """
    coefficients = [int.from_bytes(secret, "big"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return [sum(c * pow(x, power, PRIME) for power, c in enumerate(coefficients)) % PRIME for x in range(1, shares + 1)]


def join(shares: dict[int, int]) -> bytes:
    """Return the secret from as many shares as the threshold asks for, by their position (from 0) in ``split``.

    Raises:
        OverflowError: When the shares do not belong together (most sets of them).
    """
    total = 0
    for i, value in shares.items():
        top = bottom = 1
        for j in shares:
            if j != i:
                top, bottom = top * (j + 1) % PRIME, bottom * (j - i) % PRIME
        total += value * top * pow(bottom, -1, PRIME)
    return (total % PRIME).to_bytes(KEY_BYTES, "big")
