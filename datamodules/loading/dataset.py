"""Decoded images as samples; augmentation depends on seed, epoch and record, not on the worker."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from datamodules.cache.cache import Cache
from datamodules.cache.entries import CacheEntry
from datamodules.cache.preprocessing import Preprocessing
from datamodules.images.luminance import grey_of
from datamodules.loading.cases import CaseBatches, Key, case_of
from datamodules.loading.samplers import TaskSampler
from datamodules.records import ClassTruth, Record, ValueTruth, hash_patient
from mtmedformer.batch import IGNORE, Boxes, Meta, Sample, Task
from mtmedformer.geometry import Affine, Floats, compose


class CachedDataset(Dataset[Sample]):
    """The samples of one split.

    Args:
        records: The usable images with their usable labels.
        keys: Name of the cache entry of each record.
        tasks: Tasks of a sample; labels of other tasks are left out.
        cache: The decoded images.
        preprocessing: Decodes an entry that has disappeared; its preset augments.
        augment: Whether to augment (training only).
        seed: Seed of the augmentation.
        salt: Salt of the patients' hashes.
        case: Fields whose values name the case of an image (`datamodules.loading.cases`).
    """

    def __init__(
        self,
        records: Sequence[Record],
        keys: Sequence[str],
        tasks: dict[str, Task],
        cache: Cache,
        preprocessing: Preprocessing,
        augment: bool = False,
        seed: int = 0,
        salt: str = "",
        case: Sequence[str] = (),
    ) -> None:
        self.records = list(records)
        self.keys = list(keys)
        self.tasks = tasks
        self.cache = cache
        self.preprocessing = preprocessing
        self.augment = augment
        self.seed = seed
        self.salt = salt
        self.case = tuple(case)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: int | Key | list[Key]) -> Any:
        """Return one sample, or a list of them for a list of keys.

        Args:
            key: Index of the record, or ``(epoch, turn, index)`` as ``EpochSampler`` yields it; an index alone means
                epoch 0 and turn 0.
        """
        if isinstance(key, list):
            return [self[one] for one in key]
        epoch, turn, index = (0, 0, key) if isinstance(key, int) else key
        record = self.records[index]
        entry = self.cache.fetch(self.keys[index], record, self.preprocessing)
        image = pixels_of(entry, self.preprocessing.channels)
        masks = {n: entry.masks[n] for n in self._known(record, "segmentation") if n in entry.masks}
        boxes = {n: (entry.boxes[n], entry.labels[n]) for n in self._known(record, "detection") if n in entry.boxes}
        to_original = entry.to_original
        if self.augment:
            moved = self.preprocessing.preset.augment(
                image,
                np.concatenate([*masks.values(), np.zeros((0, *image.shape[:2]), np.uint8)]),
                np.concatenate([*(b for b, _ in boxes.values()), np.zeros((0, 4), np.float32)]),
                np.concatenate([i + 1000 * n for n, (_, i) in enumerate(boxes.values())] or [np.zeros(0, np.int64)]),
                np.random.default_rng([self.seed, epoch, turn, _number(record.id)]),
            )
            image, to_original = moved.image, compose(to_original, moved.to_input)
            ends = np.cumsum([len(m) for m in masks.values()])
            masks = dict(zip(masks, np.split(moved.masks, ends[:-1]), strict=True)) if masks else {}
            owner, label = np.divmod(moved.labels, 1000)  # which task a box belongs to travels in its label
            boxes = {name: (moved.boxes[owner == n], label[owner == n]) for n, name in enumerate(boxes)}
        truth: dict[str, Tensor | Boxes | None] = dict.fromkeys(self.tasks)
        for name in self._known(record, "classification"):
            classes = record.truth[name]
            truth[name] = self._labels(classes) if isinstance(classes, ClassTruth) else None
        for name in self._known(record, "regression"):
            value = record.truth[name]
            truth[name] = torch.tensor(value.value, dtype=torch.float32) if isinstance(value, ValueTruth) else None
        truth |= {n: torch.from_numpy(np.ascontiguousarray(m)) for n, m in masks.items() if (m != IGNORE).any()}
        truth |= {n: Boxes(torch.from_numpy(b), torch.from_numpy(i)) for n, (b, i) in boxes.items()}
        return Sample(tensor_of(image), truth, meta_of(record, entry, to_original, self.salt, self.case))

    def _labels(self, classes: ClassTruth) -> Tensor:
        """Return the labels (K,); outside training the probability of an uncertain finding is unknown."""
        values = torch.tensor(classes.values, dtype=torch.float32)
        uncertain = (values > 0) & (values < 1)
        return values if self.augment else values.masked_fill(uncertain, float("nan"))

    def _known(self, record: Record, kind: str) -> list[str]:
        return [name for name, task in self.tasks.items() if task.kind == kind and name in record.truth]


def meta_of(record: Record, entry: CacheEntry, to_original: Affine, salt: str, case: Sequence[str] = ()) -> Meta:
    """Return an image's metadata for a batch; view and side of the record take precedence over the file's header."""
    view, laterality = record.view or entry.view, record.laterality or entry.laterality
    whole = replace(record, view=view, laterality=laterality)
    return Meta(
        id=record.id,
        patient=hash_patient(record.patient, salt),
        site=record.site,
        view=view,
        laterality=laterality,
        to_original=to_original,
        original_size=entry.original_size,
        spacing=entry.spacing,
        case=case_of(whole, case, salt),
        groups=record.groups,
    )


def pixels_of(entry: CacheEntry, channels: int = 1) -> Floats:
    """Return the image of an entry as float32 in [0, 1].

    Args:
        entry: The decoded image.
        channels: 1 for grey (H, W); 3 for (H, W, 3), in which a grey image has three equal channels.
    """
    pixels: Floats = np.divide(entry.image, np.iinfo(entry.image.dtype).max, dtype=np.float32)
    return with_channels(pixels, channels)


def with_channels(pixels: Floats, channels: int) -> Floats:
    """Return pixels (H, W) or (H, W, 3) as (H, W) for one channel, else as (H, W, 3)."""
    if channels == 1:
        return grey_of(pixels)
    return pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], channels, axis=2)


def tensor_of(pixels: Floats) -> Tensor:
    """Return pixels (H, W) or (H, W, C) as a tensor (C, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)))


class EpochSampler(DistributedSampler[Key]):
    """Add epoch and turn to each index of a sampler; the data set derives the augmentation from them.

    It is a ``DistributedSampler``, so Lightning keeps it and calls ``set_epoch``, also after a resume.

    Args:
        sampler: Yields indices.
    """

    def __init__(self, sampler: TaskSampler) -> None:
        super().__init__(sampler.dataset, sampler.num_replicas, sampler.rank, seed=sampler.seed)
        self.sampler = sampler
        self.skip = 0

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Key]:
        """Yield an epoch's keys; in the first epoch after a resume, without the first ``skip``."""
        skip, self.skip = self.skip, 0
        turns: dict[int, int] = {}
        for place, index in enumerate(self.sampler):
            turn = turns.get(index, 0)
            turns[index] = turn + 1
            if place >= skip:
                yield self.epoch, turn, index

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that decides order and augmentation."""
        super().set_epoch(epoch)
        self.sampler.set_epoch(epoch)


class ResumableLoader(DataLoader[Any]):
    """A ``DataLoader`` that counts the batches served, so that a run resumes at the next batch of an epoch.

    Lightning stores ``state_dict`` in the checkpoint and restores it before the first batch. Batches that workers have
    prepared but the trainer has not received are not counted.
    """

    served = 0
    pending = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield the batches of an epoch, after a resume from the first batch that was not served."""
        self.served, self.pending = self.pending, 0
        if self.served:
            assert isinstance(self.sampler, EpochSampler | CaseBatches)
            self.sampler.skip = self.served * (self.batch_size or 1)
        for batch in super().__iter__():
            self.served += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the number of batches served in this epoch."""
        return {"served": self.served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Skip that many batches of the next epoch."""
        self.pending = state["served"]


def _number(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
