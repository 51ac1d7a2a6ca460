"""The loaders of a data module: batches of images, or of whole cases."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from datamodules.loading.cases import CaseBatches
from datamodules.loading.dataset import CachedDataset, EpochSampler, ResumableLoader
from datamodules.loading.samplers import Strategy, TaskSampler
from datamodules.loading.stages import Part, lacking
from datamodules.records import Split
from mtmedformer.batch import Task, collate


class Loaders(L.LightningDataModule, ABC):
    """Loaders of a data module; `datamodules.MedicalDataModule` describes the arguments they read.

    Attributes:
        datasets: Decoded images by split.
        splits: Split of each record by its id.
    """

    datasets: dict[str, CachedDataset]
    splits: dict[str, Split]
    tasks: dict[str, Task]
    sampler: Strategy
    negative: frozenset[str]
    batch_size: int
    num_workers: int
    seed: int
    case: tuple[str, ...]
    case_batches: bool

    @property
    def salt(self) -> str:
        """Salt of the patients' hashes: the data set's name, so that equal keys of two sets are different patients."""
        return type(self).__name__

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training batches, augmented, in the order of ``sampler``.

        The sampler itself shares the images among the processes of a distributed run; Lightning does not replace it.
        """
        if "train" not in self.datasets:
            raise lacking(self.salt, "fit", self.splits)
        data = self.datasets["train"]
        replicas, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        if self.case_batches:
            return self._loader(data, self._cases(data, self.sampler))
        order = TaskSampler(
            data.records, self.tasks, self.sampler, self.batch_size, self.seed, replicas, rank, self.negative
        )
        return self._loader(data, EpochSampler(order))

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return the validation batches in a fixed order, or none if there is no validation split.

        In a distributed run Lightning shares them among the processes and repeats a few images so that all processes
        have equally many. Validate and test on one device for results to publish.
        """
        return self._loader(self.datasets["val"]) if "val" in self.datasets else []

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the test batches in a fixed order; the validation batches where there is no test split."""
        name = next(iter(self._served("test")))
        if name not in self.datasets:
            raise lacking(self.salt, "test", self.splits)
        return self._loader(self.datasets[name])

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the batches of ``predict_split``, labelled or not, in a fixed order."""
        if "predict" not in self.datasets:
            raise lacking(self.salt, "predict", self.splits)
        return self._loader(self.datasets["predict"])

    def _cases(self, data: CachedDataset, strategy: Strategy | None) -> CaseBatches:
        """Return the batches of whole cases of a data set, shared among the processes."""
        replicas, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        return CaseBatches(
            data.records, self.tasks, self.case, strategy, self.batch_size, self.seed, replicas, rank, self.negative
        )

    def _loader(self, data: CachedDataset, sampler: EpochSampler | CaseBatches | None = None) -> DataLoader[Any]:
        kind = DataLoader if sampler is None else ResumableLoader
        if self.case_batches and sampler is None:
            sampler = self._cases(data, None)
        return kind(
            data,
            batch_size=None if self.case_batches else self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=partial(collate, tasks=self.tasks),
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            generator=torch.Generator().manual_seed(self.seed),  # seeds the workers, leaves the global stream alone
        )

    @abstractmethod
    def _served(self, stage: str | None) -> Mapping[str, Part]:
        """Return the data sets that a stage reads, with the split of each."""
