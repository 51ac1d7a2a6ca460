"""The quarantine: images and labels that cannot be used, counted by reason and written to ``quarantine.csv``."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from mtmedformer.errors import DataError
from mtmedformer.storage.safe_text import cell, printable

IMAGE = "image"
"""Subject of an issue that makes the whole image unusable, not only the label of one task."""

COLUMNS = ("id", "file", "subject", "reason", "detail")


@dataclass(frozen=True)
class Issue:
    """One image, or one task's label of an image, that cannot be used.

    Attributes:
        id: Record the issue belongs to.
        file: Name of the image file, without its folders.
        subject: ``image`` (the record is skipped) or the name of the task whose label is dropped (the label becomes
            unknown, never negative; the image stays).
        reason: Short, and the same for all issues of one kind, so that they can be counted.
        detail: The values concerned.
        transient: Whether the cause is outside the file's content (a missing codec, an unreadable disk). The next run
            decodes the record again.
    """

    id: str
    file: str
    subject: str
    reason: str
    detail: str = ""
    transient: bool = False


def _texts(issue: Issue) -> tuple[str, ...]:
    return issue.id, issue.file, issue.subject, issue.reason, issue.detail


@dataclass
class Quarantine:
    """Everything that is left out of one data set.

    Attributes:
        issues: One per image or label left out, in the order of decoding.
        remarks: Number of corrections by kind, for example ``{"boxes clipped to their image": 43}``.
    """

    issues: list[Issue] = field(default_factory=list)
    remarks: Counter[str] = field(default_factory=Counter)

    def add(self, issues: Iterable[Issue], remarks: Iterable[str] = ()) -> None:
        """Add issues, repeated ones once, and remarks."""
        known = set(self.issues)
        for issue in issues:
            if issue not in known:
                known.add(issue)
                self.issues.append(issue)
        self.remarks.update(remarks)

    def by_reason(self) -> Counter[str]:
        """Count the issues by subject and reason, for example ``{"lesions: box outside the image": 2}``."""
        return Counter(f"{issue.subject}: {issue.reason}" for issue in self.issues)

    def lost(self) -> dict[str, set[str]]:
        """Return the ids of the records with issues, by subject (``image`` or a task)."""
        lost: dict[str, set[str]] = {}
        for issue in self.issues:
            lost.setdefault(issue.subject, set()).add(issue.id)
        return lost

    def summary(self) -> str:
        """Return one line with the number of images and labels left out and the reasons; empty if there are none."""
        parts = [f"{count} × {reason}" for reason, count in self.by_reason().most_common()]
        kept = [f"{count} × {remark}" for remark, count in self.remarks.most_common()]
        if not parts:
            return f"Kept, with corrections: {'; '.join(kept)}" if kept else ""
        parts += [f"{remark} (kept)" for remark in kept]
        lost = self.lost()
        images = len(lost.pop(IMAGE, set()))
        truths = sum(len(ids) for ids in lost.values())
        return f"Left out {images} images and {truths} labels of other images: " + "; ".join(parts)

    def check(self, totals: dict[str, int], max_share: float) -> None:
        """Raise if too much of a data set is left out.

        Args:
            totals: Number of records by subject: all under ``image``, those labelled for a task under its name.
            max_share: Largest share that may be left out, in [0, 1].

        Raises:
            DataError: A larger share of the images, or of the labels of one task, is left out.
        """
        for subject, ids in self.lost().items():
            total = totals.get(subject, 0)
            if not total or len(ids) <= max_share * total:
                continue
            what = "images" if subject == IMAGE else f"images labelled for task {subject!r}"
            first = [i for i in self.issues if i.subject == subject][:5]
            reasons = "\n".join(f"  {i.file}: {i.reason}" + (f" ({i.detail})" if i.detail else "") for i in first)
            raise DataError(
                f"{len(ids)} of {total} {what} cannot be used, more than max_quarantine_share={max_share:g} allows. "
                f"The first ones:\n{reasons}\n"
                "Correct the files or the table, or raise max_quarantine_share to train without them."
            )

    def write(self, folder: Path | str) -> Path:
        """Write ``quarantine.csv`` (id, file, subject, reason, detail) into a folder and return its path.

        If nothing is left out, the file has a header only.
        """
        path = Path(folder) / "quarantine.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows([cell(printable(text)) for text in _texts(issue)] for issue in self.issues)
        return path
