"""Summarise the images of a data set, or of every site of a federation: counts, sizes, grey values, warnings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from datamodules.audit.image_statistics import ImageStatistics
from datamodules.audit.near_duplicates import LeakReport, find_duplicates, leak_report
from datamodules.audit.shortcuts import Shortcut, find_shortcuts
from datamodules.cache.quarantine import Quarantine
from datamodules.loading.samplers import is_positive, strata
from datamodules.records import ClassTruth, Split, ValueTruth
from mtmedformer.batch import Task
from mtmedformer.commands.fingerprint.image_sets import ImageSet
from mtmedformer.commands.fingerprint.suggestions import Suggestion, suggest

SPLITS: tuple[Split, ...] = ("train", "val", "test")
QUANTILES = (5, 25, 50, 75, 95)

Quantiles = dict[str, float]
"""Values by percentage: ``{"5": …, "25": …, "50": …, "75": …, "95": …}``."""


@dataclass(frozen=True)
class SplitCount:
    """Number of images and of patients in a split."""

    images: int
    patients: int


@dataclass(frozen=True)
class LabelCount:
    """Number of images labelled for a task, and of those that are positive."""

    labelled: int = 0
    positive: int = 0


LabelCounts = dict[str, dict[Split, dict[str, LabelCount]]]
"""Label counts by site, split and task."""


@dataclass(frozen=True)
class OriginalSize:
    """Size of the original images in pixels: quantiles, and the five most common ``[height, width, images]``."""

    height: Quantiles
    width: Quantiles
    most_common: list[list[int]]


@dataclass(frozen=True)
class Intensity:
    """Quantiles of grey values in [0, 1], and the share of pixels in each of 64 bins."""

    quantiles: Quantiles
    histogram: list[float]


@dataclass(frozen=True)
class StructureSizes:
    """Boxes or masks of one class: their number and the quantiles of the square root of their areas.

    Attributes:
        count: Number of boxes, or of images with the mask.
        original_px: In pixels of the original image.
        mm: In mm; ``None`` where the pixel spacing is unknown.
        input_px: In pixels of the present input.
        suggested_px: In pixels of the suggested input.
    """

    count: int
    original_px: Quantiles
    mm: Quantiles | None
    input_px: Quantiles
    suggested_px: Quantiles


@dataclass(frozen=True)
class Fingerprint:
    """Summary of a data set in plain values.

    Attributes:
        dataset: Class of the data module.
        images: Number of usable images that are labelled for some task.
        patients: Number of patients.
        splits: Images and patients by split.
        tasks: The tasks by name.
        labelled: Labelled and positive images by site, split and task. An image is positive with a class that is not
            called normal, a box, or a mask. A task without labels at a site has no entry there.
        classes: Images with a class (or boxes of it, or its mask) by task, class and split.
        original_size: Size of the original images.
        content_size: Median height and width, in original pixels, of the region that the preset keeps.
        spacing_mm: Quantiles of the pixel spacing in mm; ``None`` where no file states it.
        intensity: Grey values by site.
        structures: Sizes of boxes and masks by task and class.
        image_size: Height and width of the present input.
        quarantine: Number of images or labels that were left out, by reason.
        leaks: Near-duplicates.
        shortcuts: Findings that can be predicted without the image.
        suggestion: Suggested settings with reasons.
        implausible: Sentences on labels and films that are probably wrong in the whole set: units of boxes, polarity
            of masks, spellings.
        warnings: Sentences to read before training.
        sites: Fingerprints of the sites of a federation by name; empty for a single data set.
        white_level: The value of white in 16-bit images (``data.white_level``); ``None`` where no file needs it, and
            for sites of different levels.
    """

    dataset: str
    images: int
    patients: int
    splits: dict[Split, SplitCount]
    tasks: dict[str, Task]
    labelled: LabelCounts
    classes: dict[str, dict[str, dict[Split, int]]]
    original_size: OriginalSize
    content_size: tuple[int, int]
    spacing_mm: Quantiles | None
    intensity: dict[str, Intensity]
    structures: dict[str, dict[str, StructureSizes]]
    image_size: tuple[int, int]
    quarantine: dict[str, int]
    leaks: LeakReport
    shortcuts: list[Shortcut]
    suggestion: Suggestion
    implausible: list[str]
    warnings: list[str]
    sites: dict[str, Fingerprint] = field(default_factory=dict)
    white_level: int | None = None


def summarise(images: ImageSet) -> Fingerprint:
    """Summarise the images of one data set."""
    facts, tasks = images.facts, images.tasks
    duplicates = find_duplicates(np.stack([f.thumbnail for f in facts]), [f.record.id for f in facts])
    leaks = leak_report(duplicates, [f.record for f in facts], {f.record.id: f.split for f in facts})
    shortcuts = find_shortcuts(facts, tasks)
    suggestion = suggest(facts, tasks, images.batch_size, images.negative)
    spacings = [float(np.mean(f.spacing)) for f in facts if f.spacing]
    by_split = {split: [f for f in facts if f.split == split] for split in SPLITS}
    return Fingerprint(
        dataset=images.dataset,
        images=len(facts),
        patients=len({f.record.patient for f in facts}),
        splits={s: SplitCount(len(own), len({f.record.patient for f in own})) for s, own in by_split.items() if own},
        tasks=dict(tasks),
        labelled=_labelled(tasks, facts, images.negative),
        classes=_classes(tasks, facts),
        original_size=OriginalSize(
            _quantiles([f.size[0] for f in facts]),
            _quantiles([f.size[1] for f in facts]),
            [[*size, n] for size, n in Counter(f.size for f in facts).most_common(5)],
        ),
        content_size=suggestion.content,
        spacing_mm=_quantiles(spacings) if spacings else None,
        intensity=_intensity(facts),
        structures=_structures(facts, suggestion),
        image_size=images.image_size,
        quarantine=dict(images.quarantine.by_reason()),
        leaks=leaks,
        shortcuts=shortcuts,
        suggestion=suggestion,
        implausible=list(images.implausible),
        warnings=_warnings(images, leaks, shortcuts),
        white_level=images.white_level,
    )


def summarise_sites(sites: Mapping[str, ImageSet], tasks: dict[str, Task]) -> tuple[Fingerprint, list[ImageStatistics]]:
    """Summarise a federation: all images together, and those of each site.

    Args:
        sites: The images of each site.
        tasks: The tasks of all sites by name.

    Returns:
        The fingerprint of all images, with that of each site in ``sites``; and the images.
    """
    facts = [fact for images in sites.values() for fact in images.facts]
    first = next(iter(sites.values()))
    quarantine = Quarantine()
    for images in sites.values():
        quarantine.add(images.quarantine.issues, images.quarantine.remarks.elements())
    names = " and ".join(sorted({images.dataset for images in sites.values()}))
    implausible = [f"{name}: {sentence}" for name, images in sites.items() for sentence in images.implausible]
    levels = {images.white_level for images in sites.values()} - {None}
    together = summarise(
        ImageSet(
            f"Federation of {names}",
            facts,
            tasks,
            first.image_size,
            first.batch_size,
            quarantine,
            implausible,
            frozenset().union(*(images.negative for images in sites.values())),
            levels.pop() if len(levels) == 1 else None,
        )
    )
    parts = {name: summarise(images) for name, images in sites.items()}
    warnings = [*_site_warnings(parts), *together.warnings]
    return replace(together, sites=parts, warnings=warnings), facts


def _labelled(tasks: Mapping[str, Task], facts: Sequence[ImageStatistics], negative: Collection[str]) -> LabelCounts:
    table: LabelCounts = {}
    for fact in facts:
        for name, task in tasks.items():
            words = strata(fact.record, {name: task})
            if words:
                cells = table.setdefault(fact.record.site, {}).setdefault(fact.split, {})
                before = cells.get(name, LabelCount())
                positive = tasks[name].kind != "regression" and any(is_positive(word, negative) for word in words)
                cells[name] = LabelCount(before.labelled + 1, before.positive + positive)
    return {site: table[site] for site in sorted(table)}


def _classes(tasks: Mapping[str, Task], facts: Sequence[ImageStatistics]) -> dict[str, dict[str, dict[Split, int]]]:
    counts: Counter[tuple[str, str, Split]] = Counter()
    for fact in facts:
        counts.update({(s.task, s.label, fact.split) for s in fact.structures})
        for name, truth in fact.record.truth.items():
            if name in tasks and isinstance(truth, ClassTruth):
                values = zip(tasks[name].classes, truth.values, strict=True)
                counts.update((name, label, fact.split) for label, value in values if value == 1)
            elif name in tasks and isinstance(truth, ValueTruth) and tasks[name].classes:
                counts[name, tasks[name].classes[int(truth.value)], fact.split] += 1
    return {
        name: {label: {split: counts[name, label, split] for split in SPLITS} for label in task.classes}
        for name, task in tasks.items()
    }


def _intensity(facts: Sequence[ImageStatistics]) -> dict[str, Intensity]:
    by_site = {}
    for site in sorted({f.record.site for f in facts}):
        mean = np.mean([f.histogram for f in facts if f.record.site == site], axis=0)
        edges = np.linspace(0, 1, len(mean) + 1)
        below = np.concatenate([[0], np.cumsum(mean)])
        quantiles = {str(q): round(float(np.interp(q / 100, below, edges)), 3) for q in QUANTILES}
        by_site[site] = Intensity(quantiles, [round(float(v), 5) for v in mean])
    return by_site


def _structures(facts: Sequence[ImageStatistics], suggestion: Suggestion) -> dict[str, dict[str, StructureSizes]]:
    sizes: dict[str, dict[str, StructureSizes]] = {}
    every = [s for f in facts for s in f.structures]
    for task, label in sorted({(s.task, s.label) for s in every}):
        own = [s for s in every if (s.task, s.label) == (task, label)]
        mm = [s.size * s.spacing for s in own if s.spacing is not None]
        sizes.setdefault(task, {})[label] = StructureSizes(
            count=len(own),
            original_px=_quantiles([s.size for s in own]),
            mm=_quantiles(mm) if mm else None,
            input_px=_quantiles([s.framed for s in own]),
            suggested_px=_quantiles([s.size / suggestion.pixels_per_pixel for s in own]),
        )
    return sizes


def _warnings(images: ImageSet, leaks: LeakReport, shortcuts: Sequence[Shortcut]) -> list[str]:
    warnings = []
    if leaks.across_splits:
        pairs = "; ".join(f"{p.first} and {p.second}" for p in leaks.across_splits[:3])
        warnings.append(
            f"{len(leaks.across_splits)} near-duplicate pair(s) cross splits, so test scores will be too high "
            f"({pairs}). Give both images one patient key, or remove one of them."
        )
    if leaks.across_sites:
        warnings.append(
            f"{len(leaks.across_sites)} near-duplicate pair(s) are at two sites; a federation counts them twice."
        )
    if leaks.across_patients:
        warnings.append(
            f"{len(leaks.across_patients)} near-duplicate pair(s) have two patient keys; another split may put them on "
            "both sides of it."
        )
    for s in [s for s in shortcuts if s.warning][:5]:
        warnings.append(
            f"The {s.source} alone predicts {s.task}/{s.finding} with an AUC of {s.auc:.2f}; a model may use it "
            f"instead of the image. Report metrics for each {s.source} separately."
        )
    for name in images.tasks:
        for split in SPLITS:
            own = [f for f in images.facts if f.split == split]
            if own and not any(name in f.record.truth for f in own):
                warnings.append(f"No image of split {split} is labelled for {name}.")
    if images.quarantine.issues or images.quarantine.remarks:
        warnings.append(images.quarantine.summary())
    return warnings


def _site_warnings(sites: Mapping[str, Fingerprint]) -> list[str]:
    """Return warnings that only a federation can have."""
    warnings = []
    for split, consequence in (
        ("train", "they cannot take part in training; leave them out with data.only"),
        ("val", "their models are not validated at their own site"),
    ):
        without = [name for name, one in sites.items() if split not in one.splits]
        if without:
            warnings.append(f"No images in split {split} at {', '.join(without)}: {consequence}.")
    sizes = {name: list(one.image_size) for name, one in sites.items()}
    if len({tuple(size) for size in sizes.values()}) > 1:
        listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
        warnings.append(f"The sites use different input sizes (image_size): {listed}.")
    return warnings


def _quantiles(values: Sequence[float]) -> Quantiles:
    return {str(q): round(float(np.percentile(values, q)), 3) for q in QUANTILES}
