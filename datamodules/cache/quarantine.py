"""What could not be used and why: images and truths left out of training, counted by reason and written to a table."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from mtmedformer.errors import DataError

IMAGE = "image"
"""Subject of an issue that costs the whole image, not the truth of one task."""

COLUMNS = ("id", "file", "subject", "reason", "detail")


@dataclass(frozen=True)
class Issue:
    """One thing that cannot be used.

    Attributes:
        id: Record the issue belongs to.
        file: Name of the image file, without its folders.
        subject: ``image`` (the record is skipped) or the name of the task whose truth is dropped (it becomes unknown,
            never negative; the image stays).
        reason: Short and the same for all issues of one sort, so that issues can be counted by it.
        detail: What exactly, with the values.
        transient: Whether the cause lies outside the data's content (a missing codec, an unreadable disk), so that the
            record is tried again in the next run although nothing in it has changed.
    """

    id: str
    file: str
    subject: str
    reason: str
    detail: str = ""
    transient: bool = False


@dataclass
class Quarantine:
    """Everything left out of one data set.

    Attributes:
        issues: One an image or task truth left out, in the order they were met.
        remarks: How often the data was corrected rather than left out, for example ``{"boxes clipped to the image":
            43}``.
    """

    issues: list[Issue] = field(default_factory=list)
    remarks: Counter[str] = field(default_factory=Counter)

    def add(self, issues: Iterable[Issue], remarks: Iterable[str] = ()) -> None:
        """Take up issues (each once, however often it is reported) and remarks."""
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
        """Return the ids of the records that lost something, by subject (``image`` or a task)."""
        lost: dict[str, set[str]] = {}
        for issue in self.issues:
            lost.setdefault(issue.subject, set()).add(issue.id)
        return lost

    def summary(self) -> str:
        """Return one line that says how much is left out and why, or an empty string where nothing is."""
        parts = [f"{count} × {reason}" for reason, count in self.by_reason().most_common()]
        parts += [f"{count} × {remark} (kept)" for remark, count in self.remarks.most_common()]
        if not parts:
            return ""
        lost = self.lost()
        images = len(lost.pop(IMAGE, set()))
        truths = sum(len(ids) for ids in lost.values())
        return f"Left out {images} images and {truths} truths of other images: " + "; ".join(parts)

    def check(self, totals: dict[str, int], max_share: float) -> None:
        """Refuse a data set of which too much is left out.

        Args:
            totals: How many records there are by subject: ``image`` for all, a task's name for those labelled for it.
            max_share: Largest share that may be left out, in [0, 1].

        Raises:
            DataError: A larger share of the images, or of the truth of one task, is left out.
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
                "Mend the files or the paths in the table, or raise max_quarantine_share to train without them."
            )

    def write(self, folder: Path | str) -> Path:
        """Write ``quarantine.csv`` (id, file, subject, reason, detail) into a folder and return its path.

        The file is written even where nothing is left out: a header alone says that everything was used.
        """
        path = Path(folder) / "quarantine.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows((i.id, i.file, i.subject, i.reason, i.detail) for i in self.issues)
        return path
