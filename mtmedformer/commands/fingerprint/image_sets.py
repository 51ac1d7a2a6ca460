"""Measure the images of a data set, or of every site of a federation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from datamodules.audit.image_statistics import ImageStatistics, image_statistics
from datamodules.base import MedicalDataModule
from datamodules.cache.quarantine import Quarantine
from datamodules.loading.negatives import NEGATIVE
from federation.datamodule import FederatedDataModule
from mtmedformer.batch import Task
from mtmedformer.errors import ConfigError


@dataclass(frozen=True)
class ImageSet:
    """The images to summarise and the settings of their data set.

    Attributes:
        dataset: Class of the data module.
        facts: One entry per usable image that is labelled for some task.
        tasks: The tasks by name.
        image_size: Height and width of the network's present input.
        batch_size: Images per batch.
        quarantine: Images and labels that were left out.
        implausible: Sentences on labels and films that are probably wrong in the whole set.
        negative: Names of the negative classes, as the data set gives them to its sampler.
        white_level: The value of white in its 16-bit images; ``None`` if it has none.
    """

    dataset: str
    facts: Sequence[ImageStatistics]
    tasks: dict[str, Task]
    image_size: tuple[int, int]
    batch_size: int
    quarantine: Quarantine
    implausible: Sequence[str] = ()
    negative: frozenset[str] = NEGATIVE
    white_level: int | None = None


def read_images(data: MedicalDataModule) -> ImageSet:
    """Set a data set up and measure each of its images.

    Raises:
        DataError: As ``MedicalDataModule.setup``.
    """
    data.setup(None)
    facts = image_statistics(data.datasets)
    return ImageSet(
        type(data).__name__, facts, data.tasks, (data.image_size[0], data.image_size[1]), data.batch_size,
        data.quarantine, tuple(data.implausible.values()), data.negative, data.preprocessing.white_level,
    )  # fmt: skip


def read_sites(data: FederatedDataModule) -> dict[str, ImageSet]:
    """Set the sites of a federation up and measure each of their images, which get the names of their sites.

    Data sets of their own may use one image or patient key for different things, so their keys are prefixed with the
    site. Sites that were cut from one data set share its keys.

    Raises:
        ConfigError: As ``FederatedDataModule.setup``, or a site's data set has no records to describe.
        DataError: As ``MedicalDataModule.setup``.
    """
    data.setup(None)
    sites = {}
    for name, site in data.sites.items():
        source = site.source
        if not isinstance(source, MedicalDataModule):
            raise ConfigError(
                f"fingerprint: site {name}: {type(source).__name__} is no datamodules.MedicalDataModule, so its images "
                "cannot be described"
            )
        images, prefix = read_images(source), f"{name}/" if data.data is None else ""
        facts = [
            replace(f, record=replace(f.record, site=name, id=prefix + f.record.id, patient=prefix + f.record.patient))
            for f in images.facts
        ]
        if facts:  # a site without labels is named in ``FederatedDataModule.notes``
            sites[name] = replace(images, facts=facts)
    return sites
