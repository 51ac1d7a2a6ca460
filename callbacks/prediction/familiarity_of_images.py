"""Familiarity of the images of a batch, from their features and the headers of their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from datamodules.audit.header_facts import header_facts
from federation.datamodule import FederatedDataModule
from mtmedformer.batch import Batch, Meta
from mtmedformer.encoders.familiarity import Assessment
from mtmedformer.module import MultiTaskModule
from mtmedformer.protocols import OriginalImages


class ImageFiles:
    """The image files of a Trainer's data.

    Args:
        trainer: A Trainer with a data module; one that keeps no files gives views only.
    """

    def __init__(self, trainer: Trainer) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        sites = {name: site.source for name, site in data.sites.items()} if _federated(data) else {"": data}
        self.sites = {name: source.files for name, source in sites.items() if isinstance(source, OriginalImages)}

    def facts(self, meta: Meta, site: str | None = None) -> dict[str, str]:
        """Return the known facts of an image (see ``datamodules.audit.header_facts.header_facts``).

        Args:
            meta: The image.
            site: Site of the federation whose data set has the image; ``None`` is that of the image itself.
        """
        files: dict[str, Path] = self.sites.get("", {}) or self.sites.get(meta.site if site is None else site, {})
        return header_facts(files.get(meta.id), meta.view)


def assessed(pl_module: LightningModule, batch: Batch, files: ImageFiles) -> list[Assessment]:
    """Return the familiarity of each image of a batch; nothing for a model without one.

    The whole image passes through the encoder once, also where predictions are made in tiles or from samples, as it
    did when the familiarity was fitted.
    """
    familiarity = pl_module.familiarity if isinstance(pl_module, MultiTaskModule) else None
    if familiarity is None or not isinstance(pl_module, MultiTaskModule):
        return []
    return familiarity.assess(pl_module.features(batch.image), [files.facts(meta) for meta in batch.meta])


def columns(assessment: Assessment) -> dict[str, Any]:
    """Return the columns of a table about the familiarity of an image."""
    return {
        "unfamiliar": int(assessment.unfamiliar),
        "unfamiliar:distance": "" if assessment.distance is None else f"{assessment.distance:.4f}",
        "unfamiliar:why": "; ".join(assessment.reasons),
    }


def _federated(data: Any) -> bool:
    return isinstance(data, FederatedDataModule)
