"""Scores and labels of cases, and the metrics by case."""

import numpy as np
import pytest
import torch

from mtmedformer.batch import ClassificationTarget, Meta, RegressionTarget, Task
from mtmedformer.metrics.cases import CaseMetrics, CaseRule, pooled_results
from mtmedformer.metrics.classification import ClassificationMetrics
from mtmedformer.metrics.regression import RegressionMetrics

SIGNS = Task("signs", "classification", ("cough", "fever"), multi_label=True)
BREAST = Task("breast", "classification", ("normal", "benign", "malignant"))
NAN = float("nan")


def labels(task, rows, negative=("normal", "benign")):
    rule = CaseRule("max", frozenset(negative))
    return rule.labels(task, np.array(rows, float), np.zeros(len(rows), np.int64))[0].tolist()


@pytest.mark.parametrize("pooling, expected", [("max", [0.9, 0.5]), ("mean", [0.5, 0.35]), ("noisy_or", [0.91, 0.6])])
def test_independent_classes_are_pooled_one_by_one(pooling, expected):
    scores = np.array([[0.1, 0.5], [0.9, 0.2], [0.3, 0.3]])
    pooled = CaseRule(pooling).scores(SIGNS, scores, np.array([0, 0, 1]))
    assert pooled[0].tolist() == pytest.approx(expected)
    assert pooled[1].tolist() == pytest.approx([0.3, 0.3]), "one image is its case"


def test_the_image_with_the_finding_decides_among_exclusive_classes():
    scores = np.array([[0.8, 0.1, 0.1], [0.1, 0.1, 0.8]])
    rule = CaseRule("max", frozenset({"normal", "benign"}))
    assert rule.scores(BREAST, scores, np.zeros(2, np.int64))[0] == pytest.approx(
        [0.2 * 0.45 / 0.55, 0.2 * 0.1 / 0.55, 0.8]
    )
    both = CaseRule("noisy_or", rule.negative).scores(BREAST, scores, np.zeros(2, np.int64))[0]
    assert both[2] == pytest.approx(0.82)
    assert both.sum() == pytest.approx(1)
    without = CaseRule("max").scores(BREAST, scores, np.zeros(2, np.int64))[0]
    assert without == pytest.approx(np.array([0.8, 0.1, 0.8]) / 1.7)
    same = pooled_results(BREAST, rule, [{"normal": 0.7, "benign": 0.2, "malignant": 0.1}])
    assert same == pytest.approx({"normal": 0.7, "benign": 0.2, "malignant": 0.1})


def test_numbers_and_grades_are_averaged_and_unknown_where_they_are_in_an_image():
    age, grade = Task("age", "regression", (), unit="years"), Task("grade", "regression", ("a", "b", "c"))
    scores = np.array([[30.0], [50.0], [7.0]])
    assert CaseRule("max").scores(age, scores, np.array([0, 0, 1])).tolist() == [[40.0], [7.0]]
    assert labels(age, [[40], [42]]) == [41]
    assert np.isnan(labels(age, [[40], [NAN]])).all()
    assert labels(grade, [[2], [2]]) == [2]
    assert np.isnan(labels(grade, [[2], [1]])).all()
    metric = CaseMetrics(age, CaseRule("max"), RegressionMetrics())
    target = RegressionTarget(torch.tensor([38.0, 38.0, NAN]), torch.tensor([True, True, False]))
    metric.update(torch.from_numpy(scores), target, [Meta(f"im{n}", "a", case=f"{n // 2:016x}") for n in range(3)])
    report = metric.report(replicates=0)
    assert report["mae"] == pytest.approx(2.0)
    assert (report["n_cases"], report["n_unlabelled"]) == (1, 1)


def test_a_missing_label_is_not_a_negative_one():
    assert labels(SIGNS, [[1, 0], [NAN, NAN]])[0] == 1
    assert np.isnan(labels(SIGNS, [[1, 0], [NAN, NAN]])[1]), "the other image may show it"
    assert labels(SIGNS, [[0, 0], [0, 1]]) == [0, 1]
    assert labels(BREAST, [[1, 0, 0], [0, 0, 1]]) == [0, 0, 1]
    assert labels(BREAST, [[NAN] * 3, [0, 0, 1]]) == [0, 0, 1]
    assert labels(BREAST, [[1, 0, 0], [1, 0, 0]]) == [1, 0, 0]
    assert np.isnan(labels(BREAST, [[1, 0, 0], [NAN] * 3])).all()
    assert np.isnan(labels(BREAST, [[1, 0, 0], [0, 1, 0]])).all(), "two classes without a finding contradict each other"
    assert np.isnan(labels(BREAST, [[0, 0, 1], [1, 0, 0]], negative=())).all(), "no class is known to be negative"


def filled(task, rule, cases, scores, values, patients=None):
    metric = CaseMetrics(task, rule, ClassificationMetrics(task.classes, task.multi_label))
    meta = [
        Meta(f"im{n}", str((patients or cases)[n]), case=None if case is None else f"{case:016x}")
        for n, case in enumerate(cases)
    ]
    truth = torch.tensor(values, dtype=torch.float32)
    target = ClassificationTarget(truth, ~truth.isnan().all(1))
    for i in range(0, len(meta), 2):  # several batches, which cut cases
        part = torch.arange(i, min(i + 2, len(meta)))
        metric.update(torch.tensor(scores)[part], target[part], [meta[j] for j in part.tolist()])
    return metric


def test_metrics_by_case_are_those_of_pooled_scores_and_labels():
    rng = np.random.default_rng(0)
    cases = [n // 3 for n in range(30)]
    scores, values = rng.random((30, 2)), (rng.random((30, 2)) > 0.7).astype(float)
    values[4] = NAN
    report = filled(SIGNS, CaseRule("max"), cases, scores, values).report(replicates=50)
    pooled = scores.reshape(10, 3, 2).max(1)
    truth = np.array([labels(SIGNS, rows) for rows in values.reshape(10, 3, 2)])
    direct = ClassificationMetrics(SIGNS.classes, True)
    target = ClassificationTarget(torch.from_numpy(truth).float(), torch.ones(10, dtype=torch.bool))
    direct.update(torch.from_numpy(pooled), target, [Meta(f"{n:02d}", str(n)) for n in range(10)])
    expected = direct.report(replicates=50)
    assert report["auroc"] == pytest.approx(expected["auroc"])
    assert report["n_cases"] == 10
    assert report["n_images"] == 30
    assert report["n_patients"] == 10
    assert 0 <= report["auroc_ci_low"] <= report["auroc"] <= report["auroc_ci_high"] <= 1


def test_patients_are_resampled_whole_and_images_without_a_case_are_cases_of_their_own():
    scores, values = [[0.9, 0.1], [0.2, 0.1], [0.3, 0.9], [0.4, 0.2]], [[1, 0], [0, 0], [0, 1], [0, 0]]
    metric = filled(SIGNS, CaseRule("max"), [1, 1, None, None], scores, values, patients=["a", "a", "b", "b"])
    report = metric.report(replicates=20)
    assert (report["n_cases"], report["n_patients"], report["n_images"]) == (3, 2, 4)
    metric.update(
        torch.tensor([[0.9, 0.1]]),
        ClassificationTarget(torch.tensor([[1.0, 0.0]]), torch.tensor([True])),
        [Meta("im0", "a", case=f"{1:016x}")],
    )  # a sampler served it twice
    assert metric.report(replicates=20)["n_images"] == 4
    evaluated = metric.prepare(metric.seen().rows)(np.ones((1, 4)))
    assert evaluated["auroc"][0] == pytest.approx(report["auroc"])
