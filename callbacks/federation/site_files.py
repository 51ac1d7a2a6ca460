"""Files about the sites in the run folder: ``sites.json`` and ``sites.png``, and each site's ``sites/<site>/``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save_file

from federation.exchange.schema import State
from federation.partition import Holding, picture
from federation.site_loaders import Site
from mtmedformer.protocols import QuarantiningData
from mtmedformer.storage.atomic_write import atomic_write


def write_sites(holdings: Sequence[Holding], sites: Mapping[str, Site], run: Path) -> None:
    """Write the counts of all sites as JSON and as a picture, and each site's list of unusable images."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "sites.json").write_text(json.dumps([asdict(h) for h in holdings], indent=1) + "\n")
    picture(holdings).savefig(run / "sites.png", dpi=110)
    for name, site in sites.items():
        if isinstance(site.source, QuarantiningData):
            site.source.quarantine.write(_folder(run, name))


def write_model(run: Path, name: str, state: State) -> None:
    """Write a site's own model atomically; it loads with ``model.init_weights``."""
    with atomic_write(_folder(run, name) / "model.safetensors") as part:
        save_file({key: value.contiguous().clone() for key, value in state.items()}, part)


def _folder(run: Path, name: str) -> Path:
    folder = run / "sites" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder
