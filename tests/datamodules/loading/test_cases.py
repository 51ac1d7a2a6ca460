"""Cases of records, and batches of whole cases."""

from pathlib import Path

import pytest

from datamodules.loading.cases import CaseBatches, case_of, check_case, labelled
from datamodules.records import ClassTruth, Record
from mtmedformer.batch import Task
from mtmedformer.errors import ConfigError

TASKS = {"finding": Task("finding", "classification", ("normal", "cancer"))}


def record(n, patient, side="L", label=None, **more):
    truth = {} if label is None else {"finding": ClassTruth((1.0 - label, float(label)))}
    return Record(id=f"im{n}", file=Path(f"im{n}.png"), patient=patient, laterality=side, truth=truth, **more)


def some(patients=11):
    """Three images per breast of the even patients, one of the odd ones; every fourth has cancer on the left."""
    records = []
    for p in range(patients):
        for side in "LR":
            for _ in range(3 if p % 2 == 0 else 1):
                records.append(record(len(records), str(p), side, int(p % 4 == 0 and side == "L")))
    return records


def test_a_case_is_a_function_of_patient_and_fields_and_unknown_without_one():
    a = record(0, "p", "L")
    assert case_of(a, ("patient", "laterality"), "s") == case_of(record(1, "p", "L"), ("patient", "laterality"), "s")
    assert case_of(a, ("laterality",), "s") != case_of(record(1, "q", "L"), ("laterality",), "s"), "two patients"
    assert case_of(a, ("patient",), "s") == case_of(record(1, "p", "R"), ("patient",), "s")
    assert case_of(record(1, "p", None), ("patient", "laterality"), "s") is None
    assert case_of(a, (), "s") is None
    assert len(case_of(a, ("patient",), "s") or "") == 16


def test_fields_are_checked_and_missing_values_counted():
    records = [record(0, "p", groups={"study": "1"}), record(1, "q", None)]
    assert check_case(("patient",), records) == ""
    assert "1 have no study and 1 have no laterality" in check_case(("study", "laterality"), records)
    with pytest.raises(ConfigError, match="images have no 'exam'; choose from patient, site, view, laterality, study"):
        check_case(("exam",), records)


def test_unlabelled_views_of_a_labelled_case_are_kept():
    records = [record(0, "p", "L", 1), record(1, "p", "L"), record(2, "p", "R"), record(3, "q", "L")]
    assert [r.id for r in labelled(records, TASKS, ())] == ["im0"]
    assert [r.id for r in labelled(records, TASKS, ("patient", "laterality"))] == ["im0", "im1"]
    assert [r.id for r in labelled(records, TASKS, ("patient",))] == ["im0", "im1", "im2"]


def batches(records, epoch=0, strategy="positive", **more):
    sampler = CaseBatches(records, TASKS, ("patient", "laterality"), strategy, 8, 3, **more)
    sampler.set_epoch(epoch)
    found = list(sampler)
    assert len(sampler) == len(found)
    return found


def test_every_epoch_has_every_image_once_in_whole_cases():
    records = some()
    for epoch in range(2):
        found = batches(records, epoch)
        assert sorted(i for batch in found for _, _, i in batch) == list(range(len(records)))
        for batch in found:
            here = {i for *_, i in batch}
            for i in here:
                case = {
                    j
                    for j, r in enumerate(records)
                    if (r.patient, r.laterality) == (records[i].patient, records[i].laterality)
                }
                assert case <= here
            assert {e for e, *_ in batch} == {epoch}
    assert batches(records, 0) == batches(records, 0) != batches(records, 1)
    mean = len(records) / len(batches(records))
    assert 5 < mean < 11, "batch_size is the mean number of images"
    with_cancer = [any(records[i].truth["finding"].values[1] for *_, i in batch) for batch in batches(records)]
    assert sum(with_cancer) == min(3, len(with_cancer))


def test_processes_share_the_cases_and_a_resume_continues_with_the_next_batch():
    records = some(12)
    parts = [batches(records, num_replicas=2, rank=rank) for rank in range(2)]
    assert len(parts[0]) == len(parts[1])
    seen = [{i for batch in part for *_, i in batch} for part in parts]
    assert seen[0] | seen[1] == set(range(len(records)))
    in_order = [batches(records, strategy=None, num_replicas=2, rank=rank) for rank in range(2)]
    assert {i for part in in_order for batch in part for *_, i in batch} == set(range(len(records)))
    sampler = CaseBatches(records, TASKS, ("patient", "laterality"), "shuffle", 8, 3)
    whole = list(sampler)
    sampler.skip = 2
    assert list(sampler) == whole[2:]
    assert list(sampler) == whole, "in the first epoch only"


def test_images_whose_side_is_in_the_header_alone_stay_with_their_patient():
    records = [record(0, "p", None), record(1, "p", "R"), record(2, "q", "L"), record(3, "q", "R")]
    sampler = CaseBatches(records, TASKS, ("patient", "laterality"), None, 1)
    assert [[i for *_, i in batch] for batch in sampler] == [[0, 1], [2], [3]]
