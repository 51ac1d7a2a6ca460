"""Metrics of numbers and grades against torchmetrics, with intervals, groups and images without a label."""

import math

import pytest
import torch
import torchmetrics.functional as tm

from mtmedformer.batch import Meta, RegressionTarget
from mtmedformer.metrics import OrdinalMetrics, RegressionMetrics
from mtmedformer.metrics.regression import median_grade

N = 60


def meta(n: int = N) -> list[Meta]:
    return [Meta(str(i), f"p{i // 2}", site="ab"[i % 2]) for i in range(n)]


@pytest.fixture
def numbers() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    truth = 1000 + 15 * torch.randn(N, generator=g)
    return truth + 3 + 8 * torch.randn(N, generator=g), truth


def filled(predicted, truth, present=None) -> RegressionMetrics:
    metric = RegressionMetrics()
    present = torch.ones(len(truth), dtype=torch.bool) if present is None else present
    metric.update(predicted[:, None], RegressionTarget(truth, present), meta(len(truth)))
    return metric


def test_values_of_numbers_are_torchmetrics(numbers):
    predicted, truth = (part.double() for part in numbers)
    values = filled(*numbers).compute()
    expected = {
        "mae": tm.mean_absolute_error(predicted, truth),
        "rmse": tm.mean_squared_error(predicted, truth, squared=False),
        "bias": (predicted - truth).mean(),
        "r2": tm.r2_score(predicted, truth),
        "pearson": tm.pearson_corrcoef(predicted, truth),
    }
    for name, value in expected.items():
        torch.testing.assert_close(values[name], value.float(), atol=1e-4, rtol=1e-4, msg=name)
    p, t = predicted, truth
    ccc = (
        2 * ((p - p.mean()) * (t - t.mean())).mean() / (p.var(correction=0) + t.var(correction=0) + (p - t).mean() ** 2)
    )
    torch.testing.assert_close(values["ccc"], ccc.float(), atol=1e-5, rtol=1e-5)


def test_images_without_a_label_do_not_count(numbers):
    predicted, truth = numbers
    present = torch.arange(N) % 3 > 0
    some = filled(predicted, truth.masked_fill(~present, torch.nan), present).compute()
    torch.testing.assert_close(some["mae"], (predicted - truth)[present].abs().mean(), atol=1e-4, rtol=1e-4)


def test_what_needs_two_different_truths_is_unknown_with_one():
    values = filled(torch.tensor([1.0, 2.0, 4.0]), torch.full((3,), 0.1)).compute()
    assert math.isnan(values["r2"])
    assert math.isnan(values["ccc"])
    assert math.isnan(values["pearson"])
    torch.testing.assert_close(values["mae"], torch.tensor((0.9 + 1.9 + 3.9) / 3))
    flat = filled(torch.full((3,), 0.1), torch.tensor([1.0, 2.0, 4.0])).compute()
    assert math.isnan(flat["pearson"])
    assert flat["r2"] < 0
    torch.testing.assert_close(flat["ccc"], torch.tensor(0.0), atol=1e-6, rtol=0)
    assert all(math.isnan(value) for value in RegressionMetrics().compute().values())


def test_a_report_has_intervals_over_patients_and_values_by_site(numbers):
    report = filled(*numbers).report(replicates=200)
    assert report["n_images"] == N
    assert report["n_patients"] == N / 2
    assert report["mae_ci_low"] < report["mae"] < report["mae_ci_high"]
    assert report["r2_ci_low"] < report["r2"] < report["r2_ci_high"]
    predicted, truth = numbers
    torch.testing.assert_close(report["mae/site=a"], float((predicted - truth)[::2].abs().mean()), atol=1e-4, rtol=1e-4)


def test_values_of_grades_are_torchmetrics():
    g = torch.Generator().manual_seed(1)
    truth = torch.randint(4, (N,), generator=g)
    p = torch.rand(N, 4, generator=g) + 2 * torch.nn.functional.one_hot(truth, 4)
    p = p / p.sum(1, keepdim=True)
    metric = OrdinalMetrics("ABCD")
    metric.update(p, RegressionTarget(truth.float(), torch.ones(N, dtype=torch.bool)), meta())
    values, predicted = metric.compute(), median_grade(p)
    assert (predicted != truth).any()
    kappa = tm.cohen_kappa(predicted, truth, "multiclass", num_classes=4, weights="quadratic")
    torch.testing.assert_close(values["kappa"], kappa, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(values["accuracy"], (predicted == truth).float().mean())
    torch.testing.assert_close(values["within_one"], ((predicted - truth).abs() <= 1).float().mean())
    torch.testing.assert_close(values["mae"], (predicted - truth).abs().float().mean())
    torch.testing.assert_close(values["sensitivity/B"], (predicted == truth)[truth == 1].float().mean())


def test_kappa_is_unknown_where_all_images_have_one_grade():
    metric = OrdinalMetrics("AB")
    metric.update(
        torch.tensor([[1.0, 0.0]] * 3), RegressionTarget(torch.zeros(3), torch.ones(3, dtype=torch.bool)), meta(3)
    )
    values = metric.compute()
    assert math.isnan(values["kappa"])
    assert math.isnan(values["sensitivity/B"])
    assert values["accuracy"] == 1


def test_the_grade_is_the_median_of_the_distribution():
    p = torch.tensor([[0.4, 0.2, 0.4], [0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])
    assert median_grade(p).tolist() == [1, 0, 2]
