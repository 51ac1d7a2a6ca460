"""Random numbers that cannot be predicted without the key: for privacy noise and for the masks of secure sums."""

from __future__ import annotations

import hashlib
import math
import secrets

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

KEY_BYTES = 32


def new_key() -> bytes:
    """Draw a key from the operating system."""
    return secrets.token_bytes(KEY_BYTES)


def key_of(seed: int) -> bytes:
    """Return the key derived from a seed; the seed determines it."""
    return hashlib.sha256(f"mtmedformer {seed}".encode()).digest()


def words(key: bytes, label: str, count: int) -> NDArray[np.uint64]:
    """Return ``count`` uniform 64-bit words: SHAKE256 of the key and a label, the same on every machine.

    A label must never be used for two different purposes under one key.

    Args:
        key: 32 secret bytes.
        label: Purpose of the words.
        count: Number of words.
    """
    if len(key) != KEY_BYTES:
        raise ValueError(f"a key has {KEY_BYTES} bytes, not {len(key)}")
    stream = hashlib.shake_256(key + label.encode()).digest(8 * count)
    return np.frombuffer(stream, dtype="<u8").astype(np.uint64, copy=False)


def normals(key: bytes, label: str, shape: tuple[int, ...]) -> Tensor:
    """Return standard normal float64 of a shape, from the upper 53 bits of one word each; within ±8.3."""
    bits = words(key, label, math.prod(shape)) >> np.uint64(11)
    uniform = torch.from_numpy((bits.astype(np.float64) + 0.5) * 2.0**-53)
    drawn: Tensor = torch.special.ndtri(uniform)
    return drawn.reshape(shape)
