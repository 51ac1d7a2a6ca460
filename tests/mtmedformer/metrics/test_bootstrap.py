"""Patient-level intervals, subgroups, and states that survive copying, pickling and distribution."""

from __future__ import annotations

import copy
import math
import pickle
import socket
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from mtmedformer.batch import ClassificationTarget, DetectionTarget, Meta, SegmentationTarget
from mtmedformer.metrics import ClassificationMetrics, DetectionMetrics, SegmentationMetrics, TaskMetrics
from mtmedformer.metrics.base import interval, patient_weights

N = 24


def metas(n: int) -> list[Meta]:
    return [
        Meta(id=f"i{i}", patient=f"p{i // 2}", site=("north", "süd")[i % 3 == 0], view=("PA", None)[i % 2])
        for i in range(n)
    ]


def filled(kind: str, rows: list[int]) -> TaskMetrics:
    """Return a metric that has seen the given images of a fixed data set, in batches of five."""
    g = torch.Generator().manual_seed(3)
    present = torch.rand(N, generator=g) > 0.1
    labels = (torch.rand(N, 2, generator=g) > 0.5).float()
    probabilities = torch.rand(N, 2, generator=g) * 0.7 + 0.3 * labels
    masks = (torch.rand(N, 2, 8, 8, generator=g) > 0.5).byte()
    maps = torch.rand(N, 2, 8, 8, generator=g)
    corner = torch.rand(N, 3, 2, generator=g) * 40
    boxes = torch.cat([corner, corner + 5 + 10 * torch.rand(N, 3, 2, generator=g)], dim=2)
    scores, kinds = torch.rand(N, 3, generator=g), torch.randint(2, (N, 3), generator=g)
    metric: TaskMetrics
    if kind == "classification":
        metric = ClassificationMetrics(["a", "b"], multi_label=True)
    elif kind == "segmentation":
        metric = SegmentationMetrics(["a", "b"], multi_label=True, hausdorff=False)
    else:
        metric = DetectionMetrics(["a", "b"])
    for start in range(0, len(rows), 5):
        part = rows[start : start + 5]
        index, meta = torch.tensor(part), [metas(N)[i] for i in part]
        if kind == "classification":
            metric.update(probabilities[index], ClassificationTarget(labels[index], present[index]), meta)
        elif kind == "segmentation":
            metric.update(maps[index], SegmentationTarget(masks[index], present[index]), meta)
        else:
            found = [{"boxes": boxes[i] + 1, "scores": scores[i], "labels": kinds[i]} for i in part]
            target = DetectionTarget(
                [boxes[i][: i % 4] for i in part], [kinds[i][: i % 4] for i in part], present[index]
            )
            metric.update(found, target, meta)
    return metric


KINDS = pytest.mark.parametrize("kind", ["classification", "segmentation", "detection"])


def values(metric: TaskMetrics) -> dict[str, float]:
    return {name: value.item() for name, value in metric.compute().items()}


@KINDS
def test_the_headline_metric_is_one_of_the_metrics(kind):
    metric = filled(kind, list(range(N)))
    assert 0 < values(metric)[metric.primary] <= 1


@KINDS
def test_report_is_the_same_for_the_same_seed_and_any_arrival_order(kind):
    report = filled(kind, list(range(N))).report(replicates=50, seed=1)
    assert filled(kind, list(reversed(range(N)))).report(replicates=50, seed=1) == pytest.approx(
        report, abs=1e-12, nan_ok=True
    )
    other = filled(kind, list(range(N))).report(replicates=50, seed=2)
    assert any(other[k] != v for k, v in report.items() if k.endswith("_ci_low") and not math.isnan(v))


@KINDS
def test_report_holds_every_metric_inside_its_interval(kind):
    metric = filled(kind, list(range(N)))
    report = metric.report(replicates=200)
    assert report["n_images"] == len(metric.seen()) < N
    assert report["n_patients"] == 12
    for name, value in values(metric).items():
        assert report[name] == pytest.approx(value, abs=1e-6, nan_ok=True)
    name = metric.primary
    assert report[f"{name}_ci_low"] < report[name] < report[f"{name}_ci_high"]


@KINDS
def test_values_per_site_and_view_are_those_of_the_site_alone(kind):
    metric = filled(kind, list(range(N)))
    report = metric.report(replicates=2)
    for group, rows in {
        "site=süd": [i for i in range(N) if metas(N)[i].site == "süd"],
        "view=PA": [i for i in range(N) if metas(N)[i].view == "PA"],
    }.items():
        alone = filled(kind, rows)
        assert report[f"n_images/{group}"] == len(alone.seen())
        got = {n: report[f"{n}/{group}"] for n, v in values(alone).items() if not math.isnan(v)}
        assert got
        assert got == pytest.approx({n: values(alone)[n] for n in got}, abs=1e-6)
    assert not any("view=None" in key for key in report)


@KINDS
def test_shards_with_padding_merge_to_the_whole(kind):
    whole = values(filled(kind, list(range(N))))
    shard = filled(kind, [*range(1, N, 2), 1])  # the sampler served image 1 twice
    shard.merge_state(filled(kind, [*range(0, N, 2), 1]))
    assert values(shard) == pytest.approx(whole, abs=1e-6, nan_ok=True)


@KINDS
def test_copies_pickles_and_resets(kind):
    metric = filled(kind, list(range(N)))
    expected = metric.report(replicates=5)
    for copied in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        assert copied.report(replicates=5) == pytest.approx(expected, nan_ok=True)
        copied.reset()
        assert len(copied.seen()) == 0
    assert metric.report(replicates=5) == pytest.approx(expected, nan_ok=True)
    assert not metric.state_dict()


def test_states_contain_no_identities_of_images():
    state = filled("classification", list(range(N))).table("images").numpy().tobytes().decode()
    assert '"p3"' in state
    assert '"i3"' not in state


def test_a_batch_without_its_meta_is_refused():
    target = ClassificationTarget(torch.zeros(2, 1), torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="one Meta per image: got 1 for 2"):
        ClassificationMetrics(["a"]).update(torch.zeros(2, 1), target, metas(1))


def test_images_of_a_patient_are_resampled_together():
    patients = np.array([0, 1, 1, 2, 2, 2])
    weights = patient_weights(patients, 400, seed=0)
    assert (weights[:, 1] == weights[:, 2]).all()
    assert (weights[:, 3] == weights[:, 5]).all()
    assert (weights[:, 0] + weights[:, 1] + weights[:, 3] == 3).all()
    assert weights.mean(axis=0) == pytest.approx(np.ones(6), abs=0.15)


def test_one_patient_has_no_interval():
    metric = ClassificationMetrics(["a"])
    metas_ = [Meta(id=f"i{i}", patient="p") for i in range(6)]
    target = ClassificationTarget(torch.tensor([[0.0], [1.0]] * 3), torch.ones(6, dtype=torch.bool))
    metric.update(torch.rand(6, 1), target, metas_)
    report = metric.report(replicates=20)
    assert math.isnan(report["auroc_ci_low"])
    assert not math.isnan(report["auroc"])


def test_resamples_without_ground_truth_are_left_out():
    assert interval(np.array([np.nan, 1.0, 2.0, 3.0, np.nan]), 1.0) == (1.0, 3.0)
    assert all(math.isnan(v) for v in interval(np.full(3, np.nan), 0.95))


def test_auroc_interval_is_that_of_a_plain_bootstrap():
    """Resample patients one by one and call scikit-learn; only the random streams differ."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 120)
    scores = labels + 1.5 * rng.standard_normal(120)
    probabilities = torch.tensor(1 / (1 + np.exp(-scores)), dtype=torch.float32)[:, None]
    metric = ClassificationMetrics(["a"])
    meta = [Meta(id=f"i{i}", patient=f"p{i // 3}") for i in range(120)]
    metric.update(
        probabilities, ClassificationTarget(torch.tensor(labels)[:, None].float(), torch.ones(120).bool()), meta
    )
    report = metric.report(replicates=2000)
    plain = []
    for _ in range(400):
        rows = np.concatenate([np.arange(3 * p, 3 * p + 3) for p in rng.integers(0, 40, 40)])
        plain.append(roc_auc_score(labels[rows], probabilities.numpy()[rows, 0]))
    assert [report["auroc_ci_low"], report["auroc_ci_high"]] == pytest.approx(
        np.quantile(plain, [0.025, 0.975]).tolist(), abs=0.02
    )


def test_intervals_cover_the_truth_and_need_whole_patients():
    """Four equal images a patient: the truth lies in about 90 % of the intervals, far less if images are resampled."""
    rng = np.random.default_rng(1)
    covered = {"patients": 0, "images": 0}
    for seed in range(200):
        correct = np.repeat(rng.random(40) < 0.7, 4).astype(float)
        for unit, units in {"patients": np.repeat(np.arange(40), 4), "images": np.arange(160)}.items():
            weights = patient_weights(units, 200, seed)
            low, high = interval(weights @ correct / weights.sum(axis=1), 0.9)
            covered[unit] += low <= 0.7 <= high
    assert 0.82 < covered["patients"] / 200 < 0.96
    assert covered["images"] / 200 < 0.65


@pytest.mark.slow
def test_a_thousand_resamples_of_five_hundred_images_take_seconds():
    g = torch.Generator().manual_seed(0)
    metric = DetectionMetrics(["mass"])
    found, true = [], []
    for i in range(500):
        corner = 400 * torch.rand(100, 2, generator=g)
        b = torch.cat([corner, corner + 20 + 100 * torch.rand(100, 2, generator=g)], dim=1)
        found.append(
            {"boxes": b + 3, "scores": torch.rand(100, generator=g), "labels": torch.zeros(100, dtype=torch.int64)}
        )
        true.append(b[: i % 4])
    target = DetectionTarget(true, [torch.zeros(len(b), dtype=torch.int64) for b in true], torch.ones(500).bool())
    metric.update(found, target, [Meta(id=f"i{i}", patient=f"p{i // 2}") for i in range(500)])
    report = metric.report(replicates=1000)  # 4 s on one idle core
    assert 0 <= report["map50_ci_low"] <= report["map50"] <= report["map50_ci_high"] <= 1


WORKER = """
import pickle, runpy, sys
import torch.distributed as dist

rank, port, file, out = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
tests = runpy.run_path(file)
result = {}
for kind in ("classification", "segmentation", "detection"):
    for name, rows in {"split": [*range(rank, tests["N"], 2), 0], "lonely": [*range(tests["N"])] * (1 - rank)}.items():
        metric = tests["filled"](kind, rows)
        values = {k: v.item() for k, v in metric.compute().items()}
        result[kind, name] = values, metric.report(replicates=20), len(metric.seen())
pickle.dump(result, open(f"{out}/{rank}.pkl", "wb"))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """Also when one process saw nothing; afterwards each goes on with its own rows."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(WORKER))
    processes = [
        subprocess.Popen([sys.executable, str(script), str(rank), port, __file__, str(tmp_path)]) for rank in range(2)
    ]
    assert [p.wait(timeout=200) for p in processes] == [0, 0]
    results = [pickle.loads((tmp_path / f"{rank}.pkl").read_bytes()) for rank in range(2)]
    for kind in ("classification", "segmentation", "detection"):
        whole = filled(kind, list(range(N)))
        expected, report = values(whole), whole.report(replicates=20)
        for result in results:
            for name in ("split", "lonely"):
                assert result[kind, name][0] == pytest.approx(expected, abs=1e-6, nan_ok=True)
                assert result[kind, name][1] == pytest.approx(report, abs=1e-6, nan_ok=True)
        assert results[1][kind, "lonely"][2] == 0
