"""What each site finds in its own folder of the run, ``sites/<site>/``."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file

from federation.exchange.schema import State
from federation.site_loaders import Site
from mtmedformer.storage.atomic_write import whole


def write_quarantine(run: Path, name: str, site: Site) -> None:
    """Write what a site's data set had to leave out."""
    quarantine = getattr(site.source, "quarantine", None)
    if quarantine is not None:
        quarantine.write(_folder(run, name))


def write_model(run: Path, name: str, state: State) -> None:
    """Write a site's own model, whole or not at all; it loads with ``model.init_weights``."""
    with whole(_folder(run, name) / "model.safetensors") as part:
        save_file({key: value.contiguous().clone() for key, value in state.items()}, part)


def _folder(run: Path, name: str) -> Path:
    folder = run / "sites" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder
