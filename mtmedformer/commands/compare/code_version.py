"""The version of the code that can change the result of a training."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.metadata import version
from pathlib import Path

from mtmedformer.storage.hashing import source_digest

PACKAGES = ("mtmedformer", "datamodules", "federation", "callbacks")

WITHOUT_RESULTS = (
    "callbacks/prediction",
    "callbacks/reports",
    "datamodules/audit",
    "mtmedformer/commands/compare",
    "mtmedformer/commands/export",
    "mtmedformer/commands/fingerprint",
    "mtmedformer/commands/load",
    "mtmedformer/commands/sweep",
    "mtmedformer/plots",
)
"""Folders whose code cannot change the result of a training: they draw, print, describe data, or start trainings.

The files of ``mtmedformer/commands`` itself are no part of it: a training runs through them, and they decide which
checkpoint is the best. Code that can change a result must not be moved into one of these folders.
"""

LIBRARIES = ("torch", "lightning", "timm", "torchmetrics", "torchjd", "torchvision", "monai", "numpy")
"""Libraries whose versions can change a result."""

ROOT = Path(__file__).resolve().parents[3]


@cache
def code_version(root: Path = ROOT) -> str:
    """Return the digest of all code outside ``WITHOUT_RESULTS`` and of the versions of ``LIBRARIES``.

    Comments, docstrings and layout are no part of it. A finished training of a study is used again as long as the
    version stays the same.

    Args:
        root: Folder that contains the packages.
    """
    skipped = [root / folder for folder in WITHOUT_RESULTS]
    files = [file for package in PACKAGES for file in (root / package).rglob("*.py")]
    counted = [file for file in files if not any(file.is_relative_to(folder) for folder in skipped)]
    libraries = " ".join(f"{name} {version(name)}" for name in LIBRARIES)
    return hashlib.blake2b(f"{source_digest(counted, root)} {libraries}".encode(), digest_size=16).hexdigest()
