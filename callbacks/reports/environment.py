"""Versions of software and hardware, which are needed to repeat a run."""

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
"""Names in the report and names of the distributions."""


def versions() -> dict[str, str]:
    """Return the versions of Python and of the main packages, the system and the accelerator."""
    names = {"Python": platform.python_version()}
    for name, package in PACKAGES.items():
        try:
            names[name] = version(package)
        except PackageNotFoundError:  # used from a folder, without an installation
            names[name] = "unknown"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return names | {"system": f"{platform.system()} {platform.machine()}, {device}"}
