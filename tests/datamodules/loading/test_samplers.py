from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from datamodules.loading.samplers import TaskSampler, positives, strata
from datamodules.records import BoxTruth, ClassTruth, MaskSource, MaskTruth, Record
from mtmedformer.batch import Task
from mtmedformer.errors import ConfigError
from tests.fixtures.real_data import real

TASKS = {
    "finding": Task("finding", "classification", ("normal", "malignant")),
    "signs": Task("signs", "classification", ("effusion", "nodule"), multi_label=True),
    "lesions": Task("lesions", "detection", ("mass",)),
    "lungs": Task("lungs", "segmentation", ("lung",)),
}
BOX = BoxTruth(((0, 0, 5, 5),), (0,))
NAN = math.nan


def record(name, **truth):
    return Record(str(name), Path(f"{name}.png"), str(name), truth)


def cohort(count, hits):
    return [record(i, lesions=BOX if i < hits else BoxTruth()) for i in range(count)]


@pytest.mark.parametrize(
    "truth, words",
    [
        ({}, ()),
        ({"finding": ClassTruth((0.0, 1.0))}, ("finding=malignant",)),
        ({"finding": ClassTruth((NAN, NAN))}, ()),
        ({"signs": ClassTruth((1.0, 1.0))}, ("signs=effusion", "signs=nodule")),
        ({"signs": ClassTruth((0.0, NAN))}, ("signs=none",)),
        ({"lesions": BOX}, ("lesions=+",)),
        ({"lesions": BoxTruth()}, ("lesions=-",)),
        ({"lesions": BoxTruth(masks=(MaskSource(),), mask_labels=(0,))}, ("lesions=-",)),
        ({"lesions": BoxTruth(masks=(MaskSource(file=Path("m")),), mask_labels=(0,))}, ("lesions=+",)),
        ({"lungs": MaskTruth((None,))}, ()),
        ({"lungs": MaskTruth((MaskSource(),))}, ("lungs=-",)),
        ({"lungs": MaskTruth((MaskSource(discs=((1, 1, 3),)),))}, ("lungs=+",)),
        ({"unheard": BOX, "lesions": BOX}, ("lesions=+",)),
    ],
)
def test_strata_name_the_labels(truth, words):
    assert strata(record(0, **truth), TASKS) == words


def test_positives_leave_out_anatomy_and_normal_classes():
    lungs = MaskTruth((MaskSource(file=Path("m")),))
    records = [
        record(0, lungs=lungs, finding=ClassTruth((1.0, 0.0))),
        record(1, lungs=lungs, finding=ClassTruth((0.0, 1.0))),
        record(2, lungs=lungs, lesions=BOX),
        record(3, lungs=lungs, lesions=BoxTruth()),
        record(4, lungs=lungs),
    ]
    assert positives(records, TASKS).tolist() == [False, True, True, False, False]


@given(
    st.integers(1, 60),
    st.floats(0, 0.5),
    st.integers(1, 9),
    st.integers(1, 3),
    st.sampled_from(["shuffle", "positive"]),
    st.integers(0, 5),
)
@settings(max_examples=100, deadline=None)
def test_every_record_once_an_epoch_and_positives_spread(count, share, batch, replicas, strategy, epoch):
    records = cohort(count, int(share * count))
    ranks = []
    for rank in range(replicas):
        sampler = TaskSampler(records, TASKS, strategy, batch, seed=3, num_replicas=replicas, rank=rank)
        sampler.set_epoch(epoch)
        ranks.append(list(sampler))
        assert len(sampler) == len(ranks[-1])
        assert list(sampler) == ranks[-1]
    everything = Counter(i for r in ranks for i in r)
    assert set(everything) == set(range(count))
    assert len({len(r) for r in ranks}) == 1
    assert sum(everything.values()) - count < replicas
    if strategy == "positive":
        hit = {i for i in range(count) if i < int(share * count)}
        batches = [r[i : i + batch] for r in ranks for i in range(0, len(r), batch)]
        occurrences = sum(everything[i] for i in hit)
        assert sum(bool(hit & set(b)) for b in batches) == min(len(batches), occurrences)


def test_every_batch_of_a_loader_has_a_positive():
    records = cohort(64, 9)
    loader = DataLoader(range(64), batch_size=8, sampler=TaskSampler(records, TASKS, "positive", 8, seed=0))
    for epoch in range(20):
        loader.sampler.set_epoch(epoch)
        assert all((batch < 9).any() for batch in loader)


def test_positives_are_not_always_at_the_same_place():
    records = cohort(64, 8)
    sampler = TaskSampler(records, TASKS, "positive", 8, seed=0)
    places = Counter()
    for epoch in range(50):
        sampler.set_epoch(epoch)
        places.update(i % 8 for i, index in enumerate(sampler) if index < 8)
    assert min(places[k] for k in range(8)) > 20  # 50 expected


def test_the_order_depends_on_epoch_and_seed():
    records = cohort(30, 5)
    for strategy in ("shuffle", "positive", "sqrt"):
        one, two = (TaskSampler(records, TASKS, strategy, 4, seed=1) for _ in range(2))
        assert list(one) == list(two)
        one.set_epoch(1)
        assert list(one) != list(two)
        assert list(TaskSampler(records, TASKS, strategy, 4, seed=2)) != list(two)


def test_sqrt_draws_in_proportion_to_the_root_of_the_count():
    records = cohort(500, 5)
    sampler = TaskSampler(records, TASKS, "sqrt", 4, seed=0)
    drawn = []
    for epoch in range(40):
        sampler.set_epoch(epoch)
        epoch_drawn = list(sampler)
        assert len(epoch_drawn) == 500
        drawn += epoch_drawn
    share = np.mean(np.array(drawn) < 5)
    root = math.sqrt(5) / (math.sqrt(5) + math.sqrt(495))
    assert share == pytest.approx(root, abs=0.01)  # 0.091; plain shuffling: 0.01


def test_without_positives_records_are_shuffled_and_it_is_logged(caplog):
    sampler = TaskSampler(cohort(10, 0), TASKS, "positive", 4, seed=0)
    assert "no image is positive" in caplog.text
    assert sorted(sampler) == list(range(10))


def test_empty_data_and_invalid_arguments():
    assert list(TaskSampler([], TASKS, "sqrt", 4, seed=0)) == []
    with pytest.raises(ConfigError, match="choose shuffle, positive or sqrt"):
        TaskSampler([], TASKS, "best", 4, seed=0)
    with pytest.raises(ConfigError, match="batch_size is 0"):
        TaskSampler([], TASKS, "shuffle", 0, seed=0)


def test_real_table_has_an_infection_in_every_batch():
    table = pd.read_csv(real("covid_cxr") / "labels.csv")
    records = [
        record(
            row.image,
            **({"lesions": BOX if json.loads(row.boxes) else BoxTruth()} if row.has_det else {}),
            **({"lungs": MaskTruth((MaskSource(file=Path("m")),))} if row.has_lungs else {}),
        )
        for row in table.itertuples()
    ]
    hit = positives(records, TASKS)
    assert 0 < hit.sum() < len(table) / 2
    order = list(TaskSampler(records, TASKS, "positive", 8, seed=0))
    assert all(hit[order[i : i + 8]].any() for i in range(0, len(order), 8))
