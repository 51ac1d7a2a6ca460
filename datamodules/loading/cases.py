"""Cases: the images of one exam or breast, named by fields of their records, and batches of whole cases."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence

from torch.utils.data import DistributedSampler

from datamodules.loading.samplers import Strategy, TaskSampler, is_positive, strata
from datamodules.records import Record, hash_patient
from mtmedformer.batch import Task
from mtmedformer.errors import ConfigError

Key = tuple[int, int, int]
"""``(epoch, turn, index)``; turn is the number of earlier draws of the record in that epoch."""

FIELDS = ("patient", "site", "view", "laterality")
"""Fields of a record, besides its groups, that may name a case."""

_IN_HEADERS = ("view", "laterality")
"""Fields that are read from the header of a DICOM file where the record lacks them."""


def field_value(record: Record, name: str) -> str | None:
    """Return the value of a field of a record, or of one of its groups; ``None`` where there is none."""
    own = {"patient": record.patient, "site": record.site, "view": record.view, "laterality": record.laterality}
    return (own[name] if name in own else record.groups.get(name)) or None


def case_of(record: Record, case: Sequence[str], salt: str) -> str | None:
    """Return the key of a record's case: a hash of its patient, site and the values of some fields, 16 digits.

    Args:
        record: The record.
        case: Names of the fields; with none there are no cases.
        salt: Salt of the hashes.

    Returns:
        ``None`` where a value is missing: an image of unknown side belongs to no known breast.
    """
    values = [field_value(record, name) for name in case]
    if not values or None in values:
        return None
    return hash_patient("\x1f".join([record.site, record.patient, *(value or "" for value in values)]), f"{salt} case")


def check_case(case: Sequence[str], records: Sequence[Record]) -> str:
    """Check the fields that name cases; return a sentence on images without a value, or nothing.

    Raises:
        ConfigError: There is no such field.
    """
    groups = list(dict.fromkeys(key for record in records for key in record.groups))
    for name in case:
        if name not in (*FIELDS, *groups):
            raise ConfigError(
                f"data.init_args.case: images have no {name!r}; choose from {', '.join([*FIELDS, *groups])} (a column "
                "of a table is one if data.init_args.group_columns names it)"
            )
    lacking = {name: sum(field_value(record, name) is None for record in records) for name in case}
    parts = [f"{count} have no {name}" for name, count in lacking.items() if count]
    if not parts:
        return ""
    header = " (unless the header of the file has it)" if any(lacking.get(name) for name in _IN_HEADERS) else ""
    return f"of {len(records)} images {' and '.join(parts)}{header}: each of them is a case of its own"


def labelled(records: Sequence[Record], tasks: Collection[str], case: Sequence[str]) -> list[Record]:
    """Return the records with a label for one of the tasks, and the other images of their cases.

    Args:
        records: The records.
        tasks: Names of the tasks.
        case: Names of the fields that name a case; with none each image is taken for itself.
    """
    if not case:
        return [record for record in records if any(task in record.truth for task in tasks)]
    groups = _members(records, case)
    kept = {i for members in groups if labelled([records[i] for i in members], tasks, ()) for i in members}
    return [record for i, record in enumerate(records) if i in kept]


class CaseBatches(DistributedSampler[list[Key]]):
    """Yield batches of whole cases as lists of keys of a data set; a case is drawn as one image is by `TaskSampler`.

    Every batch has equally many cases, so that ``batch_size`` images are in a batch on average. Images of a patient of
    whom a field is not known yet (a side that only the header of the file has) stay together.

    It is a ``DistributedSampler``, so Lightning keeps it and calls ``set_epoch``.

    Args:
        records: The records of the split, in their order there.
        tasks: The tasks by name.
        case: Names of the fields that name a case.
        strategy: Order of the cases (see `TaskSampler`); ``None`` keeps them in the order of their first images.
        batch_size: Mean number of images per batch and process.
        seed: Seed of the order.
        num_replicas: Number of processes that share the cases.
        rank: Index of this process.
        negative: Names of the negative classes (see `samplers.positives`).

    Attributes:
        skip: Batches to leave out at the start of the next epoch, after a resume.
    """

    def __init__(
        self,
        records: Sequence[Record],
        tasks: dict[str, Task],
        case: Sequence[str],
        strategy: Strategy | None,
        batch_size: int,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        negative: Collection[str] = (),
    ) -> None:
        self.members = _members(records, case)
        self.each = max(1, round(batch_size * len(self.members) / max(1, len(records))))
        chosen = [_most_positive([records[i] for i in members], tasks, negative) for members in self.members]
        kind = strategy or "shuffle"
        self.order = TaskSampler(chosen, tasks, kind, self.each, seed, num_replicas, rank, negative)
        super().__init__(chosen, num_replicas, rank, seed=seed)  # type: ignore[arg-type]
        self.shuffled = strategy is not None
        self.skip = 0

    def __len__(self) -> int:
        """Return the number of batches of this process in one epoch."""
        return math.ceil(len(self.order) / self.each)

    def __iter__(self) -> Iterator[list[Key]]:
        """Yield an epoch's batches; in the first epoch after a resume, without the first ``skip``."""
        skip, self.skip = self.skip, 0
        count = len(self.order)
        drawn = list(self.order) if self.shuffled else self._in_turn(count)
        turns: dict[int, int] = {}
        for number, start in enumerate(range(0, count, self.each)):
            batch = []
            for index in (i for case in drawn[start : start + self.each] for i in self.members[case]):
                turn = turns.get(index, 0)
                turns[index] = turn + 1
                batch.append((self.epoch, turn, index))
            if number >= skip:
                yield batch

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that decides order and augmentation."""
        super().set_epoch(epoch)
        self.order.set_epoch(epoch)

    def _in_turn(self, count: int) -> list[int]:
        """Return the cases of this process in order; the first ones fill up what the last process lacks."""
        return [(self.rank * count + n) % len(self.members) for n in range(count)]


def _members(records: Sequence[Record], case: Sequence[str]) -> list[list[int]]:
    """Return the indices of the records of each case, in the order of the cases' first records."""
    unsure = {(r.site, r.patient) for r in records if any(n in _IN_HEADERS and field_value(r, n) is None for n in case)}
    found: dict[str, list[int]] = {}
    for index, record in enumerate(records):
        whole = (record.site, record.patient) in unsure
        key = case_of(record, ("patient",) if whole else case, "")
        found.setdefault(key or f"alone {record.id}", []).append(index)
    return list(found.values())


def _most_positive(records: Sequence[Record], tasks: dict[str, Task], negative: Collection[str]) -> Record:
    """Return the record with the most positive labels, which stands for its case in the order of a sampler."""
    return max(records, key=lambda record: sum(is_positive(word, negative) for word in strata(record, tasks)))
