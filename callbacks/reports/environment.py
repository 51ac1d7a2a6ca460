"""Versions and machine: what a report says so that somebody else can repeat a run."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

PACKAGES = {
    "MTMedFormer": "mtmedformer",
    "PyTorch": "torch",
    "Lightning": "lightning",
    "timm": "timm",
    "TorchMetrics": "torchmetrics",
    "MONAI": "monai",
    "NumPy": "numpy",
}
"""What is named, and what it is called among the packages."""


def versions() -> dict[str, str]:
    """Return the versions that matter for a repeat of a run, the system and the accelerator."""
    found = {"Python": platform.python_version()}
    for name, package in PACKAGES.items():
        try:
            found[name] = version(package)
        except PackageNotFoundError:  # used from a folder, without an installation
            found[name] = "unknown"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return found | {"system": f"{platform.system()} {platform.machine()}, {device}"}
