"""Short names for content: which weights made a prediction, and of which file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

LENGTH = 16
"""Hexadecimal digits a digest is cut to: 64 bits, plenty to tell models and files apart, short enough for a table."""


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """Return the first digits of the SHA-256 of a model's weights, the same on every device and in every file format.

    Args:
        state: A ``state_dict``. The loss's own parameters are left out, because they take no part in a prediction.
    """
    found = hashlib.sha256()
    for name in sorted(name for name in state if not name.startswith("loss.")):
        tensor = state[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:LENGTH]


def file_digest(file: Path) -> str:
    """Return the first digits of the SHA-256 of a file's bytes, as ``sha256sum`` prints them."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:LENGTH]
