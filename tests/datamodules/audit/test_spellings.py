"""Ids, classes and sites that differ in spelling only."""

from __future__ import annotations

from pathlib import Path

import pytest

from datamodules.audit.spellings import class_spellings, site_spellings, spelled_alike, unite_patients
from datamodules.loading.splits import assign_splits
from datamodules.records import BoxTruth, ClassTruth, Record, Split
from mtmedformer.batch import Task
from mtmedformer.errors import DataError


@pytest.mark.parametrize(
    "names",
    [
        ("P7", "p7"), ("7", "7.0"), ("7", "007"), ("007", "7.0"), ("p 7", "p7"), (" p7", "p7"), ("P007", "p7"),
        ("a-01", "A-1"), ("Pneumonia", "PNEUMONIA"), ("no finding", "No  Finding"), ("0", "0.0"), ("12.00", "12"),
        ("Stra\u00dfe", "STRASSE"),
    ],
)  # fmt: skip
def test_one_name_in_two_spellings(names):
    assert spelled_alike(names) == [sorted(names)]


@pytest.mark.parametrize(
    "names",
    [
        ("p1", "p10"), ("p1", "p2"), ("7", "70"), ("0", "00 1"), ("1.05", "1.5"), ("1.2.840.05", "1.2.840.5"),
        ("p-1", "p1"), ("0", "1"), ("a0", "a"), ("7.5", "75"), ("10", "1"), ("p1.0x", "p1x"),
    ],
)  # fmt: skip
def test_other_names_stay_apart(names):
    assert spelled_alike(names) == []


@pytest.mark.parametrize(
    "names", [("no finding", "No_Finding"), ("COVID-19", "covid19"), ("ground glass", "ground-glass"), ("T1", "t-1")]
)
def test_words_with_other_hyphens_are_alike(names):
    assert spelled_alike(names, words=True) == [sorted(names)]


@pytest.mark.parametrize(
    "names", [("1-2", "12"), ("ER+", "ER-", "ER"), ("BI-RADS 4", "BI-RADS 40"), ("mass", "masses")]
)
def test_other_words_stay_apart(names):
    assert spelled_alike(names, words=True) == []


def record(i: int, patient: str, split: Split | None = None, file: str = "") -> Record:
    truth = {"finding": ClassTruth((1.0,))}
    return Record(f"r{i}", Path(file or f"{i}.png"), patient, truth, split=split)


TASKS = {"finding": Task("finding", "classification", ("ill",), multi_label=True)}


def test_a_patient_in_two_spellings_is_one():
    records = [record(0, "P7"), record(1, "p7"), record(2, "P7"), record(3, "P8")]
    united, found = unite_patients(records)
    (sentence,) = found.values()
    assert [r.patient for r in united] == ["P7", "P7", "P7", "P8"]
    assert "1 patient(s) with 3 images" in sentence
    assert "P7" not in sentence
    assert unite_patients(records[2:]) == (records[2:], {})


def test_no_split_separates_the_spellings_of_a_patient():
    names = [name for i in range(30) for name in (f"p{i:03d}", f"P{i}", f"{i + 100}", f"{i + 100}.0")]
    united, _ = unite_patients([record(i, name) for i, name in enumerate(names)])
    splits = assign_splits(united, TASKS)
    for i in range(0, len(names), 2):
        assert splits[f"r{i}"] == splits[f"r{i + 1}"]


def test_official_splits_that_separate_the_spellings_are_refused():
    united, _ = unite_patients([record(0, "7", "train"), record(1, "007", "test"), record(2, "8", "val")])
    with pytest.raises(DataError, match=r"1 patient has images in more than one split: 1\.png \(test\) and 0\.png"):
        assign_splits(united, TASKS)


def test_images_that_are_their_own_patients_are_left_as_they_are():
    records = [record(0, "a/1.png", file="a/1.png"), record(1, "a/01.png", file="a/01.png")]
    assert unite_patients(records) == (records, {})


def test_classes_in_two_spellings_are_counted():
    tasks = {
        "finding": Task("finding", "classification", ("Ill", "ill", "well")),
        "boxes": Task("boxes", "detection", ("0", "0.0")),
    }
    records = [
        Record(
            "a", Path("a.png"), "a", {"finding": ClassTruth((1.0, 0.0, 0.0)), "boxes": BoxTruth(((1, 1, 5, 5),), (1,))}
        ),
        Record("b", Path("b.png"), "b", {"finding": ClassTruth((0.0, 1.0, 0.0))}),
    ]
    found = class_spellings(records, tasks)
    assert "'Ill' (1 images), 'ill' (1 images)" in found["finding"]
    assert "'0' (0 images), '0.0' (1 images)" in found["boxes"]
    assert class_spellings(records, {"finding": Task("finding", "classification", ("a", "b", "c"))}) == {}


def test_sites_in_two_spellings_are_counted():
    records = [Record(str(i), Path("a.png"), str(i), site=site) for i, site in enumerate(["North", "north", "south"])]
    assert "'North' (1 images), 'north' (1 images)" in site_spellings(records)
    assert site_spellings(records[1:]) == ""
