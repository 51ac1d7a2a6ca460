"""Find groups of images (a site, a view, a scanner, a sex) that lack a class which the other images have."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from scipy import stats

from datamodules.records import ClassTruth, Record, Truth, ValueTruth
from mtmedformer.batch import Task

LEAST_PATIENTS = 10
"""A group counts from this number of labelled patients."""

CHANCE = 0.001
"""A class is missing if a group drawn at random from all patients would lack it with less than this probability."""


def classes_missing_in_groups(
    records: Sequence[Record], tasks: Mapping[str, Task], known: Collection[str] = ()
) -> dict[str, str]:
    """Return a sentence for each group of images without any image of a class that is not rare elsewhere.

    Groups are those of site, view and the group columns. Patients are counted, since images of one are alike.

    Args:
        records: The records in use.
        tasks: The tasks by name; those of classes and of grades are checked.
        known: Keys ``site of <task>/<class>`` of classes that are known to be at one site only.

    Returns:
        Sentences by a key of task, column and group; without ids.
    """
    found = {}
    columns = dict.fromkeys(["site", "view", *(column for record in records for column in record.groups)])
    for name, task in tasks.items():
        if task.kind != "classification" and not task.ordinal:
            continue
        labelled = [
            (record, present) for record in records if (present := _present(task, record.truth.get(name))) is not None
        ]
        for column in columns:
            if column == "client" and _is_cut(labelled):
                continue
            skipped = {c for c in task.classes if column == "site" and f"site of {name}/{c}" in known}
            for group, missing in _missing(column, labelled, [c for c in task.classes if c not in skipped]).items():
                images = sum(_value(record, column) == group for record, _ in labelled)
                shares = ", ".join(
                    f"{c!r} ({100 * share:.0f} % of the patients elsewhere)" for c, share in missing.items()
                )
                found[f"{column} {group} of {name}"] = (
                    f"{name}: none of the {images} images of {column} {group!r} shows {shares}. A model may recognise "
                    f"the {column} instead of the finding; look at the results by {column}."
                )
    return found


def _is_cut(labelled: Sequence[tuple[Record, frozenset[str]]]) -> bool:
    """Return whether ``client`` only names the sites of a federation: the image's site, or the class of the task."""
    values = [record.groups.get("client") for record, _ in labelled]
    sites, classes = [record.site for record, _ in labelled], [tuple(sorted(present)) for _, present in labelled]
    return any(
        len(set(zip(values, other, strict=True))) == len(set(values)) == len(set(other)) for other in (sites, classes)
    )


def _missing(
    column: str, labelled: Sequence[tuple[Record, frozenset[str]]], classes: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Return the classes that each group lacks, with their share of the patients of the other groups.

    A patient who is in several groups, as with two views, counts once in each.
    """
    people: dict[str, set[str]] = {}
    holders: dict[tuple[str, str], set[str]] = {}
    for record, present in labelled:
        group = _value(record, column)
        if group is not None:
            people.setdefault(group, set()).add(record.patient)
            for c in present:
                holders.setdefault((group, c), set()).add(record.patient)
    total = sum(map(len, people.values()))
    found: dict[str, dict[str, float]] = {}
    for group, members in people.items():
        for c in classes:
            others = sum(len(holders.get((other, c), ())) for other in people)
            if (group, c) in holders or len(members) < LEAST_PATIENTS:
                continue
            if stats.hypergeom.pmf(0, total, others, len(members)) < CHANCE:
                found.setdefault(group, {})[c] = others / (total - len(members))
    return found


def _present(task: Task, truth: Truth | None) -> frozenset[str] | None:
    """Return the classes that hold; ``None`` where one of them is not known."""
    if isinstance(truth, ValueTruth) and task.classes:
        return frozenset({task.classes[int(truth.value)]})
    if not isinstance(truth, ClassTruth) or any(value != value for value in truth.values):
        return None
    return frozenset(c for c, value in zip(task.classes, truth.values, strict=True) if value == 1)


def _value(record: Record, column: str) -> str | None:
    if column == "site":
        return record.site
    return record.view if column == "view" else record.groups.get(column)
