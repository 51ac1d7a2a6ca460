"""Which records and labels can be used, once their images have been decoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from datamodules.cache.entries import Report
from datamodules.cache.quarantine import IMAGE, Issue, Quarantine
from datamodules.records import Record
from mtmedformer.batch import Task


class UsableRecords:
    """Records of a data set, less the images and labels that decoding has found unusable so far.

    Args:
        planned: All records, before decoding.
        tasks: The tasks by name; issues of other tasks are ignored.
        quarantine: The data set's quarantine; issues and remarks are added to it.
        max_share: Largest share, 0 to 1, of the decoded images, or of those labelled for one task, that may be
            unusable.

    Attributes:
        planned: As given.
    """

    def __init__(
        self, planned: Sequence[Record], tasks: dict[str, Task], quarantine: Quarantine, max_share: float
    ) -> None:
        self.planned = list(planned)
        self._tasks, self._quarantine, self._max_share = tasks, quarantine, max_share
        self._decoded: dict[str, frozenset[str]] = {}  # tasks that are empty, by record
        self._issues = Quarantine()  # of decoding alone; the data set's quarantine has those of its tables too

    def add(self, reports: Mapping[str, Report]) -> list[Record]:
        """Take the reports of decoded images and return the usable records with their usable labels.

        Args:
            reports: What decoding reported, by record id; a record whose report was added before is skipped.

        Raises:
            DataError: A larger share than ``max_share`` is unusable.
        """
        by_id = {record.id: record for record in self.planned}
        for record, report in ((by_id[name], report) for name, report in reports.items()):
            if record.id in self._decoded:
                continue
            self._decoded[record.id] = report.empty
            issues = [replace(i, id=record.id, file=record.file.name) for i in report.issues]
            issues = [i for i in issues if i.subject in self._tasks or i.subject == IMAGE]
            self._quarantine.add(issues, report.remarks)
            self._issues.add(issues)
        totals = count_labelled([r for r in self.planned if r.id in self._decoded], self._tasks)
        self._issues.check(totals, self._max_share)
        lost = self._issues.lost()
        lost_images = lost.pop(IMAGE, set())
        return [
            replace(
                r,
                truth={t: v for t, v in r.truth.items() if r.id not in lost.get(t, ())},
                empty=self._decoded.get(r.id, r.empty),
            )
            for r in self.planned
            if r.id not in lost_images
        ]


def count_labelled(records: Sequence[Record], tasks: dict[str, Task]) -> dict[str, int]:
    """Count the records by what the quarantine may remove: all under ``image``, those with labels under their task."""
    return {task: sum(task in record.truth for record in records) for task in tasks} | {IMAGE: len(records)}


def within_limits(report: Report, limits: tuple[int | None, int | None] | None) -> Report:
    """Return the report of an image, or that it is unusable where a side is outside the limits.

    Args:
        report: What decoding reported.
        limits: Smallest and largest side in pixels of the original image; ``None`` is no limit.
    """
    if limits is None or report.measures is None:
        return report
    (height, width), (least, most) = report.measures.size, limits
    small, large = least is not None and min(height, width) < least, most is not None and max(height, width) > most
    if not (small or large):
        return report
    reason = f"image {'smaller' if small else 'larger'} than data.init_args.size_limits"
    detail = f"{width}x{height} pixels; the limits are {'none' if least is None else least} and {most or 'none'}"
    return Report((Issue("", "", IMAGE, reason, detail),))
