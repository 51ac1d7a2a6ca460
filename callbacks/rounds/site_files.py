"""What each site finds in its own folder of the run, ``sites/<site>/``."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors.torch import save_file

from federation.blocks import State
from federation.datamodule import Site


def write_quarantine(run: Path, name: str, site: Site) -> None:
    """Write what a site's data set had to leave out."""
    quarantine = getattr(site.source, "quarantine", None)
    if quarantine is not None:
        quarantine.write(_folder(run, name))


def write_model(run: Path, name: str, state: State) -> None:
    """Write a site's own model, whole or not at all; it loads with ``model.init_weights``."""
    folder = _folder(run, name)
    save_file({key: value.contiguous().clone() for key, value in state.items()}, folder / "model.partial")
    os.replace(folder / "model.partial", folder / "model.safetensors")


def _folder(run: Path, name: str) -> Path:
    folder = run / "sites" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder
