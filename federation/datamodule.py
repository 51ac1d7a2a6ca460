"""The data of a federation: named sites, each with its own images and labels for some of the tasks."""

from __future__ import annotations

import copy
import logging
import re
from collections import defaultdict
from collections.abc import Collection
from typing import Any

import lightning as L
import numpy as np
from torch.utils.data import ConcatDataset, DataLoader, Dataset, DistributedSampler

from federation.partition import Holding, Partition
from federation.site_loaders import LoaderName, NamedDataset, PooledSite, RoundDataset, Site, check_sizes, collate_for
from federation.site_states import SiteStates
from mtmedformer.batch import Task
from mtmedformer.checks import common_tasks
from mtmedformer.errors import ConfigError, DataError, NoImagesError
from mtmedformer.protocols import (
    DescribedData,
    HasChannels,
    LimitedData,
    NamedSites,
    RecordData,
    RunsRounds,
    TaskedData,
)
from mtmedformer.site_classes import classes_of_one_site

log = logging.getLogger(__name__)


class FederatedDataModule(SiteStates, L.LightningDataModule):
    """Sites that train separately and are validated together.

    Either ``sites`` names one data set per site, or ``data`` is one data set that is cut into sites: ``by`` a
    column of its records (``site``, ``client`` …), or at random by a ``partition``. Tasks are those of all sites; a
    task that a site has no labels for is unknown in its batches. A site without a labelled training image does not
    train; a site without any label or image is left out; ``notes`` names both. Under a federation (the ``federation``
    key) an epoch is a round; without one, ``fit`` trains on the union of all sites. Validation, test and prediction run
    on the union; each image carries the name of its site.

    Args:
        sites: Data sets by site name.
        data: One data set to be cut into sites.
        by: What the records of ``data`` are cut by: ``site`` or the name of a group.
        partition: How ``data`` is cut at random.
        only: Keep these sites; ``null`` keeps all.
        batch_size: Images per batch of validation and test; ``null`` takes that of the first site.
        limit: Use at most this many patients of each site, drawn with the seed; for quick trials.
        num_workers: Worker processes of every site's loaders; ``null`` keeps the setting of each data set.

    Raises:
        ConfigError: When the sites are not defined unambiguously, or their tasks contradict each other.

    Attributes:
        tasks: Tasks of all sites by name, complete after ``setup``.
    """

    def __init__(
        self,
        sites: dict[str, L.LightningDataModule] | None = None,
        data: L.LightningDataModule | None = None,
        by: str | None = None,
        partition: Partition | None = None,
        only: list[str] | None = None,
        batch_size: int | None = None,
        limit: int | None = None,
        num_workers: int | None = None,
    ) -> None:
        super().__init__()
        if (sites is None) == (data is None):
            raise ConfigError("data: give either sites (one data set per site) or data (one data set to cut), not both")
        if data is not None and (by is None) == (partition is None):
            raise ConfigError("data: set either by (cut data by a column, for example by: site) or partition")
        for name, value, least in (("limit", limit, 1), ("num_workers", num_workers, 0)):
            if value is not None and value < least:
                raise ConfigError(f"data.init_args.{name} is {value}; it must be at least {least}")
        self.named = sites
        self.data, self.by, self.partition, self.only, self.batch_size = data, by, partition, only, batch_size
        self.limit, self.num_workers = limit, num_workers
        self.tasks: dict[str, Task] = {}
        self._sites: dict[str, Site] = {}
        self._notes: list[str] = []
        kept = {name: site for name, site in (sites or {}).items() if only is None or name in only}
        sources = {"data": data} if data is not None else kept
        if all(isinstance(source, TaskedData) and source.tasks for source in sources.values()):
            self._declare(dict(sorted(sources.items())))

    @property
    def sites(self) -> dict[str, Site]:
        """The sites in the order of their names, complete after ``setup``."""
        return self._sites

    @property
    def site_names(self) -> list[str] | None:
        """Names of the sites; ``None`` if they are in the records and ``plan`` has not read them yet.

        Before ``plan``, it may contain a site of which no record is in use.
        """
        if self._sites:
            return list(self._sites)
        data: Any = self.data
        names: Collection[str] | None = self.named
        if self.partition is not None:
            names = self.partition.sites
        elif self.by == "site" and isinstance(data, NamedSites):
            names = data.sites
        if names is None:
            return None
        return sorted(name for name in names if self.only is None or name in self.only)

    def prepare_data(self) -> None:
        """Prepare every site's data."""
        for source in [self.data] if self.data is not None else (self.named or {}).values():
            source.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Cut the data into sites, and set each of them up.

        Raises:
            ConfigError: When a task has different classes at two sites, a site name cannot be a folder name, or sites
                that are evaluated together have images of different sizes.
            DataError: When the data of a site cannot be read.
        """
        self.plan(joint=stage is not None)
        model: Any = self.trainer.lightning_module if self.trainer else None
        for site in self._sites.values():
            labels_needed = stage in ("fit", "validate", "test") and isinstance(site.source, RecordData)
            if not labels_needed or site.labelled():
                reads = "validate" if stage == "fit" and not site.trains() else stage
                if isinstance(model, HasChannels) and isinstance(site.source, HasChannels):
                    site.source.in_chans = model.in_chans
                with site.errors_named():
                    site.source.setup(reads)  # type: ignore[arg-type]
        self._declare({name: site.source for name, site in self._sites.items()})

    def plan(self, joint: bool = True) -> None:
        """Cut the data into sites and read their records; decode no pixel. Does nothing the second time.

        Args:
            joint: Whether images of all sites are to be evaluated together.

        Raises:
            UserError: As in ``setup``.
        """
        if not self._sites:
            sources = self._named_sources() if self.named is not None else self._cut()
            chosen = sorted(sources) if self.only is None else sorted(self.only)
            unknown = sorted(set(chosen) - set(sources))
            if unknown or not chosen:
                raise ConfigError(f"data.only: no site is called {', '.join(unknown)}; sites are {', '.join(sources)}")
            for name in chosen:
                if not re.fullmatch(r"\w[\w.-]*", name):
                    raise ConfigError(f"site {name!r}: use letters, digits, '_', '-' and '.' for the name of a site")
            self._sites = {name: Site(name, sources[name], self.tasks) for name in chosen}
        for name, site in list(self._sites.items()):
            if isinstance(site.source, RecordData):
                site.source.may_lack_labels = True
                try:
                    with site.errors_named():
                        site.source.plan()
                except NoImagesError as error:
                    self._notes.append(f"{error}; the site is left out")
                    del self._sites[name]
        if not self._sites:
            raise DataError(f"data: no site has an image ({'; '.join(self._notes)})")
        self._declare({name: site.source for name, site in self._sites.items()})
        if self.named is not None:  # a data set that is cut has logged it
            planned = {name: site.source for name, site in self._sites.items() if isinstance(site.source, RecordData)}
            images = ((name, record.truth) for name, source in planned.items() for record in source.records)
            self._notes = list(dict.fromkeys([*self._notes, *classes_of_one_site(images, self.tasks).values()]))
        if joint:
            check_sizes(self._sites)

    def training_sites(self, tasks: Collection[str] | None = None) -> dict[str, Site]:
        """Return the sites that have a training image with a label.

        Args:
            tasks: Tasks of the model; ``None`` counts labels for any task.

        Raises:
            DataError: There is none.
        """
        found = {name: site for name, site in self._sites.items() if site.trains(tasks)}
        if not found:
            wanted = ", ".join(self.tasks if tasks is None else tasks)
            raise DataError(
                f"none of the sites {', '.join(self._sites)} has a training image with a label for {wanted}"
            )
        return found

    def notes(self, tasks: Collection[str] | None = None) -> list[str]:
        """Return a sentence about every site that does not train or is left out, and every class that one site has.

        Args:
            tasks: Tasks of the model; ``None`` counts labels for any task.
        """
        wanted = self.tasks if tasks is None else tasks
        return [*self._notes, *(site.note(wanted) for site in self._sites.values() if not site.trains(tasks))]

    def require(self, stage: str) -> None:
        """Raise a ``DataError``, after ``plan``, if no site has images for a stage of the Trainer."""
        lacking = [site.lacks(stage) for site in self._sites.values()]
        if all(lacking):
            raise DataError(lacking[0])

    def class_place(self, task: str, label: str) -> str:
        """Return where the tables of the sites name a class; empty if it was not found in a column."""
        return "; ".join(filter(None, (site.class_place(task, label) for site in self._sites.values())))

    def _declare(self, sources: dict[str, L.LightningDataModule]) -> None:
        """Add the tasks that the data sets of the sites have so far."""
        declared = {name: source.tasks for name, source in sources.items() if isinstance(source, TaskedData)}
        self.tasks.update(common_tasks(declared))

    def train_dataloader(self) -> DataLoader[Any]:
        """Return one batch per round of a federation; without one, the union of all sites' training batches."""
        callbacks = self.trainer.callbacks if self.trainer else []  # type: ignore[attr-defined]
        if not any(callback.runs_rounds for callback in callbacks if isinstance(callback, RunsRounds)):
            for note in self.notes():
                log.warning(note)
            return self.pooled().train_dataloader()
        rounds: Dataset[int] = RoundDataset()
        return DataLoader(
            rounds, batch_size=1, sampler=DistributedSampler(rounds, num_replicas=1, rank=0, shuffle=False)
        )

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return the validation batches of all sites, all of them on every process; an empty list without images."""
        return self._union("val_dataloader")

    def test_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return the test batches of all sites."""
        return self._union("test_dataloader")

    def predict_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return the batches of all sites to predict."""
        return self._union("predict_dataloader")

    def pooled(self) -> Site:
        """Return the union of all sites as one site called ``pooled``."""
        return PooledSite(self._sites, self.tasks, self.trainer)

    def holdings(self) -> list[Holding]:
        """Return the counts of each site's data, after ``setup`` for ``fit``."""
        return [site.holding() for site in self._sites.values()]

    def describe(self) -> dict[str, Any]:
        """Return, as ``parts`` by site, the description of each site's data, where its data set has one."""
        sources = {name: site.source for name, site in self._sites.items()}
        return {"parts": {name: data.describe() for name, data in sources.items() if isinstance(data, DescribedData)}}

    def _union(self, name: LoaderName) -> DataLoader[Any] | list[Any]:
        loaders: dict[str, DataLoader[Any]] = {}
        for key, site in self._sites.items():
            site.trainer = None  # a loader that divides the images over processes would do it twice
            loader = site.loader(name)
            if isinstance(loader, DataLoader):
                loaders[key] = loader
        if not loaders:
            return []
        first = next(iter(loaders.values()))
        images: Dataset[Any] = ConcatDataset([NamedDataset(loader.dataset, key) for key, loader in loaders.items()])
        undivided: dict[str, Any] = (
            {"sampler": DistributedSampler(images, num_replicas=1, rank=0, shuffle=False)}
            if name == "val_dataloader"
            else {}
        )
        return DataLoader(
            images,
            batch_size=self.batch_size or first.batch_size,
            num_workers=first.num_workers,
            collate_fn=collate_for(self.tasks, first),
            pin_memory=first.pin_memory,
            persistent_workers=first.persistent_workers,
            **undivided,
        )

    def _named_sources(self) -> dict[str, L.LightningDataModule]:
        """Return the data sets of ``sites``, with ``limit`` and ``num_workers`` set."""
        sources = dict(self.named or {})
        for name, source in sources.items():
            self._set_workers(f"data.sites.{name}", source)
            if self.limit is not None:
                _limited(f"data.sites.{name}", "limit", source).limit = self.limit
        return sources

    def _cut(self) -> dict[str, L.LightningDataModule]:
        """Return one data set per site: copies of ``data`` that keep some of its patients."""
        data: Any = self.data
        if not isinstance(data, RecordData):
            raise ConfigError(
                f"data.data: {type(data).__name__} has no records to cut; name a data set for each site in data.sites"
            )
        self._set_workers("data.data", data)
        pristine = copy.deepcopy(data)
        data.plan()
        patients: dict[str, list[Any]] = defaultdict(list)
        for record in data.records:
            patients[record.patient].append(record)
        if self.partition is not None:
            owners = self.partition.assign(patients, data.splits)
            held = {site: {p for p, owner in owners.items() if owner == site} for site in self.partition.sites}
            return {site: _copy_of_some(pristine, self._drawn(data, own), {}) for site, own in held.items()}
        by = str(self.by)
        value_of = {r.id: r.site if by == "site" else r.groups.get(by) for r in data.records}
        names = sorted({value for value in value_of.values() if value})
        nameless = sum(not value for value in value_of.values())
        if names and nameless:
            self._notes.append(f"{nameless} of {len(value_of)} images have no {by}; they belong to no site")
        if not names:
            known = sorted({key for record in data.records for key in record.groups})
            raise ConfigError(f"data.by: records have no column {by!r}; choose from {', '.join(['site', *known])}")
        held = {name: {r.patient for r in data.records if value_of[r.id] == name} for name in names}
        return {name: _copy_of_some(pristine, self._drawn(data, held[name]), {by: name}) for name in names}

    def _drawn(self, data: Any, patients: set[str]) -> set[str]:
        """Return at most ``limit`` of a site's patients, drawn with the seed of the data set."""
        if self.limit is None or len(patients) <= self.limit:
            return patients
        order = np.random.default_rng(data.seed).permutation(sorted(patients))
        return set(map(str, order[: self.limit]))

    def _set_workers(self, field: str, source: object) -> None:
        if self.num_workers is not None:
            _limited(field, "num_workers", source).num_workers = self.num_workers


def _copy_of_some(data: Any, patients: set[str], where: dict[str, str]) -> L.LightningDataModule:
    """Return a copy of a data set, not yet set up, that keeps some of its patients and records."""
    site: Any = copy.deepcopy(data)
    site.only_patients = frozenset(patients)
    site.where = {**site.where, **where}
    return site  # type: ignore[no-any-return]


def _limited(field: str, option: str, source: object) -> LimitedData:
    if not isinstance(source, LimitedData):
        raise ConfigError(f"data.{option}: {field} is a {type(source).__name__}, which has no option {option}; drop it")
    return source
