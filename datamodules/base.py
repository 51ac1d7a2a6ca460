"""The base class of every data set: records, splits by patient, one decoding into a cache, augmentation, batches."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from datamodules.audit.description import describe
from datamodules.audit.plausibility import of_images, of_records
from datamodules.audit.spellings import unite_patients
from datamodules.cache.cache import Cache
from datamodules.cache.entries import Measures
from datamodules.cache.preprocessing import Preprocessing
from datamodules.cache.quarantine import IMAGE, Quarantine
from datamodules.images.presets import ChestPreset, PlainPreset, Preset
from datamodules.loading.arguments import check_arguments, height_width
from datamodules.loading.cases import check_case, labelled
from datamodules.loading.catalogue import advice, check_catalogue, choose_tasks, select, some_patients
from datamodules.loading.dataset import CachedDataset
from datamodules.loading.loaders import Loaders
from datamodules.loading.negatives import NEGATIVE, negative_names
from datamodules.loading.samplers import Strategy, describe_positives
from datamodules.loading.splits import TooFewPatientsError, assign_splits
from datamodules.loading.stages import Part, drawn_share, lacking, served, serves
from datamodules.loading.usable_records import UsableRecords, count_labelled, within_limits
from datamodules.loading.white_level import PreparedImages, WhiteLevel
from datamodules.records import Catalogue, Record, Split
from mtmedformer.batch import Task
from mtmedformer.errors import DataError
from mtmedformer.metrics.cases import CaseRule, Pooling, plain_name

log = logging.getLogger(__name__)


class MedicalDataModule(PreparedImages, Loaders, ABC):
    """Serve images with labels of several tasks: split by patient, decoded once, augmented, in batches.

    A data set implements ``catalogue`` and nothing else. Splits are made from the whole catalogue, before ``tasks`` and
    ``where`` select from it; a single-task baseline and the sites of a federation therefore have the splits of the
    joint run.

    Args:
        image_size: ``[height, width]`` of the network's input in pixels, at least 16, or one number for both.
        batch_size: Images per batch and process.
        num_workers: Processes that load batches, and that decode before the first epoch; 0 loads and decodes in the
            main process.
        seed: Seed of splits, order and augmentation. The same seed gives the same batches for any ``num_workers``.
        val_fraction: Share of the images in the validation split, where the data set has none of its own.
        test_fraction: Share of the images in the test split, where the data set has none of its own.
        official_splits: Keep the data set's own splits; ``false`` splits anew by patient.
        fold: Index of the part, out of ``folds``, that is the validation split (cross-validation); ``null`` for one
            fixed validation split.
        folds: Number of parts of a cross-validation.
        preset: Framing and augmentation; ``null`` for the whole image without augmentation.
        sampler: Order of the training images: ``shuffle``; ``positive``, a positive image in every batch while there
            are enough; ``sqrt``, rare combinations of labels drawn more often.
        negative: Names of the classes of images without a finding; all other classes, boxes and masks that are not
            empty make an image positive. Case, ``_`` and ``-`` do not matter. ``null``: by their names (normal,
            healthy, no cancer … see ``datamodules.loading.negatives``).
        positive: Names of positive classes; the other classes of their tasks are negative.
        negative_classes: Former name of ``negative``.
        size_limits: Smallest and largest side of an image in pixels, each or both ``null``; images with a smaller or
            larger side are left out.
        tasks: Names of the tasks to keep; images labelled for none of them are left out. ``null`` keeps all.
        where: Keep images with these values of site, view, laterality or a group only, for example
            ``{site: [eurorad], view: PA}``.
        cache_dir: Folder of the decoded images, shared by runs; ``null`` keeps them in memory.
        cache_max_gb: Largest size of the cache in GB (10^9 bytes); the entries unused for longest are removed.
        max_quarantine_share: Largest share, 0 to 1, of the images, or of the images labelled for one task, that may be
            unusable.
        case: Fields that name the case of an image, such as ``[patient, laterality]`` for a breast: patient, site,
            view, laterality, group columns. ``test`` and ``predict`` then also give results by case. Images of two
            patients are never one case.
        case_pooling: How the scores of a case's images become one: ``max``, ``mean`` or ``noisy_or``.
        case_batches: Put the images of a case into one batch, as a head over cases needs it; ``batch_size`` is then the
            mean number of images in a batch.
        limit: Use this many patients only, drawn with the seed; for tests.
        white_level: The value of white in 16-bit images; ``auto`` takes that of the training, else one for the set.
        test_split: The split that ``test`` reads, or ``all``, for a set that took no part in training. ``test`` is val
            where there is no test split.
        predict_split: The split that ``predict`` reads, or ``all``.

    Attributes:
        only_patients: Patients to be used, set before ``setup``; ``None`` uses all. Splits count all patients.
        tasks: Tasks by name, complete after ``plan``.
        records: Usable images with their usable labels, complete after ``setup``.
        splits: Split of each record by its id.
        quarantine: Images and labels that were left out so far, with reasons.
        implausible: Sentences on labels and films that are probably wrong in the whole set, by what they are about
            (see ``datamodules.audit.plausibility``), complete after ``setup``.
        datasets: Decoded images by split, complete after the ``setup`` of a stage that reads the split.
        preprocessing: How images are decoded and framed.
        cache: Where decoded images are kept.
        generated: Whether the images are drawn by a program and show no patient.
        negative_of_set: Negative classes that a data set defines, where their names do not show it.

    Raises:
        ConfigError: An argument is out of its range.
    """

    generated = False
    negative_of_set: ClassVar[tuple[str, ...]] = ()

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
        negative: list[str] | None = None,
        positive: list[str] | None = None,
        negative_classes: list[str] | None = None,
        size_limits: tuple[int | None, int | None] | None = None,
        tasks: list[str] | None = None,
        where: dict[str, str | list[str]] | None = None,
        cache_dir: Path | None = Path(".cache/mtmedformer"),
        cache_max_gb: float = 20.0,
        max_quarantine_share: float = 0.2,
        limit: int | None = None,
        white_level: WhiteLevel = "auto",
        test_split: Part = "test",
        predict_split: Part = "test",
        case: list[str] | None = None,
        case_pooling: Pooling = "max",
        case_batches: bool = False,
    ) -> None:
        super().__init__()
        self.image_size = height_width(image_size)
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
        self.named_negative = negative_classes if negative is None else negative
        self.named_positive, self.negative_classes = positive, negative_classes if negative is None else None
        self.negative = NEGATIVE if self.named_negative is None else frozenset(map(plain_name, self.named_negative))
        self.size_limits = size_limits
        self.only_tasks = tasks
        self.where = where or {}
        self.only_patients: frozenset[str] | None = None
        self.may_lack_labels = False
        self.cache_dir = cache_dir
        self.cache_max_gb = cache_max_gb
        self.max_quarantine_share = max_quarantine_share
        self.limit = limit
        self.white_level = white_level
        self.test_split: Part = test_split
        self.predict_split: Part = predict_split
        self.case = tuple(case or ())
        self.case_rule = CaseRule(case_pooling, self.negative)
        self.case_batches = case_batches
        check_arguments(self)
        self.tasks: dict[str, Task] = {}
        self.records: list[Record] = []
        self.splits: dict[str, Split] = {}
        self.quarantine = Quarantine()
        self.implausible: dict[str, str] = {}
        self._measures: dict[str, Measures] = {}
        self.datasets: dict[str, CachedDataset] = {}
        self.preprocessing = Preprocessing(preset or PlainPreset(), self.image_size)
        self.cache = Cache(cache_dir, cache_max_gb)
        self._usable: UsableRecords | None = None
        self._too_few: TooFewPatientsError | None = None

    @abstractmethod
    def catalogue(self) -> Catalogue:
        """Turn the data set's own files into tasks and records, without reading a pixel."""

    def plan(self) -> None:
        """Read the catalogue and split it by patient; no pixel is decoded. A second call does nothing.

        Raises:
            DataError: The catalogue is empty or contradicts itself, a patient would be in two splits, all boxes are
                fractions, or too many records are unusable.
            ConfigError: ``tasks`` or ``where`` leave no image.
        """
        if self.splits:
            return
        catalogue = self.catalogue()
        check_catalogue(catalogue, type(self).__name__)
        for note in catalogue.notes:
            log_warning(note)
        united, found = unite_patients(catalogue.records)
        self._report(found)
        records = some_patients(united, self.limit, self.seed)
        self.files_of_set = [record.file for record in records]
        self._settle_negative(catalogue.tasks)
        shares = (self.val_fraction, self.test_fraction, self.seed, self.official_splits, self.fold, self.folds)
        try:
            splits = assign_splits(records, catalogue.tasks, *shares)
        except TooFewPatientsError as error:  # ``test`` and others may do without the parts
            splits, self._too_few = error.splits, error
        self.tasks = choose_tasks(catalogue.tasks, self.only_tasks)
        lost = {subject: len(ids) for subject, ids in self.quarantine.lost().items()}  # by ``catalogue`` itself
        totals = count_labelled(catalogue.records, self.tasks)
        self.quarantine.check({k: n + lost.get(k, 0) for k, n in totals.items()}, self.max_quarantine_share)
        kept = [r for r in records if self.only_patients is None or r.patient in self.only_patients]
        self.records = select(kept, self.where)
        self._report({"case": sentence} if (sentence := check_case(self.case, self.records)) else {})
        selected = {(record.id, task) for record in self.records for task in self.tasks}
        issues = self.quarantine.issues
        self.quarantine.issues = [i for i in issues if i.subject == IMAGE or (i.id, i.subject) in selected]
        self.splits = {record.id: splits[record.id] for record in self.records}
        self._report(of_records(self.records, self.tasks, self.class_place))
        self._usable = UsableRecords(self.records, self.tasks, self.quarantine, self.max_quarantine_share)

    def _settle_negative(self, tasks: Mapping[str, Task]) -> None:
        """Find the negative classes, and log what is uncertain and decides the sampling."""
        key = "negative_classes" if self.negative_classes else "negative"
        named = (self.named_negative, self.named_positive, self.negative_of_set)
        self.negative, sentence = negative_names(tasks, *named, key)
        self.case_rule = replace(self.case_rule, negative=self.negative)
        if sentence and self.sampler == "positive" and self.only_patients is None:
            log_warning(f"{self.salt}: {sentence}")

    def setup(self, stage: str | None = None) -> None:
        """Plan, then decode the images that the stage reads and the cache lacks.

        Args:
            stage: ``fit``, ``validate``, ``test``, ``predict``, or ``None`` for all but ``predict``.

        Raises:
            DataError: As ``plan``; also where too much is unusable, a split has no labelled image, or the cache is
                full.
            ConfigError: As ``plan``.
        """
        self.plan()
        if stage in ("fit", None) and self._too_few is not None:
            raise self._too_few
        self._build(self._served(stage))

    def require(self, stage: str) -> None:
        """Check, after ``plan``, that there are images for a stage.

        Raises:
            DataError: No image is in a split that the stage needs, or there are too few patients to split.
        """
        if (stage == "fit" and self._too_few is not None) or not serves(stage, self._served(stage), self.splits):
            raise self._too_few or lacking(self.salt, stage, self.splits)

    def describe(self) -> dict[str, Any]:
        """Return the counts that reports show, once set up (see ``datamodules.audit.description.describe``)."""
        return describe(self)

    def _report(self, found: Mapping[str, str]) -> None:
        """Keep sentences on what is implausible, and log those that are new."""
        logged = self.only_patients is not None and self._usable is None  # by the set that was cut into sites
        for key, sentence in found.items():
            if key not in self.implausible and not logged:
                log_warning(f"{self.salt}: {sentence}")
        self.implausible |= found

    def class_place(self, task: str, label: str) -> str:
        """Return where a table names a class, with column and lines; empty for classes that the data set defines."""
        return ""

    def _served(self, stage: str | None) -> dict[str, Part]:
        return served(stage, self.splits, self.test_split, self.predict_split)

    def _build(self, needed: Mapping[str, str]) -> None:
        """Decode the records of several splits and make their data sets; a data set that exists is kept."""
        assert self._usable is not None
        wanted = {
            name: [r for r in self._usable.planned if split in ("all", self.splits.get(r.id))]
            for name, split in needed.items()
            if name not in self.datasets
        }
        if not wanted:
            return
        records = list({record.id: record for split in wanted.values() for record in split}.values())
        self.settle_channels(self.trainer)
        self._report(self.settle_white_level(self.salt, self.cache.folder, self.num_workers))
        keys = dict(zip((r.id for r in records), self.preprocessing.keys(records), strict=True))
        reports = self.cache.fill(records, list(keys.values()), self.preprocessing, self.num_workers)
        before = self.quarantine.summary()
        reports = [within_limits(report, self.size_limits) for report in reports]
        self.records = self._usable.add({r.id: report for r, report in zip(records, reports, strict=True)})
        self.splits = {record.id: self.splits[record.id] for record in self.records}
        if (summary := self.quarantine.summary()) and (summary != before or not self.datasets):
            log_warning(f"{self.salt}: {summary}")
        self._measures |= {r.id: report.measures for r, report in zip(records, reports, strict=True) if report.measures}
        self._report(of_images(self.records, self.tasks, self._measures, self.quarantine.issues))
        usable = {record.id: record for record in self.records}
        for name, split in wanted.items():
            kept = [usable[r.id] for r in split if r.id in usable]
            if name != "predict":
                with_views = self.case if name != "train" or self.case_batches else ()
                kept = labelled(kept, self.tasks, with_views)
            if split and not kept and not self.may_lack_labels:
                why = f"none of the {len(split)} images of split {name} can be used for {', '.join(self.tasks)}"
                raise DataError(f"{self.salt}: {why}; label some of them, or choose another seed or {name}_fraction")
            if name == "train" and kept and (sentence := advice(kept, self.tasks)):
                log_warning(sentence)
            if needed == {"test": "test"} and (sentence := drawn_share(self.salt, kept, len(self.records))):
                rank_zero_info(sentence)
            sampled = name == "train" and self.sampler == "positive" and self.only_patients is None
            if sampled and (sentence := describe_positives(kept, self.tasks, self.negative)):
                rank_zero_info(f"{self.salt}: {sentence}")
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
                    case=self.case,
                )


@rank_zero_only
def log_warning(message: str) -> None:
    """Log a warning for the user, once per run."""
    log.warning(message)
