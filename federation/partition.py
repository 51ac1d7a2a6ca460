"""Cut one data set into sites by patient: equal shares, or label shares drawn from a Dirichlet distribution."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mtmedformer.errors import ConfigError
from mtmedformer.protocols import ClassLabels

Patients = Mapping[str, Sequence[Any]]
"""The records of each patient, by patient key."""


class Partition(ABC):
    """Assigns the patients of one data set to sites; all records of a patient go to the same site.

    Args:
        sites: Number of sites (``site_1``, ``site_2`` …), or their names.
        seed: Seed of the assignment.

    Raises:
        ConfigError: When there is no site, or two sites have one name.
    """

    def __init__(self, sites: int | list[str], seed: int = 0) -> None:
        self.sites = [f"site_{i + 1}" for i in range(sites)] if isinstance(sites, int) else list(sites)
        self.seed = seed
        if not self.sites or len(set(self.sites)) < len(self.sites):
            raise ConfigError(f"partition.sites is {sites}; give a number of 1 or more, or names that differ")

    @abstractmethod
    def shares(self, stratum: str) -> list[float]:
        """Return each site's share of the patients of a stratum; they sum to 1."""

    @abstractmethod
    def stratum(self, records: Sequence[Any]) -> str:
        """Return the stratum of a patient."""

    def assign(self, patients: Patients, splits: Mapping[str, str]) -> dict[str, str]:
        """Return each patient's site. It depends on the patients and the seed, not on their order.

        Within a stratum every split is divided in the same shares, so that a site validates on the kind of data it
        trains on. Every site gets at least one patient of every split that has as many patients as there are sites.

        Args:
            patients: The records of each patient.
            splits: Split of each record by its ``id``.

        Raises:
            ConfigError: When there are fewer training patients than sites.
        """
        groups: dict[tuple[str, str], list[str]] = defaultdict(list)
        for patient in sorted(patients, key=self._shuffled):
            split = splits[patients[patient][0].id]
            groups[split, self.stratum(patients[patient])].append(patient)
        owners: dict[str, str] = {}
        for (_, stratum), members in sorted(groups.items()):
            ends = np.cumsum(self.shares(stratum))
            sizes = np.array([len(patients[p]) for p in members], float)
            middles = (np.cumsum(sizes) - sizes / 2) / sizes.sum()
            for patient, place in zip(members, np.searchsorted(ends, middles), strict=True):
                owners[patient] = self.sites[min(int(place), len(self.sites) - 1)]
        for split in sorted({split for split, _ in groups}):
            members = [p for (other, _), group in sorted(groups.items()) if other == split for p in group]
            self._fill_empty_sites(split, members, owners)
        return owners

    def _fill_empty_sites(self, split: str, members: list[str], owners: dict[str, str]) -> None:
        if len(members) < len(self.sites):
            if split == "train":
                raise ConfigError(f"partition: {len(members)} training patients cannot be {len(self.sites)} sites")
            return
        for site in self.sites:
            held = Counter(owners[p] for p in members)
            if not held[site]:
                richest = max(self.sites, key=lambda s: held[s])
                owners[next(p for p in members if owners[p] == richest)] = site

    def _shuffled(self, patient: str) -> str:
        return hashlib.blake2b(f"{self.seed}\x00{patient}".encode(), digest_size=8).hexdigest()


class EqualShares(Partition):
    """Gives every site the same share of images, at random."""

    def shares(self, stratum: str) -> list[float]:
        """Return equal shares."""
        return [1 / len(self.sites)] * len(self.sites)

    def stratum(self, records: Sequence[Any]) -> str:
        """Return the same stratum for all patients."""
        return ""


class Dirichlet(Partition):
    r"""Divides the patients of each class in shares drawn from a symmetric Dirichlet distribution.

    A patient has the most frequent class of their images. Patients without the label form a class of their own.

    Args:
        sites: Number of sites, or their names.
        alpha: Concentration: at 100 the sites are alike, at 1 uneven, at 0.1 most sites have one class only.
        by: The classification task whose classes are divided; ``null`` takes the first one, or, without any, the set of
            labelled tasks.
        seed: Seed of the draw.

    Raises:
        ConfigError: When ``alpha`` is not above 0.

    Reference:
        Hsu, Qi, Brown, Measuring the Effects of Non-Identical Data Distribution, 2019, section 3.
    """

    def __init__(self, sites: int | list[str], alpha: float = 0.5, by: str | None = None, seed: int = 0) -> None:
        super().__init__(sites, seed)
        if alpha <= 0:
            raise ConfigError(f"partition.alpha is {alpha}; it must be above 0")
        self.alpha, self.by = alpha, by

    def shares(self, stratum: str) -> list[float]:
        """Return the shares drawn for a class."""
        key = int.from_bytes(hashlib.blake2b(f"{self.seed}\x00{stratum}".encode(), digest_size=8).digest())
        drawn = np.random.default_rng(key).dirichlet([self.alpha] * len(self.sites))
        return [float(share) for share in drawn]

    def stratum(self, records: Sequence[Any]) -> str:
        """Return the most frequent class of a patient's records."""
        counts = Counter(self._class_of(record.truth) for record in records)
        return min(counts, key=lambda name: (-counts[name], name))

    def _class_of(self, truth: Mapping[str, Any]) -> str:
        classes = {name: labels.values for name, labels in sorted(truth.items()) if isinstance(labels, ClassLabels)}
        if self.by is not None or classes:
            values = classes.get(self.by or next(iter(classes)), ())
            known = [v if v == v else -1.0 for v in values]  # NaN is unknown
            return str(int(np.argmax(known))) if known and max(known) > 0 else "none"
        return "+".join(sorted(truth))


@dataclass(frozen=True)
class Holding:
    """The counts of one site's data; they identify no patient.

    Attributes:
        site: Name of the site.
        patients: Training patients.
        images: Training images.
        validation: Validation images.
        labels: Training images by the task they are labelled for; every task of the federation has an entry.
    """

    site: str
    patients: int
    images: int
    validation: int
    labels: dict[str, int] = field(default_factory=dict)


def picture(holdings: Sequence[Holding]) -> Figure:
    """Draw the number of labelled images, one row per site and one column per task."""
    tasks = list(holdings[0].labels) if holdings else []
    columns = ["images", *tasks]
    counts = np.array([[h.images, *(h.labels[t] for t in tasks)] for h in holdings], float)
    figure = Figure(figsize=(1.6 + 1.1 * len(columns), 1.2 + 0.42 * len(holdings)), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(np.sqrt(counts), cmap="Blues", aspect="auto", vmin=0, vmax=max(1.0, float(np.sqrt(counts).max()) * 1.4))
    for (row, column), count in np.ndenumerate(counts):
        axes.text(column, row, f"{int(count)}" if count else "–", ha="center", va="center")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(holdings)), [h.site for h in holdings])
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set_title("Training images labelled for each task", fontsize=10)
    return figure
