"""The road every data set takes: records → patient-safe splits → decode once → cache → augment → batches."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import DataLoader

from datamodules.audit.description import describe
from datamodules.cache.cache import Cache
from datamodules.cache.entries import Report
from datamodules.cache.preprocessing import Preprocessing
from datamodules.cache.quarantine import IMAGE, Quarantine
from datamodules.images.pixels import Originals
from datamodules.images.presets import ChestPreset, PlainPreset, Preset
from datamodules.loading.catalogue import advice, check_catalogue, choose_tasks, select, some_patients
from datamodules.loading.dataset import CachedDataset, EpochSampler, ResumableLoader
from datamodules.loading.samplers import Strategy, TaskSampler
from datamodules.loading.splits import assign_splits
from datamodules.records import Catalogue, Record, Split
from mtmedformer.batch import Task, collate
from mtmedformer.errors import ConfigError, DataError

log = logging.getLogger(__name__)

STAGES: dict[str, tuple[Split, ...]] = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
"""The splits a stage of the Trainer reads; ``predict`` reads ``predict_split``."""


class MedicalDataModule(Originals, L.LightningDataModule, ABC):
    """Images with the truth of several tasks, split by patient, decoded once and served in batches.

    A data set implements ``catalogue`` and nothing else. Splits are made for the whole catalogue, before ``tasks`` and
    ``where`` select from it, so a single-task baseline and a federation of sites see the splits of the joint run.

    Args:
        image_size: ``[height, width]`` of the network's input in pixels, or one number for both.
        batch_size: Images a batch, per process.
        num_workers: Processes that load, and that decode before the first epoch; 0 does both in this process.
        seed: Seed of splits, order and augmentation; the same seed gives the same batches, whatever ``num_workers``.
        val_fraction: Share of the images held out for validation where the data set has no validation split.
        test_fraction: Share of the images held out for testing where the data set has no test split.
        official_splits: Keep the splits the data set came with; otherwise split anew.
        fold: Which of ``folds`` parts validates (cross-validation); ``None`` for one fixed validation split.
        folds: Number of parts if ``fold`` is given.
        preset: How images are framed and augmented; ``null`` for the whole image and no augmentation.
        sampler: Order of training: ``shuffle``; ``positive``, so that every batch has something to find; ``sqrt``,
            which draws rare combinations of labels more often.
        tasks: Keep these tasks only; images labelled for none of them are left out. ``null`` keeps all.
        where: Keep images of these sites (views, sides, groups) only, for example ``{site: [eurorad], view: PA}``.
        cache_dir: Folder of decoded images, shared by runs; ``null`` keeps them in memory.
        cache_max_gb: Most that the folder may hold, in GB; images used longest ago make room.
        max_quarantine_share: Largest share of images, or of one task's labelled images, that may be unusable.
        limit: Use this many patients only, drawn with the seed; for tries.
        predict_split: The split that ``predict`` runs on, or ``all``.

    Attributes:
        only_patients: Patients to be used, set before ``setup``; ``None`` uses all. Splits count all patients.
        tasks: Tasks by name, once set up.
        records: Images that can be used, with the truth that can be used, once set up.
        splits: Split of each record by its id, once set up.
        quarantine: What was left out, so far as it has been read.
        datasets: The split's images, once a stage that needs it is set up.
        generated: Whether the images are drawn by a program and show no patient.
    """

    generated = False

    def __init__(
        self,
        image_size: int | tuple[int, int] = 256,
        batch_size: int = 8,
        num_workers: int = 2,
        seed: int = 0,
        val_fraction: float = 0.15,
        test_fraction: float = 0.2,
        official_splits: bool = True,
        fold: int | None = None,
        folds: int = 5,
        preset: Preset | None = ChestPreset(),  # noqa: B008  presets have no state
        sampler: Strategy = "positive",
        tasks: list[str] | None = None,
        where: dict[str, str | list[str]] | None = None,
        cache_dir: Path | None = Path(".cache/mtmedformer"),
        cache_max_gb: float = 20.0,
        max_quarantine_share: float = 0.2,
        limit: int | None = None,
        predict_split: Literal["train", "val", "test", "all"] = "test",
    ) -> None:
        super().__init__()
        self.image_size = _height_width(image_size)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.official_splits = official_splits
        self.fold = fold
        self.folds = folds
        self.preset = preset
        self.sampler: Strategy = sampler
        self.only_tasks = tasks
        self.where = where or {}
        self.only_patients: frozenset[str] | None = None
        self.cache_dir = cache_dir
        self.cache_max_gb = cache_max_gb
        self.max_quarantine_share = max_quarantine_share
        self.limit = limit
        self.predict_split = predict_split
        self._check_arguments()
        self.tasks: dict[str, Task] = {}
        self.records: list[Record] = []
        self.splits: dict[str, Split] = {}
        self.quarantine = Quarantine()
        self._planned: list[Record] = []
        self._read: set[str] = set()
        self._decoding = Quarantine()  # the part of it that decoding has met
        self._told = ""
        self.datasets: dict[str, CachedDataset] = {}
        self.preprocessing = Preprocessing(preset or PlainPreset(), self.image_size)
        self.cache = Cache(cache_dir, cache_max_gb)

    @abstractmethod
    def catalogue(self) -> Catalogue:
        """Turn the data set's own files into tasks and records, without reading a pixel."""

    @property
    def salt(self) -> str:
        """Salt of the patients' hashes: the data set, so that patient 1 of two sets is not one person."""
        return type(self).__name__

    def plan(self) -> None:
        """Read the catalogue and split it; nothing is decoded. Does nothing the second time.

        Raises:
            DataError: The catalogue is empty or contradicts itself, or a patient would be in two splits.
            ConfigError: ``tasks`` or ``where`` keep nothing.
        """
        if self.splits:
            return
        catalogue = self.catalogue()
        check_catalogue(catalogue, type(self).__name__)
        for note in catalogue.notes:
            _tell(note)
        records = some_patients(catalogue.records, self.limit, self.seed)
        splits = assign_splits(
            records,
            catalogue.tasks,
            self.val_fraction,
            self.test_fraction,
            self.seed,
            self.official_splits,
            self.fold,
            self.folds,
        )
        self.tasks = choose_tasks(catalogue.tasks, self.only_tasks)
        lost = {subject: len(ids) for subject, ids in self.quarantine.lost().items()}  # by ``catalogue`` itself
        totals = _labelled(catalogue.records, self.tasks)
        self.quarantine.check({k: n + lost.get(k, 0) for k, n in totals.items()}, self.max_quarantine_share)
        kept = [r for r in records if self.only_patients is None or r.patient in self.only_patients]
        self._planned = self.records = select(kept, self.where)
        mine = {(record.id, task) for record in self.records for task in self.tasks}
        issues = self.quarantine.issues
        self.quarantine.issues = [i for i in issues if i.subject == IMAGE or (i.id, i.subject) in mine]
        self.splits = {record.id: splits[record.id] for record in self.records}

    def setup(self, stage: str | None = None) -> None:
        """Plan, then decode what the stage needs and is not in the cache.

        Args:
            stage: ``fit``, ``validate``, ``test``, ``predict``, or ``None`` for all but ``predict``.

        Raises:
            DataError: As ``plan`` does; too much cannot be used, a split has no labelled image, or the cache is full.
        """
        self.plan()
        if stage == "predict":
            self._build({"predict": self.predict_split})
        else:
            needed = ("train", "val", "test") if stage is None else STAGES[stage]
            self._build({split: split for split in map(self._serving, needed)})

    def describe(self) -> dict[str, Any]:
        """Return the counts that reports show, once set up (see ``datamodules.audit.description.describe``)."""
        return describe(self)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training batches, in the sampler's order, augmented.

        Under a distributed strategy the sampler shares the images out itself and Lightning leaves it in place.
        """
        data = self.datasets["train"]
        replicas, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        order = TaskSampler(data.records, self.tasks, self.sampler, self.batch_size, self.seed, replicas, rank)
        return self._loader(data, EpochSampler(order))

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return the validation batches in a fixed order, or none if there is no validation split.

        Under a distributed strategy Lightning shares them out, repeating a few images to even out the processes; for
        figures to publish, validate and test on one device.
        """
        return self._loader(self.datasets["val"]) if "val" in self.datasets else []

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the test batches in a fixed order; those of validation where there is no test split."""
        return self._loader(self.datasets[self._serving("test")])

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the batches of ``predict_split``, labelled or not, in a fixed order."""
        return self._loader(self.datasets["predict"])

    def _loader(self, data: CachedDataset, sampler: EpochSampler | None = None) -> DataLoader[Any]:
        return (DataLoader if sampler is None else ResumableLoader)(
            data,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=partial(collate, tasks=self.tasks),
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            generator=torch.Generator().manual_seed(self.seed),  # seeds the workers, leaves the global stream alone
        )

    def _serving(self, split: Split) -> Split:
        """Return the split that serves as the given one: validation tests where nothing is held out."""
        return "val" if split == "test" and "test" not in self.splits.values() else split

    def _build(self, needed: Mapping[str, str]) -> None:
        """Decode the records of several splits and make their data sets; those already made stay."""
        wanted = {
            name: [r for r in self._planned if split in ("all", self.splits.get(r.id))]
            for name, split in needed.items()
            if name not in self.datasets
        }
        if not wanted:
            return
        records = list({record.id: record for split in wanted.values() for record in split}.values())
        keys = dict(zip((r.id for r in records), self.preprocessing.keys(records), strict=True))
        reports = self.cache.fill(records, list(keys.values()), self.preprocessing, self.num_workers)
        self._sort_out(records, {record.id: reports[keys[record.id]] for record in records})
        usable = {record.id: record for record in self.records}
        for name, split in wanted.items():
            kept = [usable[r.id] for r in split if r.id in usable]
            kept = [r for r in kept if name == "predict" or self.tasks.keys() & r.truth.keys()]
            if split and not kept:
                raise DataError(
                    f"{self.salt}: none of the {len(split)} images of split {name} can be used for {self._names()}"
                )
            if name == "train":
                _tell(advice(kept, self.tasks))
            if kept:
                self.datasets[name] = CachedDataset(
                    kept,
                    [keys[r.id] for r in kept],
                    self.tasks,
                    self.cache,
                    self.preprocessing,
                    augment=name == "train",
                    seed=self.seed,
                    salt=self.salt,
                )

    def _sort_out(self, records: Sequence[Record], reports: Mapping[str, Report]) -> None:
        """Take what cannot be used out of ``records`` and ``splits``, and say so."""
        for record in records:
            if record.id in self._read:
                continue
            self._read.add(record.id)
            issues = [replace(i, id=record.id, file=record.file.name) for i in reports[record.id].issues]
            issues = [i for i in issues if i.subject in self.tasks or i.subject == IMAGE]
            self.quarantine.add(issues, reports[record.id].remarks)
            self._decoding.add(issues)
        lost = self._decoding.lost()
        totals = _labelled([r for r in self._planned if r.id in self._read], self.tasks)
        self._decoding.check(totals, self.max_quarantine_share)
        if self.quarantine.summary() != self._told:
            self._told = self.quarantine.summary()
            _tell(f"{self.salt}: {self._told}")
        gone = lost.pop(IMAGE, set())
        self.records = [
            replace(r, truth={t: v for t, v in r.truth.items() if r.id not in lost.get(t, ())})
            for r in self._planned
            if r.id not in gone
        ]
        self.splits = {record.id: self.splits[record.id] for record in self.records}

    def _names(self) -> str:
        return ", ".join(self.tasks)

    def _check_arguments(self) -> None:
        for name, value, least in (
            ("image_size", min(self.image_size), 16),
            ("batch_size", self.batch_size, 1),
            ("num_workers", self.num_workers, 0),
            ("limit", self.limit, 1),
        ):
            if value is not None and value < least:
                raise ConfigError(f"data.init_args.{name} is {value}; it must be at least {least}")
        if not 0 <= self.max_quarantine_share <= 1:
            raise ConfigError(
                f"data.init_args.max_quarantine_share is {self.max_quarantine_share}; it is a share, 0 to 1"
            )
        if self.cache_max_gb <= 0:
            raise ConfigError(f"data.init_args.cache_max_gb is {self.cache_max_gb}; it must be above 0")


def _labelled(records: Sequence[Record], tasks: dict[str, Task]) -> dict[str, int]:
    """Count the records by what the quarantine may take from them: the image, or the truth of a task."""
    return {task: sum(task in record.truth for record in records) for task in tasks} | {IMAGE: len(records)}


def _height_width(size: int | tuple[int, int]) -> tuple[int, int]:
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2:
        raise ConfigError(f"data.init_args.image_size is {size}; give one number or [height, width]")
    return (sides[0], sides[1])


@rank_zero_only
def _tell(message: str) -> None:
    if message:
        log.warning(message)
