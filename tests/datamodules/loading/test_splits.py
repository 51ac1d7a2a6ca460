from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.loading.samplers import strata
from datamodules.loading.splits import assign_splits
from datamodules.records import BoxTruth, ClassTruth, MaskSource, MaskTruth, Record
from mtmedformer.batch import Task
from mtmedformer.errors import ConfigError, DataError

TASKS = {
    "finding": Task("finding", "classification", ("normal", "malignant")),
    "lesions": Task("lesions", "detection", ("mass",)),
    "lungs": Task("lungs", "segmentation", ("lung",)),
}


def record(patient, image=0, positive=None, boxes=None, lungs=False, site="a", split=None):
    truth = {}
    if positive is not None:
        truth["finding"] = ClassTruth((float(not positive), float(positive)))
    if boxes is not None:
        truth["lesions"] = BoxTruth(((0, 0, 5, 5),), (0,)) if boxes else BoxTruth()
    if lungs:
        truth["lungs"] = MaskTruth((MaskSource(file=Path("m.png")),))
    name = f"{patient}_{image}"
    return Record(name, Path(f"/secret/folder/{name}.png"), f"id-{patient}", truth, site, split=split)


def cohort(patients, seed=0):
    """Patients with 1 to 4 images, 10 % positive, three sites of which one is small, tasks unevenly labelled."""
    rng, records = np.random.default_rng(seed), []
    for p in range(patients):
        site, positive = "abc"[rng.choice(3, p=[0.7, 0.2, 0.1])], bool(rng.random() < 0.1)
        records += [
            record(p, k, positive if site != "b" else None, positive if site != "c" else None, rng.random() < 0.8, site)
            for k in range(rng.integers(1, 5))
        ]
    return records


def assert_disjoint(records, splits):
    """Assert that every record has a split and no patient is in two."""
    assert {r.id for r in records} <= splits.keys()
    assert len({(r.patient, splits[r.id]) for r in records}) == len({r.patient for r in records})


some_records = st.lists(
    st.tuples(st.integers(0, 12), st.sampled_from([None, True, False]), st.booleans(), st.sampled_from("ab")),
    min_size=3,
    max_size=40,
).map(lambda rows: [record(p, i, positive, None, lungs, site) for i, (p, positive, lungs, site) in enumerate(rows)])


@given(some_records, st.integers(0, 99), st.sampled_from([None, 0, 2]), st.sampled_from([0.0, 0.2]))
@settings(max_examples=150, deadline=None)
def test_patients_never_cross_and_nothing_is_lost(records, seed, fold, test_fraction):
    patients = len({r.patient for r in records})
    needed = (3 if fold is not None else 2) + (test_fraction > 0)
    if patients < needed:
        with pytest.raises(DataError, match=f"{patients} patient.* too few to split: {needed} are needed"):
            assign_splits(records, TASKS, test_fraction=test_fraction, seed=seed, fold=fold, folds=3)
        return
    splits = assign_splits(records, TASKS, test_fraction=test_fraction, seed=seed, fold=fold, folds=3)
    assert set(splits) == {r.id for r in records}
    assert_disjoint(records, splits)
    by_patient = {(r.patient, splits[r.id]) for r in records}
    assert len(by_patient) == patients
    wanted = {"train", "val"} | ({"test"} if test_fraction else set())
    assert set(splits.values()) == wanted
    shuffled = random.Random(seed).sample(records, len(records))
    assert assign_splits(shuffled, TASKS, test_fraction=test_fraction, seed=seed, fold=fold, folds=3) == splits


def test_labels_and_sites_keep_their_shares():
    records = cohort(400)
    splits = assign_splits(records, TASKS, val_fraction=0.15, test_fraction=0.2)
    counts = Counter()
    for r in records:
        counts.update((word, splits[r.id]) for word in (*strata(r, TASKS), f"@{r.site}", "all"))
    for word in {w for w, _ in counts}:
        total = sum(counts[word, s] for s in ("train", "val", "test"))
        for split, share in (("train", 0.65), ("val", 0.15), ("test", 0.2)):
            assert abs(counts[word, split] - share * total) <= max(4, 0.02 * total), (word, split)


def test_better_balanced_than_random_patients():
    records = cohort(120, seed=3)

    def unevenness(splits):
        total, val = Counter(), Counter()
        for r in records:
            for word in strata(r, TASKS):
                total[word] += 1
                val[word] += splits[r.id] == "val"
        return max(abs(val[w] / total[w] - 0.25) for w in total)

    ours = unevenness(assign_splits(records, TASKS, val_fraction=0.25, test_fraction=0))
    rng = np.random.default_rng(0)
    theirs = []
    for _ in range(20):
        chosen = {p for p in sorted({r.patient for r in records}) if rng.random() < 0.25}
        theirs.append(unevenness({r.id: "val" if r.patient in chosen else "train" for r in records}))
    assert ours < 0.05
    assert ours < np.mean(theirs) / 2


def test_the_seed_matters_and_decides():
    records = cohort(60)
    assert assign_splits(records, TASKS, seed=1) == assign_splits(records, TASKS, seed=1)
    assert assign_splits(records, TASKS, seed=1) != assign_splits(records, TASKS, seed=2)


def test_a_patient_with_many_images_stays_in_one_split():
    records = [record("big", i, positive=True) for i in range(65)] + cohort(100)
    splits = assign_splits(records, TASKS)
    assert len({splits[r.id] for r in records if r.patient == "id-big"}) == 1


# official splits


def test_official_splits_are_kept_and_val_is_taken_from_training():
    records = [replace(r, split="test" if int(r.patient[3:]) % 4 == 0 else "train") for r in cohort(100)]
    splits = assign_splits(records, TASKS, val_fraction=0.2)
    assert all((splits[r.id] == "test") == (r.split == "test") for r in records)
    share = Counter(splits.values())
    assert share["val"] / (share["val"] + share["train"]) == pytest.approx(0.2, abs=0.02)
    assert_disjoint(records, splits)


def test_complete_official_splits_are_kept_as_they_are():
    names = ("train", "val", "test")
    records = [replace(r, split=names[int(r.patient[3:]) % 3]) for r in cohort(30)]
    assert assign_splits(records, TASKS) == {r.id: r.split for r in records}
    assert assign_splits(records, TASKS, official=False) != {r.id: r.split for r in records}


def test_an_image_without_split_follows_its_patient_and_such_a_patient_trains():
    records = [record("x", 0, split="test"), record("x", 1), record("y", 0, split="val"), record("z", 0)]
    splits = assign_splits(records, TASKS)
    assert splits == {"x_0": "test", "x_1": "test", "y_0": "val", "z_0": "train"}


def test_a_patient_in_two_official_splits_is_an_error_that_names_files_and_no_patient():
    records = [record("anna", 0, split="train"), record("anna", 1, split="test"), record("b", 0, split="val")]
    with pytest.raises(DataError) as caught:
        assign_splits(records, TASKS)
    message = str(caught.value)
    assert "1 patient has" in message
    assert "anna_0.png (train)" in message
    assert "anna_1.png (test)" in message
    assert "official to false" in message
    assert "id-anna" not in message
    assert "secret" not in message
    splits = assign_splits([*records, *cohort(5)], TASKS, official=False)
    assert splits["anna_0"] == splits["anna_1"]


# folds and edges


def test_folds_cover_every_patient_once_and_leave_test_alone():
    records = cohort(60)
    runs = [assign_splits(records, TASKS, fold=k, folds=4) for k in range(4)]
    tests = [{i for i, s in run.items() if s == "test"} for run in runs]
    assert all(t == tests[0] and t for t in tests)
    vals = [i for run in runs for i, s in run.items() if s == "val"]
    assert len(vals) == len(set(vals))
    assert set(vals) | tests[0] == {r.id for r in records}
    sizes = [sum(s == "val" for s in run.values()) for run in runs]
    assert max(sizes) - min(sizes) <= 5


def test_fold_uses_official_val_for_training_too():
    records = [replace(r, split=("train", "val", "test")[int(r.patient[3:]) % 3]) for r in cohort(60)]
    runs = [assign_splits(records, TASKS, fold=k, folds=3) for k in range(3)]
    for run in runs:
        assert all((run[r.id] == "test") == (r.split == "test") for r in records)
    assert {i for run in runs for i, s in run.items() if s == "val"} == {r.id for r in records if r.split != "test"}


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_patients_are_an_error_with_their_number(count):
    with pytest.raises(DataError, match=rf"{count} patient.* too few to split: 3 are needed"):
        assign_splits([record(p, k, True) for p in range(count) for k in range(3)], TASKS)


def test_three_patients_are_enough():
    assert set(assign_splits([record(p) for p in range(3)], TASKS).values()) == {"train", "val", "test"}


def test_a_missing_test_split_is_logged(caplog):
    splits = assign_splits(cohort(20), TASKS, test_fraction=0)
    assert set(splits.values()) == {"train", "val"}
    assert "val is used as test" in caplog.text


def test_no_val_is_allowed():
    assert set(assign_splits(cohort(20), TASKS, val_fraction=0).values()) == {"train", "test"}


@pytest.mark.parametrize(
    "kwargs", [{"val_fraction": 0.9}, {"test_fraction": -0.1}, {"fold": 5}, {"fold": 0, "folds": 1}]
)
def test_invalid_settings(kwargs):
    with pytest.raises(ConfigError):
        assign_splits(cohort(20), TASKS, **kwargs)


def test_missing_patient_and_repeated_id_are_errors():
    records = cohort(10)
    with pytest.raises(DataError, match="no patient key"):
        assign_splits([*records, replace(records[0], id="new", patient=" ")], TASKS)
    with pytest.raises(DataError, match="not unique"):
        assign_splits([*records, records[0]], TASKS)
