"""Results by group: members, intervals, counts, and means over classes that are not defined."""

import math

import pytest
import torch

from mtmedformer.batch import ClassificationTarget, Meta, RegressionTarget
from mtmedformer.metrics import ClassificationMetrics, RegressionMetrics
from mtmedformer.metrics.subgroups import members_by_group

N = 48


def meta(i: int) -> Meta:
    groups = {"sex": "FM"[i % 2], "scanner": "abc"[i % 3]} | (
        {} if i % 4 == 3 else {"age": ("under 40", "40-59")[i % 2]}
    )
    return Meta(str(i), f"p{i // 2}", site=("north", "south")[i >= N // 2], view="PA", groups=groups)


def filled(scores, labels, exclusive=True) -> ClassificationMetrics:
    metric = ClassificationMetrics(["well", "sick"], multi_label=not exclusive)
    metric.update(
        scores,
        ClassificationTarget(labels, torch.ones(len(labels), dtype=torch.bool)),
        [meta(i) for i in range(len(labels))],
    )
    return metric


@pytest.fixture
def ranked() -> ClassificationMetrics:
    """The south has no sick image."""
    g = torch.Generator().manual_seed(0)
    sick = (torch.arange(N) % 5 < 2) & (torch.arange(N) < N // 2)
    p = (0.3 + 0.3 * sick.float() + 0.3 * torch.rand(N, generator=g)).clamp(0, 1)
    return filled(torch.stack([1 - p, p], 1), torch.stack([~sick, sick], 1).float())


def test_values_of_a_group_are_those_of_its_images_alone(ranked):
    report = ranked.report(replicates=100)
    images = [i for i in range(N) if "abc"[i % 3] == "b"]
    rows = ranked.seen()
    alone = ranked.overall(rows.rows[[g["scanner"] == "b" for g in rows.groups]])
    for name in ("auroc", "balanced_accuracy", "accuracy", "auroc/sick"):
        assert report[f"{name}/scanner=b"] == pytest.approx(alone[name])
    assert report["n_images/scanner=b"] == len(images)
    assert report["n_patients/scanner=b"] == len({i // 2 for i in images})
    assert report["auroc_ci_low/scanner=b"] <= report["auroc/scanner=b"] <= report["auroc_ci_high/scanner=b"]
    assert report["n_positive/sick/scanner=b"] + report["n_positive/well/scanner=b"] == len(images)
    assert report["n_images/age=under 40"] + report["n_images/age=40-59"] == N - N // 4  # the others have no age


def test_means_over_classes_are_not_defined_where_all_images_are_of_one_class(ranked):
    report = ranked.report(replicates=50)
    assert report["n_positive/sick/site=south"] == 0
    for name in ("balanced_accuracy", "sensitivity", "specificity", "f1", "auroc", "ap"):
        assert f"{name}/site=south" not in report
        assert f"{name}_ci_low/site=south" not in report
        assert f"{name}/site=north" in report
    assert 0 <= report["accuracy/site=south"] <= 1
    alone = filled(torch.tensor([[0.9, 0.1]] * 3), torch.tensor([[1.0, 0.0]] * 3)).compute()
    assert math.isnan(alone["balanced_accuracy"])
    assert alone["sensitivity/well"] == 1
    assert alone["accuracy"] == 1


def test_classes_that_may_hold_together_keep_their_own_values():
    labels = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    values = filled(torch.tensor([[0.9, 0.1], [0.2, 0.3], [0.8, 0.2]]), labels, exclusive=False).compute()
    assert values["balanced_accuracy"] == 1
    assert math.isnan(values["balanced_accuracy/sick"])


def test_numbers_are_reported_by_group_too():
    metric = RegressionMetrics()
    truth = torch.arange(N).float()
    metric.update(
        truth[:, None] + 2, RegressionTarget(truth, torch.ones(N, dtype=torch.bool)), [meta(i) for i in range(N)]
    )
    report = metric.report(replicates=20)
    assert report["mae/sex=F"] == pytest.approx(2)
    assert not any(key.startswith("n_positive") for key in report)


def test_columns_without_groups_of_their_own_are_left_out():
    sites, views = ["a", "a", "b"] * 20, ["PA"] * 60
    groups = [
        {"client": site, "same": "x", "id": str(i), "age": str(i % 2), "view": "odd"} for i, site in enumerate(sites)
    ]
    found = members_by_group(sites, views, groups)
    assert set(found) == {"site=a", "site=b", "view=PA", "age=0", "age=1"}
    assert found["age=1"].sum() == 30


def test_bands_are_in_the_order_of_their_numbers():
    names = ["8-9", "10-19", "under 8", "100 and over"]
    found = members_by_group(["a"] * 4, [None] * 4, [{"age": name} for name in names])
    assert [key for key in found if "age" in key] == ["age=under 8", "age=8-9", "age=10-19", "age=100 and over"]
