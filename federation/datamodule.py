"""The data of a federation: named sites, each with images of its own and the tasks it has labels for."""

from __future__ import annotations

import copy
import logging
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import lightning as L
import numpy as np
from torch.utils.data import ConcatDataset, DataLoader, Dataset, DistributedSampler

from federation.partition import Holding, Partition
from mtmedformer.batch import Sample, Task, collate
from mtmedformer.errors import ConfigError, DataError

GROUP = "federation_site"
"""Name of the record group by which a partition's sites are told apart."""


class FederatedDataModule(L.LightningDataModule):
    """Sites that train apart and are validated together.

    Either ``sites`` names a data set for each site, or ``data`` is one data set that is cut into sites: ``by`` a
    column of its records (``site``, ``client`` …), or at random by a ``partition``. Tasks are those of all sites; what
    a site has no labels for is unknown there. Under a federation (the ``federation`` key) an epoch is a round; without
    one, ``fit`` trains on the union of all sites. Validation, test and prediction run on the union, each image under
    its site's name.

    Args:
        sites: Data sets by the name of their site.
        data: One data set to be cut into sites.
        by: What the records of ``data`` are cut by: ``site`` or the name of a group.
        partition: How ``data`` is cut at random.
        only: Keep these sites; ``null`` keeps all.
        batch_size: Images a batch of validation and test; ``null`` takes the first site's.

    Raises:
        ConfigError: When it is not clear what the sites are, or their tasks contradict each other.

    Attributes:
        tasks: Tasks of all sites by name, once set up.
    """

    def __init__(
        self,
        sites: dict[str, L.LightningDataModule] | None = None,
        data: L.LightningDataModule | None = None,
        by: str | None = None,
        partition: Partition | None = None,
        only: list[str] | None = None,
        batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if (sites is None) == (data is None):
            raise ConfigError("data: give either sites (a data set each) or data (one data set to cut), not both")
        if data is not None and (by is None) == (partition is None):
            raise ConfigError("data: say how data is cut into sites, by a column (by: site) or by a partition")
        self.named = sites
        self.data, self.by, self.partition, self.only, self.batch_size = data, by, partition, only, batch_size
        self.tasks: dict[str, Task] = {}
        self._sites: dict[str, Site] = {}

    @property
    def sites(self) -> dict[str, Site]:
        """The sites in the order of their names, once set up."""
        return self._sites

    def prepare_data(self) -> None:
        """Prepare every site's data."""
        for source in [self.data] if self.data is not None else (self.named or {}).values():
            source.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Cut the data into sites, and set each of them up.

        Raises:
            ConfigError: When two sites mean different things by one task, or a name is not fit for a folder.
            DataError: When a site has no training image.
        """
        if not self._sites:
            sources = dict(self.named) if self.named is not None else self._cut()
            chosen = sorted(sources) if self.only is None else sorted(self.only)
            unknown = sorted(set(chosen) - set(sources))
            if unknown or not chosen:
                raise ConfigError(f"data.only: no site is called {', '.join(unknown)}; sites are {', '.join(sources)}")
            for name in chosen:
                if not re.fullmatch(r"\w[\w.-]*", name):
                    raise ConfigError(f"site {name!r}: letters, digits, '_', '-' and '.' make a site's name")
            self._sites = {name: Site(name, sources[name], self.tasks) for name in chosen}
        for site in self._sites.values():
            with site.speaking():
                site.source.setup(stage)  # type: ignore[arg-type]
        self.tasks.update(_united({name: getattr(s.source, "tasks", {}) for name, s in self._sites.items()}))

    def train_dataloader(self) -> DataLoader[Any]:
        """Return one tick for a round of a federation; without one, the union of all sites' training batches."""
        callbacks = self.trainer.callbacks if self.trainer else []  # type: ignore[attr-defined]
        if not any(getattr(callback, "runs_rounds", False) for callback in callbacks):
            return self.pooled().train_dataloader()
        ticks: Dataset[int] = _Ticks()
        return DataLoader(ticks, batch_size=1, sampler=DistributedSampler(ticks, num_replicas=1, rank=0, shuffle=False))

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return the validation batches of all sites, whole on every process, or none if no site has any."""
        return self._united("val_dataloader")

    def test_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return the test batches of all sites."""
        return self._united("test_dataloader")

    def predict_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return the batches to predict of all sites."""
        return self._united("predict_dataloader")

    def pooled(self) -> Site:
        """Return the union of all sites as one site called ``pooled``."""
        return PooledSite(self._sites, self.tasks, self.trainer)

    def holdings(self) -> list[Holding]:
        """Return what each site holds, once set up for ``fit``."""
        return [site.holding() for site in self._sites.values()]

    def describe(self) -> dict[str, Any]:
        """Return, as ``parts`` by site, what a report says of each site's data, where its data set describes itself."""
        sources: dict[str, Any] = {name: site.source for name, site in self._sites.items()}
        return {"parts": {name: source.describe() for name, source in sources.items() if hasattr(source, "describe")}}

    def _united(self, kind: str) -> DataLoader[Any] | list[Any]:
        loaders = {name: getattr(site.source, kind)() for name, site in self._sites.items()}
        loaders = {name: loader for name, loader in loaders.items() if isinstance(loader, DataLoader)}
        if not loaders:
            return []
        first = next(iter(loaders.values()))
        images: Dataset[Any] = ConcatDataset([_Named(loader.dataset, name) for name, loader in loaders.items()])
        whole: dict[str, Any] = (
            {"sampler": DistributedSampler(images, num_replicas=1, rank=0, shuffle=False)} if "val" in kind else {}
        )
        return DataLoader(
            images,
            batch_size=self.batch_size or first.batch_size,
            num_workers=first.num_workers,
            collate_fn=_collate(self.tasks, first),
            pin_memory=first.pin_memory,
            persistent_workers=first.persistent_workers,
            **whole,
        )

    def _cut(self) -> dict[str, L.LightningDataModule]:
        """Return a data set a site: copies of one that each keep some of its records."""
        data: Any = self.data
        if not all(hasattr(data, name) for name in ("plan", "where", "catalogue")):
            raise ConfigError(
                f"data.data: {type(data).__name__} has no records to cut; name a data set for each site in data.sites"
            )
        pristine = copy.deepcopy(data)
        data.plan()
        if self.partition is None:
            values = {getattr(r, "site", None) if self.by == "site" else r.groups.get(self.by) for r in data.records}
            names = sorted(value for value in values if value)
            if not names:
                known = sorted({key for record in data.records for key in record.groups})
                raise ConfigError(
                    f"data.by: records are not known by {self.by!r}; choose from {', '.join(['site', *known])}"
                )
            return {name: _kept(pristine, {str(self.by): name}) for name in names}
        patients: dict[str, list[Any]] = defaultdict(list)
        for record in data.records:
            patients[record.patient].append(record)
        owners = self.partition.assign(patients, data.splits)
        pristine.catalogue = _Grouped(pristine.catalogue, owners)
        return {name: _kept(pristine, {GROUP: name}) for name in self.partition.sites}


class Site(L.LightningDataModule):
    """One site's data as a Trainer of its own sees them: its batches, with every task of the federation in them.

    Args:
        name: Name of the site.
        source: The site's data set.
        tasks: Tasks of all sites by name.
    """

    def __init__(self, name: str, source: L.LightningDataModule, tasks: dict[str, Task]) -> None:
        super().__init__()
        self.site, self.source, self.tasks = name, source, tasks
        self._said: set[str] = set()

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the site's training batches.

        Raises:
            DataError: When it has none.
        """
        loader = self._loader("train_dataloader")
        if not isinstance(loader, DataLoader):
            raise DataError(f"site {self.site}: it has no training images; leave it out with data.only")
        return loader

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return the site's validation batches, if it has any."""
        return self._loader("val_dataloader")

    def holding(self) -> Holding:
        """Return what the site holds."""
        source: Any = self.source
        if not hasattr(source, "splits"):
            size = len(self.train_dataloader().dataset)  # type: ignore[arg-type]
            return Holding(self.site, size, size, 0, {})
        train = [
            r for r in source.records if source.splits.get(r.id) == "train" and source.tasks.keys() & r.truth.keys()
        ]
        return Holding(
            site=self.site,
            patients=len({r.patient for r in train}),
            images=len(train),
            validation=sum(source.splits.get(r.id) == "val" for r in source.records),
            labels={task: sum(task in r.truth for r in train) for task in self.tasks},
        )

    @contextmanager
    def speaking(self) -> Iterator[None]:
        """Put the site's name before what its data set logs meanwhile, and let it say each thing once, not a round."""

        def named(record: logging.LogRecord) -> bool:
            if getattr(record, "site", None) == self.site:  # another handler has had it already
                return True
            message = record.getMessage()
            if message in self._said:
                return False
            self._said.add(message)
            record.msg, record.args, record.site = f"site {self.site}: {message}", (), self.site
            return True

        handlers = [h for h in (*logging.getLogger().handlers, logging.lastResort) if h is not None]
        for handler in handlers:
            handler.addFilter(named)
        try:
            yield
        finally:
            for handler in handlers:
                handler.removeFilter(named)

    def _loader(self, kind: str) -> DataLoader[Any] | list[Any]:
        self.source.trainer = self.trainer
        try:
            with self.speaking():
                loader: DataLoader[Any] | list[Any] = getattr(self.source, kind)()
        except KeyError:  # a split without images
            return []
        finally:
            self.source.trainer = None
        if isinstance(loader, DataLoader):
            loader.collate_fn = _collate(self.tasks, loader)
        return loader


class PooledSite(Site):
    """The union of all sites: their batches' images, mixed anew every epoch.

    Args:
        sites: The sites by name.
        tasks: Tasks of all sites by name.
        trainer: The Trainer that shares the images out to processes, where there is one yet.
    """

    def __init__(self, sites: dict[str, Site], tasks: dict[str, Task], trainer: L.Trainer | None = None) -> None:
        super().__init__("pooled", L.LightningDataModule(), tasks)
        self.parts = sites
        self.trainer = trainer

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the union of the sites' training batches, in the order of each site's own sampler, interleaved."""
        for part in self.parts.values():
            part.trainer = self.trainer
        loaders = {name: part.train_dataloader() for name, part in self.parts.items()}
        first = next(iter(loaders.values()))
        return DataLoader(
            _Union({name: loader.dataset for name, loader in loaders.items()}),
            batch_size=first.batch_size,
            sampler=_Interleaved({name: loader.sampler for name, loader in loaders.items()}),
            num_workers=first.num_workers,
            collate_fn=_collate(self.tasks, first),
            pin_memory=first.pin_memory,
            persistent_workers=first.persistent_workers,
        )

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return none: the union is validated by the server."""
        return []


class _Ticks(Dataset[int]):
    """One item: a round has one server step."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        return index


class _Named(Dataset[Any]):
    """A data set whose images carry the name of their site in the federation."""

    def __init__(self, images: Dataset[Any], site: str) -> None:
        self.images, self.site = images, site

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        sample = self.images[index]
        return replace(sample, meta=replace(sample.meta, site=self.site)) if isinstance(sample, Sample) else sample


class _Union(Dataset[Any]):
    """Several data sets, an item of which is asked for by ``(site, key)``."""

    def __init__(self, parts: dict[str, Dataset[Any]]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts.values())  # type: ignore[arg-type, misc]

    def __getitem__(self, key: tuple[str, Any]) -> Any:
        return self.parts[key[0]][key[1]]


class _Interleaved(DistributedSampler[Any]):
    """Mixes the orders of several samplers, by the epoch alone; Lightning leaves a ``DistributedSampler`` in place."""

    def __init__(self, samplers: dict[str, Any]) -> None:
        super().__init__(_Ticks(), num_replicas=1, rank=0)
        self.samplers = samplers

    def __len__(self) -> int:
        return sum(len(sampler) for sampler in self.samplers.values())

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        turns = np.repeat(sorted(self.samplers), [len(self.samplers[name]) for name in sorted(self.samplers)])
        orders = {name: iter(sampler) for name, sampler in self.samplers.items()}
        for name in map(str, np.random.default_rng([self.seed, self.epoch]).permutation(turns)):
            yield name, next(orders[name])

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        for sampler in self.samplers.values():
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)


class _Grouped:
    """A catalogue whose records know which site of a partition they belong to."""

    def __init__(self, catalogue: Any, owners: dict[str, str]) -> None:
        self.catalogue, self.owners = catalogue, owners

    def __call__(self) -> Any:
        found = self.catalogue()
        records = []
        for record in found.records:  # none is dropped: splits are made for all of them, as they were for the deal
            group = {GROUP: self.owners[record.patient]} if record.patient in self.owners else {}
            records.append(replace(record, groups={**record.groups, **group}))
        return replace(found, records=records)


def _kept(data: Any, where: dict[str, str]) -> L.LightningDataModule:
    """Return a copy of a data set, not yet set up, that keeps some of its records."""
    site: Any = copy.deepcopy(data)
    site.where = {**site.where, **where}
    return site  # type: ignore[no-any-return]


def _collate(tasks: dict[str, Task], loader: DataLoader[Any]) -> Any:
    """Return what makes batches with an entry for every task; a loader that knows no tasks keeps its own."""
    return partial(collate, tasks=tasks) if tasks else loader.collate_fn


def _united(by_site: dict[str, dict[str, Task]]) -> dict[str, Task]:
    """Return the tasks of all sites, which have to mean the same at each."""
    found: dict[str, tuple[str, Task]] = {}
    for site, tasks in by_site.items():
        for name, task in tasks.items():
            other, known = found.setdefault(name, (site, task))
            if (known.kind, known.classes, known.multi_label) != (task.kind, task.classes, task.multi_label):
                raise ConfigError(
                    f"task {name}: {list(known.classes)} ({known.kind}) at {other}, but {list(task.classes)} "
                    f"({task.kind}) at {site}; give it the same classes in the same order, or two names"
                )
    return {name: task for name, (_, task) in found.items()}
