"""Familiarity of images: fitted on the training images at the end of ``fit``, measured for each image of ``test``."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from callbacks.evaluation.fit_familiarity import add_familiarity
from callbacks.federation.site_trainers import processes_of
from callbacks.prediction.familiarity_of_images import ImageFiles, assessed, columns
from mtmedformer.batch import Batch
from mtmedformer.encoders.familiarity import Assessment, DistanceSums
from mtmedformer.errors import ConfigError
from mtmedformer.module import MultiTaskModule
from mtmedformer.storage.atomic_write import atomic_write
from mtmedformer.storage.safe_text import cell, printable


@dataclass(frozen=True)
class TestedImage:
    """Familiarity of one test image.

    Attributes:
        id: Name of the image.
        site: Its site.
        view: Its view, if it is known.
        assessment: Its distance and the reasons why it is unfamiliar.
    """

    id: str
    site: str
    view: str
    assessment: Assessment


@dataclass(frozen=True)
class TestDrift:
    """Familiarity of the test images, against the validation images of the training.

    Attributes:
        images: The test images.
        validation: Distances of the validation images.
        limit: Largest distance of a familiar image.
        quantile: Quantile of the validation distances that is the limit.
    """

    images: tuple[TestedImage, ...]
    validation: DistanceSums | None
    limit: float | None
    quantile: float

    @property
    def unfamiliar(self) -> int:
        """Number of unfamiliar images."""
        return sum(image.assessment.unfamiliar for image in self.images)

    def distances(self, site: str | None = None) -> list[float]:
        """Return the distances of the test images, as multiples of the limit; of one site on request."""
        known = [i.assessment.distance for i in self.images if site in (None, i.site)]
        return [one for one in known if one is not None]

    def usual(self) -> float | None:
        """Return the median distance of the validation images, as a multiple of the limit."""
        if self.validation is None or self.limit is None:
            return None
        return float(np.exp(self.validation.total / self.validation.images)) / self.limit

    def by_site(self) -> list[tuple[str, int, int, float | None]]:
        """Return site, images, unfamiliar images and median distance (as a multiple of the limit) of every site."""
        rows = []
        for site in sorted({image.site for image in self.images}):
            own = [image for image in self.images if image.site == site]
            distances = self.distances(site)
            median = float(np.median(distances)) if distances else None
            rows.append((site, len(own), sum(image.assessment.unfamiliar for image in own), median))
        return rows


class Familiarity(Callback):
    """Fits at the end of ``fit`` what the training images are like, and measures the familiarity of test images.

    An image is unfamiliar if a fact of its header (modality, body part, view, grey or colour) occurs in no training
    image, or if its distance from the training images in feature space exceeds a limit. The limit is a quantile of the
    distances of the validation images. All of it is computed from sums over images and stored in the checkpoints; it
    holds no image, name or path. ``test`` writes ``familiarity.csv`` into the run folder; ``predict`` adds columns to
    its table (see ``PredictionWriter``).

    Args:
        images: Largest number of training images, and of validation images, that are measured per site; 0 fits nothing.
        quantile: Quantile of the validation distances that is the limit, between 0.5 and 1.
        folder: Folder of ``familiarity.csv``; ``None`` is the trainer's ``default_root_dir``.

    Raises:
        ConfigError: A number is out of its range.
    """

    def __init__(self, images: int = 1000, quantile: float = 0.999, folder: str | None = None) -> None:
        self.images, self.quantile, self.folder = images, quantile, folder
        if images < 0 or not 0.5 <= quantile < 1:
            raise ConfigError(
                f"Familiarity: images={images} must be at least 0, and quantile={quantile} at least 0.5 and below 1"
            )
        self.drift: TestDrift | None = None
        """Result of a test; ``None`` where the checkpoint has no familiarity."""
        self._tested: list[TestedImage] = []
        self._files: ImageFiles | None = None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fit the familiarity and add it to the checkpoints."""
        if self.images and isinstance(pl_module, MultiTaskModule) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            add_familiarity(trainer, pl_module, self.images, self.quantile)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the results."""
        self.drift, self._tested, self._files = None, [], ImageFiles(trainer)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int, *args: Any
    ) -> None:
        """Measure the images of a batch."""
        if self._files is not None:
            self._tested += [
                TestedImage(meta.id, meta.site, meta.view or "", one)
                for meta, one in zip(batch.meta, assessed(pl_module, batch, self._files), strict=False)
            ]

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the results of all processes; write and summarize them on the first one."""
        familiarity = pl_module.familiarity if isinstance(pl_module, MultiTaskModule) else None
        if familiarity is None:
            return
        processes = processes_of(trainer)
        shares = [processes.share(self._tested, rank) for rank in range(processes.world)]
        images = {(image.site, image.id): image for share in shares for image in share}  # some are repeated
        self.drift = TestDrift(tuple(images.values()), familiarity.validation, familiarity.limit, familiarity.quantile)
        if self.drift.images:
            rank_zero_info(
                f"{self.drift.unfamiliar} of {len(self.drift.images)} test images are unlike the training images "
                "(familiarity.csv)."
            )
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            _write(self.drift.images, Path(self.folder or trainer.default_root_dir, "familiarity.csv"))


def _write(images: Sequence[TestedImage], file: Path) -> None:
    header = ["image", "site", "view", *columns(Assessment(None))]
    with atomic_write(file) as part, part.open("w", newline="", encoding="utf-8") as stream:
        rows = csv.writer(stream)
        rows.writerow(header)
        for image in images:
            unfamiliar, distance, why = columns(image.assessment).values()
            texts = [cell(printable(text)) for text in (image.id, image.site, image.view)]
            rows.writerow([*texts, unfamiliar, distance, cell(printable(why))])
