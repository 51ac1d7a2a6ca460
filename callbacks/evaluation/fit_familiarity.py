"""Fit, at the end of training, what the training images were like, and add it to the checkpoints."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, Subset

from callbacks.federation.callback import Federation
from callbacks.federation.site_trainers import processes_of
from callbacks.prediction.familiarity_of_images import ImageFiles
from datamodules.loading.dataset import CachedDataset
from federation.datamodule import FederatedDataModule
from federation.exchange.collectives import Processes
from federation.site_loaders import Site
from mtmedformer.batch import Batch, collate
from mtmedformer.encoders.familiarity import (
    FEWEST_TRAINING,
    FEWEST_VALIDATION,
    DistanceSums,
    FeatureSums,
    HeaderValues,
    TrainingDistribution,
    fitted_features,
    plain,
)
from mtmedformer.module import MultiTaskModule
from mtmedformer.network import new_tensors_in_float32
from mtmedformer.protocols import SplitData
from mtmedformer.storage.hashing import state_hash

WORKERS_FROM = 256
"""Number of images from which the workers of the data module load them; starting workers takes seconds."""

Sources = dict[str, Any]
"""Data module or site by name, whose images are summed apart; ``""`` for data without sites."""


def add_familiarity(trainer: Trainer, module: MultiTaskModule, images: int, quantile: float) -> None:
    """Fit the familiarity of every kept checkpoint, and of the module's present weights; store it in the files.

    Every process calls it; the processes of a federation share the sites, otherwise the first one does the work.

    Args:
        trainer: The Trainer that has just fitted.
        module: Its module.
        images: Largest number of images per site and split.
        quantile: Quantile of the validation distances that is the limit.
    """
    sources = _sources(trainer)
    if not sources:
        return
    processes = processes_of(trainer)
    fitted: dict[str, TrainingDistribution] = {}

    def familiarity_of(weights: MultiTaskModule) -> TrainingDistribution:
        key = state_hash(weights.state_dict())
        if key not in fitted:
            fitted[key] = fit_familiarity(weights, sources, ImageFiles(trainer), processes, images, quantile)
        return fitted[key]

    # in the module itself and not in a copy: hooks of a profiler cannot be copied
    own = {key: value.clone() for key, value in module.state_dict().items()}
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        module.familiarity = familiarity_of(module)
        _report(module.familiarity)
        for file in _checkpoints(trainer):
            stored = torch.load(file, weights_only=True, map_location="cpu")
            module.load_state_dict(stored["state_dict"])
            stored["familiarity"] = plain(familiarity_of(module))
            if trainer.is_global_zero:
                trainer.strategy.checkpoint_io.save_checkpoint(stored, file)
    finally:
        module.load_state_dict(own)
        for part, training in modes.items():
            part.training = training
    trainer.strategy.barrier("familiarity stored")


@torch.no_grad()
@new_tensors_in_float32()
def fit_familiarity(
    module: MultiTaskModule, sources: Sources, files: ImageFiles, processes: Processes, images: int, quantile: float
) -> TrainingDistribution:
    """Fit mean and covariance of the features of the training images, and the limit from the validation images.

    Args:
        module: The model, in evaluation mode.
        sources: The data by site.
        files: The image files.
        processes: The processes of the run.
        images: Largest number of images per site and split.
        quantile: Quantile of the validation distances that is the limit.
    """
    features, headers = FeatureSums(), defaultdict[str, HeaderValues](HeaderValues)
    for i, (name, source) in enumerate(sources.items()):
        mine = i % processes.world == processes.rank
        own = processes.share(_described(module, source, name, files, images) if mine else None, i % processes.world)
        features = features.united(own[0])
        for fact, values in own[1].items():
            headers[fact] = headers[fact].united(values)
    found = fitted_features(features)
    familiarity = TrainingDistribution(features.images, quantile, dict(headers))
    if found is None:
        return familiarity
    familiarity = TrainingDistribution(features.images, quantile, dict(headers), None, None, *found)
    distances = DistanceSums()
    for i, source in enumerate(sources.values()):
        mine = i % processes.world == processes.rank
        measured = processes.share(
            _measured(module, source, familiarity, images) if mine else None, i % processes.world
        )
        distances = distances.united(measured)
    if distances.images < FEWEST_VALIDATION or not np.isfinite([distances.total, distances.squares]).all():
        return TrainingDistribution(features.images, quantile, dict(headers))
    return TrainingDistribution(features.images, quantile, dict(headers), distances, distances.limit(quantile), *found)


def _described(
    module: MultiTaskModule, source: Any, name: str, files: ImageFiles, images: int
) -> tuple[FeatureSums, dict[str, HeaderValues]]:
    """Return the sums of the features of a site's training images, and the values of their headers."""
    sums = FeatureSums()
    known: dict[str, int] = defaultdict(int)
    patients: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for batch in _batches(source, "train", images):
        sums.add(module.features(batch.image.to(module.device)))
        for meta in batch.meta:
            for fact, value in files.facts(meta, name).items():
                known[fact] += 1
                patients[fact][value].add(meta.patient)
    counts = {
        fact: {value: len(of) for value, of in sorted(by_value.items()) if len(of) > 1}
        for fact, by_value in patients.items()
    }
    return sums, {fact: HeaderValues(known[fact], counts[fact]) for fact in known}


def _measured(module: MultiTaskModule, source: Any, familiarity: TrainingDistribution, images: int) -> DistanceSums:
    """Return the sums of the distances of a site's validation images."""
    sums = DistanceSums()
    for batch in _batches(source, "val", images):
        sums.add(familiarity.distance(module.features(batch.image.to(module.device))))
    return sums


def _sources(trainer: Trainer) -> Sources:
    """Return the data by site; none where a privacy policy of a federation keeps such sums at the sites."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(callback, Federation) and callback.privacy is not None for callback in callbacks):
        rank_zero_info("Familiarity is not fitted: under a privacy policy the sites share no sums of features.")
        return {}
    if data is None:
        return {}
    return dict(data.sites) if isinstance(data, FederatedDataModule) else {"": data}


def _batches(source: Any, split: str, images: int) -> Iterator[Batch]:
    """Yield at most so many images of a split, evenly spread over it and without augmentation.

    The batches of a data module that keeps no ``CachedDataset`` are those of its own loader, augmented or not.
    """
    data: Any = source.source if isinstance(source, Site) else source
    dataset = data.datasets.get(split) if isinstance(data, SplitData) else None
    if isinstance(dataset, CachedDataset):
        yield from _unaugmented(dataset, images, int(data.batch_size), int(data.num_workers))
    elif not isinstance(data, SplitData):
        loader: Iterable[Any] = data.train_dataloader() if split == "train" else data.val_dataloader()
        if isinstance(loader, DataLoader):
            for batch in islice(loader, -(-images // (loader.batch_size or 1))):
                if isinstance(batch, Batch):
                    yield batch


def _unaugmented(dataset: CachedDataset, images: int, batch_size: int, workers: int) -> DataLoader[Any]:
    as_stored = copy.copy(dataset)
    as_stored.augment = False
    order = np.unique(np.linspace(0, len(dataset) - 1, min(len(dataset), images)).round().astype(int)).tolist()
    return DataLoader(
        Subset(as_stored, order),
        batch_size=batch_size,
        num_workers=workers if len(order) >= WORKERS_FROM else 0,
        collate_fn=partial(collate, tasks={}),
        generator=torch.Generator().manual_seed(0),  # leaves the global stream of random numbers alone
    )


def _checkpoints(trainer: Trainer) -> list[Path]:
    """Return the files of the kept checkpoints."""
    kept = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    paths = [path for c in kept for path in (*c.best_k_models, c.best_model_path, c.last_model_path)]
    return [file for file in map(Path, dict.fromkeys(paths)) if file.is_file()]


def _report(familiarity: TrainingDistribution) -> None:
    if familiarity.limit is None:
        rank_zero_info(
            f"No distance from the training images was fitted: it takes {FEWEST_TRAINING} training and "
            f"{FEWEST_VALIDATION} validation images."
        )
