"""Digests of content: of the weights that made a prediction, of a file, and of program code."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LENGTH = 16
"""Hexadecimal digits a digest is cut to: 64 bits, enough to distinguish models and files."""


WEIGHTS_DIGEST = "weights_sha256"
"""Key of a checkpoint: ``state_hash`` of its ``state_dict``. It finds damaged and exchanged weights, no forgery."""


def state_hash(state: Mapping[str, Tensor], header: str = "") -> str:
    """Return the SHA-256 of every name, dtype, shape and bit of a state, the same on every device and in any order.

    Args:
        state: Tensors by name.
        header: Text that is hashed before the tensors.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256(header.encode())
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest_fits(checkpoint: Mapping[str, Any]) -> bool:
    """Return whether the weights of a checkpoint have the digest that was stored with them, if one was.

    Args:
        checkpoint: Its ``state_dict``, and the digest under ``WEIGHTS_DIGEST``.
    """
    digest = checkpoint.get(WEIGHTS_DIGEST)
    return digest is None or digest == state_hash(checkpoint["state_dict"])


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """Return the first digits of ``state_hash`` of a model.

    Args:
        state: A ``state_dict``. The loss's own parameters are left out, because they take no part in a prediction.
    """
    return state_hash({name: tensor for name, tensor in state.items() if not name.startswith("loss.")})[:LENGTH]


def ensemble_digest(members: Sequence[str]) -> str:
    """Return the digest of an ensemble from the digests of its members, in any order; of a single one its own."""
    if len(members) == 1:
        return members[0]
    return hashlib.sha256(" ".join(sorted(members)).encode()).hexdigest()[:LENGTH]


def file_digest(file: Path) -> str:
    """Return the first digits of the SHA-256 of a file's bytes, as ``sha256sum`` prints them."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:LENGTH]


def source_digest(files: Iterable[Path], root: Path) -> str:
    """Return a digest of Python files that a changed comment, docstring or layout leaves as it is.

    Args:
        files: The files, in any order.
        root: Folder that contains them; their paths below it are part of the digest, its own path is not.

    Raises:
        SyntaxError: A file is not Python.
    """
    total = hashlib.blake2b(digest_size=16)
    for name, file in sorted((file.relative_to(root).as_posix(), file) for file in files):
        total.update(f"{name}\x00{_without_comments(file.read_text(encoding='utf-8'))}\x00".encode())
    return total.hexdigest()


def _without_comments(source: str) -> str:
    """Return the syntax tree of a program as text, without docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body = node.body[1:] or [ast.Pass()]
    return ast.dump(tree)
