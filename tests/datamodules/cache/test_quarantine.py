from __future__ import annotations

import csv
from pathlib import Path

import pytest

from datamodules.cache.quarantine import IMAGE, Issue, Quarantine
from mtmedformer.errors import DataError


def full() -> Quarantine:
    quarantine = Quarantine()
    quarantine.add(
        [
            Issue("a", "a.dcm", IMAGE, "image unreadable", "a.dcm: no pixel data"),
            Issue("b", "b.dcm", IMAGE, "image constant"),
            Issue("c", "c.dcm", "lungs", "mask file missing", "m.png"),
            Issue("d", "d.dcm", "lungs", "mask file missing", "n.png"),
            Issue("d", "d.dcm", "spots", "box outside the image"),
        ],
        ["boxes clipped to their image"] * 3,
    )
    return quarantine


def test_issues_are_counted_by_subject_and_reason() -> None:
    quarantine = full()
    assert quarantine.by_reason() == {
        "image: image unreadable": 1,
        "image: image constant": 1,
        "lungs: mask file missing": 2,
        "spots: box outside the image": 1,
    }
    assert quarantine.lost() == {IMAGE: {"a", "b"}, "lungs": {"c", "d"}, "spots": {"d"}}


def test_a_repeated_issue_counts_once() -> None:
    quarantine = full()
    quarantine.add(full().issues)
    assert len(quarantine.issues) == 5


def test_the_summary_is_one_line_and_empty_without_issues() -> None:
    summary = full().summary()
    assert summary.startswith("Left out 2 images and 3 labels of other images: 2 × lungs: mask file missing; ")
    assert "3 × boxes clipped to their image (kept)" in summary
    assert "\n" not in summary
    assert Quarantine().summary() == ""


def test_corrections_without_issues_are_in_the_summary() -> None:
    quarantine = Quarantine()
    quarantine.add([], ["masks resized to their image"])
    assert quarantine.summary() == "Kept, with corrections: 1 × masks resized to their image"


def test_the_table_lists_every_issue(tmp_path: Path) -> None:
    path = full().write(tmp_path / "runs" / "first")
    assert path == tmp_path / "runs" / "first" / "quarantine.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["id", "file", "subject", "reason", "detail"]
    assert [row["id"] for row in rows] == ["a", "b", "c", "d", "d"]
    assert rows[0]["detail"] == "a.dcm: no pixel data"
    assert Quarantine().write(tmp_path).read_text().strip() == "id,file,subject,reason,detail"


@pytest.mark.parametrize("share, raises", [(0.49, True), (0.5, False)])
def test_the_limit_is_a_share_of_the_images(share: float, raises: bool) -> None:
    totals = {IMAGE: 4, "lungs": 100, "spots": 100}
    if not raises:
        full().check(totals, share)
        return
    with pytest.raises(DataError) as error:
        full().check(totals, share)
    message = str(error.value)
    assert "2 of 4 images cannot be used, more than max_quarantine_share=0.49 allows" in message
    assert "a.dcm: image unreadable (a.dcm: no pixel data)" in message
    assert "b.dcm: image constant" in message


def test_the_limit_is_a_share_of_each_tasks_labels_too() -> None:
    with pytest.raises(DataError, match="2 of 5 images labelled for task 'lungs' cannot be used"):
        full().check({IMAGE: 100, "lungs": 5, "spots": 100}, 0.2)
    full().check({IMAGE: 100, "lungs": 10, "spots": 100}, 0.2)
    with pytest.raises(DataError, match="1 of 1 images labelled for task 'spots'"):
        full().check({IMAGE: 100, "lungs": 10, "spots": 1}, 0.2)
