"""Split records into train, val and test by patient, with rare labels and small sites in each split.

The greedy rule is that of scikit-learn's ``StratifiedGroupKFold`` (patients one by one, each to the part whose label
counts stay closest to their targets), extended to several labels per image and parts of different size. The order of
the patients does not depend on the order of the records.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from datamodules.loading.samplers import strata
from datamodules.records import Record, Split
from mtmedformer.batch import Task
from mtmedformer.errors import ConfigError, DataError

log = logging.getLogger(__name__)


class TooFewPatientsError(DataError):
    """Patients without an official split are too few for the parts asked for.

    Attributes:
        splits: Split of each record by its id, with these patients in ``train``.
    """

    def __init__(self, message: str, splits: dict[str, Split] | None = None) -> None:
        super().__init__(message)
        self.splits = splits or {}


def assign_splits(
    records: Sequence[Record],
    tasks: dict[str, Task],
    val_fraction: float = 0.15,
    test_fraction: float = 0.2,
    seed: int = 0,
    official: bool = True,
    fold: int | None = None,
    folds: int = 5,
) -> dict[str, Split]:
    """Assign every record to a split, all records of a patient to the same one.

    Official splits of records are kept; a patient without one is in training. If no record is officially in val (or
    test), that split is taken from training, with the shares of each task's labels and of the sites preserved; where
    every record is officially in val or test, there is nothing to take it from. The result does not depend on the order
    of the records.

    Args:
        records: All usable records.
        tasks: The tasks by name; their labels are what is balanced.
        val_fraction: Share of the images in val, if val is taken from training; 0: no val.
        test_fraction: Share of the images in test, if test is taken from training; 0: no test, val is used instead.
        seed: Decides between patients with the same labels.
        official: Keep ``Record.split``; otherwise ignore it.
        fold: Use this part of ``folds`` equal ones as val (cross-validation); every patient outside test is in val in
            exactly one fold. Official val counts as training then; test is the same in every fold.
        folds: Number of parts, at least 2.

    Returns:
        The split of each record by its id.

    Raises:
        DataError: A patient is in two official splits, a patient key is missing, or an id appears twice.
        TooFewPatientsError: There are too few patients for the parts.
        ConfigError: Fractions or folds out of their ranges.
    """
    if not (val_fraction >= 0 and test_fraction >= 0 and val_fraction + test_fraction < 1):
        raise ConfigError(
            f"val_fraction {val_fraction} and test_fraction {test_fraction} must be 0 or more and leave some for "
            f"training (sum below 1)"
        )
    if fold is not None and not (folds >= 2 and 0 <= fold < folds):
        raise ConfigError(f"fold is {fold} of {folds}; choose folds of at least 2 and fold from 0 to folds - 1")
    patients = _by_patient(records)
    fixed = _official(patients) if official else {}
    if fold is not None:
        fixed = {p: s for p, s in fixed.items() if s == "test"}
    official_splits = set(fixed.values())
    splits: dict[str, Split] = {p: s for p, s in fixed.items() if s != "train"}
    pool = [p for p in patients if p not in splits]
    if pool:
        try:
            vectors = _label_counts(patients, tasks)
            splits |= _drawn(
                pool, patients, vectors, official_splits, val_fraction, test_fraction, seed, fold, folds
            )  # fmt: skip
        except TooFewPatientsError as error:
            kept: dict[str, Split] = {r.id: splits.get(r.patient, "train") for r in records}
            raise TooFewPatientsError(str(error), kept) from None
    return {r.id: splits.get(r.patient, "train") for r in records}


def _drawn(
    pool: Sequence[str],
    patients: dict[str, list[Record]],
    vectors: dict[str, NDArray[np.float64]],
    official: Collection[Split],
    val_fraction: float,
    test_fraction: float,
    seed: int,
    fold: int | None,
    folds: int,
) -> dict[str, Split]:
    """Draw val and test, where there is no official one, from a pool of patients; return their splits."""
    splits: dict[str, Split] = {}
    if "test" not in official and test_fraction > 0:
        rest = 1 - test_fraction
        keep = folds if fold is not None else 2 if "val" not in official and val_fraction > 0 else 1
        parts = _partition(pool, patients, vectors, [rest, test_fraction], [keep, 1], f"{seed} test")
        splits |= dict.fromkeys(parts[1], "test")
        pool, val_share = parts[0], val_fraction / rest
    else:
        val_share = val_fraction
        if "test" not in official:
            log.warning("splits: no test split (test_fraction is 0); val is used as test")
    if fold is not None:
        parts = _partition(pool, patients, vectors, [1 / folds] * folds, [1] * folds, f"{seed} fold")
        splits |= dict.fromkeys(parts[fold], "val")
    elif "val" not in official and val_fraction > 0:
        parts = _partition(pool, patients, vectors, [1 - val_share, val_share], [1, 1], f"{seed} val")
        splits |= dict.fromkeys(parts[1], "val")
    return splits


def _by_patient(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Group records by patient, in an order that does not depend on the order of the records."""
    twice = [i for i, n in Counter(r.id for r in records).items() if n > 1]
    if twice:
        named = sorted(r.file.name for r in records if r.id in set(twice))
        raise DataError(f"{len(twice)} image ids are not unique ({_few(named)}); remove the repeated rows")
    nameless = [r.file.name for r in records if not r.patient.strip()]
    if nameless:
        raise DataError(
            f"{len(nameless)} images have no patient key ({_few(sorted(nameless))}), so they cannot be kept out of two "
            f"splits; fill the patient column (the image's own name, if every image is another patient)"
        )
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in sorted(records, key=lambda r: (r.patient, r.id)):
        groups[record.patient].append(record)
    return dict(groups)


def _official(patients: dict[str, list[Record]]) -> dict[str, Split]:
    """Return the official split of each patient who has one."""
    seen: dict[str, dict[Split, str]] = {}
    for patient, records in patients.items():
        for record in records:
            if record.split is not None:
                seen.setdefault(patient, {}).setdefault(record.split, record.file.name)
    _raise_if_crossing(
        seen,
        "correct the split column, drop those images, or set official to false to split anew by patient (if only the "
        "numbering of two sites coincides, put the site before the patient key)",
    )
    return {patient: next(iter(names)) for patient, names in seen.items()}


def _raise_if_crossing(seen: dict[str, dict[Split, str]], fix: str) -> None:
    crossing = [names for names in seen.values() if len(names) > 1]
    if crossing:
        named = sorted(" and ".join(f"{file} ({split})" for split, file in sorted(f.items())) for f in crossing)
        who = "1 patient has" if len(crossing) == 1 else f"{len(crossing)} patients have"
        raise DataError(f"{who} images in more than one split: {_few(named, '; ')}. Fix: {fix}")


def _few(names: Sequence[str], between: str = ", ", limit: int = 5) -> str:
    more = f"{between}and {len(names) - limit} more" if len(names) > limit else ""
    return between.join(names[:limit]) + more


def _label_counts(patients: dict[str, list[Record]], tasks: dict[str, Task]) -> dict[str, NDArray[np.float64]]:
    """Count per patient the images and the images with each label, over all and per site."""
    names_of: dict[str, list[str]] = {}
    for patient, records in patients.items():
        names = names_of[patient] = []
        for record in records:
            labels = strata(record, tasks)
            names += ["image", *labels, f"@{record.site}", *(f"{label}@{record.site}" for label in labels)]
    column = {name: i for i, name in enumerate(sorted({w for ws in names_of.values() for w in ws}))}
    counts = {patient: np.zeros(len(column)) for patient in patients}
    for patient, names in names_of.items():
        for name in names:
            counts[patient][column[name]] += 1
    return counts


def _partition(
    pool: Sequence[str],
    patients: dict[str, list[Record]],
    vectors: dict[str, NDArray[np.float64]],
    shares: Sequence[float],
    least: Sequence[int],
    seed: str,
) -> list[list[str]]:
    """Distribute patients over parts of given shares, each to the part whose label counts stay closest to the target.

    Patients with the rarest labels come first, then those with the most images; a hash of key and seed decides between
    equals. Part k gets at least ``least[k]`` patients.
    """
    if len(pool) < sum(least):
        images = sum(len(patients[p]) for p in pool)
        raise TooFewPatientsError(
            f"{len(pool)} patient(s) with {images} image(s) are too few to split: {sum(least)} are needed, one "
            f"for each part; add patients, or ask for fewer parts (val_fraction: 0, test_fraction: 0, fewer folds)"
        )
    table = np.stack([vectors[p] for p in pool])
    total = table.sum(axis=0)
    table, total = table[:, total > 0], total[total > 0]
    rarest = np.where(table > 0, total, np.inf).min(axis=1)
    tie = [hashlib.blake2b(f"{seed}\x00{p}".encode(), digest_size=8).hexdigest() for p in pool]
    turn = sorted(range(len(pool)), key=lambda i: (rarest[i], -len(patients[pool[i]]), tie[i]))
    target = np.outer(shares, total)
    gap = target.copy()  # counts that each part still lacks
    parts: list[list[int]] = [[] for _ in shares]
    for i in turn:
        # how the sum of gap² / target (Pearson's chi-squared) changes when a part gets i
        best = int(np.argmin(((table[i] ** 2 - 2 * table[i] * gap) / target).sum(axis=1)))
        parts[best].append(i)
        gap[best] -= table[i]
    for k, part in enumerate(parts):
        while len(part) < least[k]:
            donor = parts[max(range(len(parts)), key=lambda j: len(parts[j]) - least[j])]
            smallest = min(donor, key=lambda i: (len(patients[pool[i]]), tie[i]))
            donor.remove(smallest)
            part.append(smallest)
    return [[pool[i] for i in part] for part in parts]
