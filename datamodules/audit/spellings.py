"""Names that differ in spelling only: ids of one patient, classes and sites that were typed in several ways."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from datamodules.records import BoxTruth, ClassTruth, Record
from mtmedformer.batch import Task

WAYS = "case, blanks, leading zeros or a trailing '.0'"
WAYS_OF_WORDS = "case, blanks, hyphens, leading zeros or a trailing '.0'"

Place = Callable[[str, str], str]
"""Returns where a table names the class of a task, or an empty string."""


_BESIDE_LETTERS = re.compile(r"(?<=[^\W\d_])[\s_-]+(?=\w)|(?<=\w)[\s_-]+(?=[^\W\d_])")


def normal_form(name: str) -> str:
    """Return a name without case, blanks, leading zeros of its numbers and the ``.0`` of a spreadsheet's number."""
    squeezed = "".join(name.split()).casefold()
    squeezed = re.sub(r"^(\d+)\.0+$", r"\1", squeezed)
    return re.sub(r"(?<![\d.])0+(?=\d)", "", squeezed)


def spelled_alike(names: Iterable[str], words: bool = False) -> list[list[str]]:
    """Return the groups of different names with one normal form, each sorted.

    Args:
        names: The names.
        words: The names are words: hyphens and underscores beside letters do not matter either.
    """
    groups: dict[str, set[str]] = defaultdict(set)
    for name in names:
        groups[normal_form(_BESIDE_LETTERS.sub("", name) if words else name)].add(name)
    return [sorted(group) for _, group in sorted(groups.items()) if len(group) > 1]


def unite_patients(records: Sequence[Record]) -> tuple[list[Record], dict[str, str]]:
    """Give one spelling to patient ids that differ in spelling only, so that no split separates a patient's images.

    A patient key that contains the image's file name stands for one image and is left as it is.

    Args:
        records: All records of a data set.

    Returns:
        The records in their order, and a sentence by what it is about, without ids; none where nothing is united.
    """
    counts = Counter(record.patient for record in records if record.file.name not in record.patient)
    groups = spelled_alike(counts)
    if not groups:
        return list(records), {}
    chosen = {name: max(group, key=lambda n: counts[n]) for group in groups for name in group}
    images = sum(counts[name] for name in chosen)
    sentence = (
        f"The ids of {len(groups)} patient(s) with {images} images are written in several ways ({WAYS}); each counts "
        "as one patient. Write every id in one way, or give different patients ids that differ otherwise."
    )
    united = [replace(r, patient=chosen.get(r.patient, r.patient)) for r in records]
    return united, {"spelling of patients": sentence}


def class_spellings(
    records: Sequence[Record], tasks: Mapping[str, Task], place: Place = lambda task, label: ""
) -> dict[str, str]:
    """Return a sentence by task on classes that differ in spelling only, with the number of images of each.

    Args:
        records: The records.
        tasks: The tasks by name.
        place: Returns where the table names a class.
    """
    sentences = {}
    for name, task in tasks.items():
        groups = spelled_alike(task.classes, words=True)
        if groups:
            counts = _images_by_class(records, name, task.classes)
            listed = "; ".join(", ".join(f"{c!r} ({counts[c]} images)" for c in group) for group in groups)
            where = "; ".join(filter(None, (place(name, label) for group in groups for label in group)))
            sentences[name] = (
                f"{name}: classes differ in {WAYS_OF_WORDS} only: {listed}. They are trained as "
                f"different classes; write each in one way in the table{f' ({where})' if where else ''}."
            )
    return sentences


def site_spellings(records: Sequence[Record]) -> str:
    """Return a sentence on sites that differ in spelling only, empty where there are none."""
    counts = Counter(record.site for record in records)
    groups = spelled_alike(counts, words=True)
    listed = "; ".join(", ".join(f"{site!r} ({counts[site]} images)" for site in group) for group in groups)
    return f"Sites differ in {WAYS_OF_WORDS} only: {listed}. They count as different sites." if listed else ""


def _images_by_class(records: Sequence[Record], name: str, classes: Sequence[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for record in records:
        truth = record.truth.get(name)
        if isinstance(truth, ClassTruth):
            counts.update(c for c, value in zip(classes, truth.values, strict=True) if value == 1)
        elif isinstance(truth, BoxTruth):
            counts.update(classes[label] for label in {*truth.labels, *truth.mask_labels})
    return counts
