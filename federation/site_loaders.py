"""The batches of one site, and of the union of all sites, as a Trainer loads them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import lightning as L
import numpy as np
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from typing_extensions import override

from federation.partition import Holding
from mtmedformer.batch import Batch, Sample, Task, collate
from mtmedformer.errors import ConfigError, DataError, UserError
from mtmedformer.protocols import PlannedData, RecordData, SplitData

LoaderName = Literal["train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader"]

SPLITS: dict[LoaderName, frozenset[str]] = {
    "train_dataloader": frozenset({"train"}),
    "val_dataloader": frozenset({"val"}),
    "test_dataloader": frozenset({"test", "val"}),  # the validation split replaces a missing test split
    "predict_dataloader": frozenset({"predict"}),
}
"""Splits of ``SplitData.datasets`` that a loader may read; without any of them it has no images."""


class Site(L.LightningDataModule):
    """The data of one site, with an entry for every task of the federation in each batch.

    Args:
        name: Name of the site.
        source: The site's data set.
        tasks: Tasks of all sites by name.
    """

    def __init__(self, name: str, source: L.LightningDataModule, tasks: dict[str, Task]) -> None:
        super().__init__()
        self.site, self.source, self.tasks = name, source, tasks
        self._log_filter = SiteLogFilter(name)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the site's training batches.

        Raises:
            DataError: When the site has no training images.
        """
        loader = self.loader("train_dataloader")
        if not isinstance(loader, DataLoader):
            raise DataError(f"site {self.site}: it has no training images; leave it out with data.only")
        return loader

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return the site's validation batches; an empty list without validation images."""
        return self.loader("val_dataloader")

    def loader(self, name: LoaderName) -> DataLoader[Any] | list[Any]:
        """Return a loader of the site's data set; an empty list where it has no images for it.

        An error of the data set's own code is raised unchanged.
        """
        if not self.has_images(name):
            return []
        self.source.trainer = self.trainer
        try:
            with self.logs_named():
                loader: DataLoader[Any] | list[Any] = getattr(self.source, name)()
        finally:
            self.source.trainer = None
        if isinstance(loader, DataLoader):
            if loader.batch_size is None and loader.batch_sampler is None:
                raise ConfigError(
                    f"site {self.site}: a federation trains on batches of images; set case_batches of its data to false"
                )
            loader.collate_fn = collate_for(self.tasks, loader)
        return loader

    def has_images(self, name: LoaderName) -> bool:
        """Return whether the data set has images for a loader, as far as it lists its splits."""
        if isinstance(self.source, SplitData):
            return bool(SPLITS[name] & set(self.source.datasets))
        return is_overridden(name, self.source)

    def trains(self, tasks: Collection[str] | None = None) -> bool:
        """Return whether the site has training images with a label, as far as is known: by its records, if it has any.

        Args:
            tasks: Tasks of the model; ``None`` counts labels for any task of the site.
        """
        if isinstance(self.source, RecordData):
            return bool(self.labelled("train", tasks))
        return self.has_images("train_dataloader")

    def labelled(self, split: str | None = None, tasks: Collection[str] | None = None) -> list[Any]:
        """Return the records of a split with a label for one of some tasks; all splits, all tasks with ``None``."""
        source = self.source
        if not isinstance(source, RecordData):
            return []
        wanted = source.tasks.keys() if tasks is None else source.tasks.keys() & set(tasks)
        return [r for r in source.records if split in (None, source.splits.get(r.id)) and wanted & r.truth.keys()]

    def lacks(self, stage: str) -> str:
        """Return the error of a site without images for a stage; empty where it has some, or cannot be asked."""
        if isinstance(self.source, PlannedData):
            try:
                with self.errors_named():
                    self.source.require(stage)
            except DataError as error:
                return str(error)
        return ""

    def class_place(self, task: str, label: str) -> str:
        """Return where the site's table names a class; empty if it was not found in a column."""
        place = self.source.class_place(task, label) if isinstance(self.source, PlannedData) else ""
        return f"site {self.site}: {place}" if place else ""

    def note(self, tasks: Collection[str]) -> str:
        """Return a sentence about a site that has no training image with a label for one of some tasks."""
        held = [
            f"{len(self.labelled(split, tasks))} for {use}"
            for split, use in (("val", "validation"), ("test", "testing"))
        ]
        if not isinstance(self.source, RecordData):
            return f"site {self.site}: it has no training images and takes no part in the training"
        if self.labelled(None, tasks):
            return f"site {self.site}: no labelled training image ({', '.join(held)}); it takes no part in the training"
        count = len(self.source.records)
        images = f"none of its {count} images has a label for {', '.join(tasks)}" if count else "no image can be used"
        return f"site {self.site}: {images}; the site is left out"

    def holding(self) -> Holding:
        """Return the number of patients, images and labels at the site."""
        source = self.source
        if not isinstance(source, RecordData):
            loader = self.loader("train_dataloader")
            size = len(loader.dataset) if isinstance(loader, DataLoader) else 0  # type: ignore[arg-type]
            return Holding(self.site, size, size, 0, {})
        train = self.labelled("train")
        return Holding(
            site=self.site,
            patients=len({r.patient for r in train}),
            images=len(train),
            validation=sum(source.splits.get(r.id) == "val" for r in source.records),
            labels={task: sum(task in r.truth for r in train) for task in self.tasks},
        )

    @contextmanager
    def errors_named(self) -> Iterator[None]:
        """Put the site's name before the message of an error that the user can fix."""
        try:
            with self.logs_named():
                yield
        except UserError as error:
            raise type(error)(f"site {self.site}: {error}") from error

    @contextmanager
    def logs_named(self) -> Iterator[None]:
        """Prefix the messages that the data set logs with the site's name, and drop repeated ones."""
        handlers = [h for h in (*logging.getLogger().handlers, logging.lastResort) if h is not None]
        for handler in handlers:
            handler.addFilter(self._log_filter)
        try:
            yield
        finally:
            for handler in handlers:
                handler.removeFilter(self._log_filter)


class SiteLogFilter(logging.Filter):
    """Adds a site's name to log records and passes each message once: a data set repeats its warnings every round.

    A filter on the handlers is the way that Python's logging cookbook gives for context of the caller: it reaches the
    records of every logger, and no logger of the data set changes.

    Args:
        site: Name of the site.
    """

    def __init__(self, site: str) -> None:
        super().__init__()
        self.site = site
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is the first of its message; prefix it with the site's name."""
        if vars(record).get("site") == self.site:  # an earlier handler has prefixed it
            return True
        message = record.getMessage()
        if message in self._seen:
            return False
        self._seen.add(message)
        record.msg, record.args, record.site = f"site {self.site}: {message}", (), self.site
        return True


class PooledSite(Site):
    """The union of all sites: its batches mix their images, in a new order every epoch.

    Args:
        sites: The sites by name.
        tasks: Tasks of all sites by name.
        trainer: The Trainer that distributes the images over processes, if there is one already.
    """

    def __init__(self, sites: dict[str, Site], tasks: dict[str, Task], trainer: L.Trainer | None = None) -> None:
        super().__init__("pooled", L.LightningDataModule(), tasks)
        self.parts = sites
        self.trainer = trainer

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the union of the sites' training batches, in the order of each site's own sampler, interleaved."""
        for part in self.parts.values():
            part.trainer = self.trainer
        loaders = {name: part.train_dataloader() for name, part in self.parts.items() if part.trains()}
        if not loaders:
            raise DataError(f"none of the sites {', '.join(self.parts)} has a training image with a label")
        first = next(iter(loaders.values()))
        return DataLoader(
            UnionDataset({name: loader.dataset for name, loader in loaders.items()}),
            batch_size=first.batch_size,
            sampler=InterleavedSampler({name: loader.sampler for name, loader in loaders.items()}),
            num_workers=first.num_workers,
            collate_fn=collate_for(self.tasks, first),
            pin_memory=first.pin_memory,
            persistent_workers=first.persistent_workers,
        )

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return none: the server validates the union."""
        return []

    @override
    def holding(self) -> Holding:
        parts = [part.holding() for part in self.parts.values()]
        return Holding(
            site=self.site,
            patients=sum(part.patients for part in parts),
            images=sum(part.images for part in parts),
            validation=sum(part.validation for part in parts),
            labels={task: sum(part.labels.get(task, 0) for part in parts) for task in self.tasks},
        )


class RoundDataset(Dataset[int]):
    """One item: the server takes one step per round."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        return index


class NamedDataset(Dataset[Any]):
    """A data set whose images carry the name of their site in the federation."""

    def __init__(self, images: Dataset[Any], site: str) -> None:
        self.images, self.site = images, site

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        sample = self.images[index]
        return replace(sample, meta=replace(sample.meta, site=self.site)) if isinstance(sample, Sample) else sample


class UnionDataset(Dataset[Any]):
    """Several data sets; the key of an item is ``(site, key)``."""

    def __init__(self, parts: dict[str, Dataset[Any]]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts.values())  # type: ignore[arg-type, misc]

    def __getitem__(self, key: tuple[str, Any]) -> Any:
        return self.parts[key[0]][key[1]]


class InterleavedSampler(DistributedSampler[Any]):
    """Mixes the orders of several samplers, by seed and epoch; Lightning does not replace a ``DistributedSampler``."""

    def __init__(self, samplers: dict[str, Any]) -> None:
        super().__init__(RoundDataset(), num_replicas=1, rank=0)
        self.samplers = samplers

    def __len__(self) -> int:
        return sum(len(sampler) for sampler in self.samplers.values())

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        turns = np.repeat(sorted(self.samplers), [len(self.samplers[name]) for name in sorted(self.samplers)])
        orders = {name: iter(sampler) for name, sampler in self.samplers.items()}
        for name in map(str, np.random.default_rng([self.seed, self.epoch]).permutation(turns)):
            yield name, next(orders[name])

    @override
    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        for sampler in self.samplers.values():
            if hasattr(sampler, "set_epoch"):  # the same test as in Lightning: torch has no class for it
                sampler.set_epoch(epoch)


def collate_for(tasks: dict[str, Task], loader: DataLoader[Any]) -> Callable[[list[Any]], Any]:
    """Return a collate function that adds an entry for every task; without tasks, the loader's own."""
    return partial(collate_sites, tasks=tasks) if tasks else loader.collate_fn


def collate_sites(samples: list[Sample], tasks: dict[str, Task]) -> Batch:
    """Return the batch of images that may come from several sites.

    Raises:
        ConfigError: The images of two sites differ in channels or size.
    """
    shapes = {tuple(sample.image.shape): sample.meta.site for sample in samples}
    if len(shapes) > 1:
        raise ConfigError(size_message({site: shape for shape, site in shapes.items()}))
    return collate(samples, tasks=tasks)


def check_sizes(sites: Mapping[str, Site]) -> None:
    """Check that the images of all sites have one size, as far as it is known before they are read.

    Raises:
        ConfigError: They differ.
    """
    sizes: dict[tuple[int, ...], str] = {}
    for name, site in sites.items():
        if isinstance(site.source, RecordData):
            sizes.setdefault(tuple(site.source.image_size), name)
    if len(sizes) > 1:
        raise ConfigError(size_message({name: size for size, name in sizes.items()}))


def size_message(sizes: Mapping[str, Sequence[int]]) -> str:
    """Return what to do about sites whose images differ in size, by the size of a site of each."""
    found = ", ".join(f"{'x'.join(map(str, size))} at {site}" for site, size in sizes.items())
    return (
        f"data: the images of the sites differ in size ({found}), and all sites are validated and tested together; "
        "give every site the same image_size and number of channels"
    )
