"""Classification metrics against scikit-learn and torchmetrics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

from mtmedformer.batch import ClassificationTarget, Meta
from mtmedformer.metrics import ClassificationMetrics

CLASSES = ["normal", "benign", "malignant"]


def metas(n: int) -> list[Meta]:
    return [Meta(id=f"i{i}", patient=f"p{i // 2}") for i in range(n)]


def everything(n: int) -> torch.Tensor:
    return torch.ones(n, dtype=torch.bool)


def values(metric: ClassificationMetrics) -> dict[str, float]:
    return {name: value.item() for name, value in metric.compute().items()}


@pytest.fixture
def single() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(3, (90,), generator=generator)
    logits = torch.randn(90, 3, generator=generator) + 1.5 * torch.nn.functional.one_hot(truth, 3)
    probabilities = logits.softmax(1)
    probabilities[:6] = probabilities[0]  # ties
    return probabilities, truth


@pytest.fixture
def multi() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    truth = (torch.rand(80, 3, generator=generator) > 0.6).float()
    probabilities = (torch.rand(80, 3, generator=generator) + 0.5 * truth).clamp(max=1)
    return (probabilities * 20).round() / 20, truth  # many ties, some exactly 0, 0.5 and 1


def test_single_label_equals_scikit_learn_and_torchmetrics(single):
    probabilities, truth = single
    metric = ClassificationMetrics(CLASSES)
    metric.update(probabilities, ClassificationTarget(torch.eye(3)[truth], everything(90)), metas(90))
    got, p, t = values(metric), probabilities.numpy(), truth.numpy()
    decision = p.argmax(1)
    assert got["auroc"] == pytest.approx(sk.roc_auc_score(t, p, multi_class="ovr"), abs=1e-6)
    assert got["ap"] == pytest.approx(sk.average_precision_score(np.eye(3)[t], p), abs=1e-6)
    assert got["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(t, decision), abs=1e-6)
    assert got["f1"] == pytest.approx(sk.f1_score(t, decision, average="macro"), abs=1e-6)
    assert got["accuracy"] == pytest.approx(sk.accuracy_score(t, decision), abs=1e-6)
    assert got["nll"] == pytest.approx(sk.log_loss(t, p), abs=1e-5)
    assert got["ece"] == pytest.approx(
        multiclass_calibration_error(probabilities, truth, 3, n_bins=15).item(), abs=1e-6
    )
    for k, name in enumerate(CLASSES):
        assert got[f"auroc/{name}"] == pytest.approx(sk.roc_auc_score(t == k, p[:, k]), abs=1e-6)
        assert got[f"ap/{name}"] == pytest.approx(sk.average_precision_score(t == k, p[:, k]), abs=1e-6)
        assert got[f"f1/{name}"] == pytest.approx(sk.f1_score(t == k, decision == k), abs=1e-6)


@pytest.mark.parametrize("specificity", [0.5, 0.8, 0.9, 0.95])
def test_multi_label_equals_scikit_learn_and_torchmetrics(multi, specificity):
    probabilities, truth = multi
    metric = ClassificationMetrics(CLASSES, multi_label=True, specificity=specificity)
    metric.update(probabilities, ClassificationTarget(truth, everything(80)), metas(80))
    got, p, t = values(metric), probabilities.numpy().astype(float), truth.numpy()
    for k, name in enumerate(CLASSES):
        fpr, tpr, _ = sk.roc_curve(t[:, k], p[:, k], drop_intermediate=False)
        assert got[f"sensitivity_at_specificity_{100 * specificity:g}/{name}"] == pytest.approx(
            tpr[fpr <= 1 - specificity + 1e-12].max(), abs=1e-6
        )
        found = p[:, k] > 0.5
        assert got[f"auroc/{name}"] == pytest.approx(sk.roc_auc_score(t[:, k], p[:, k]), abs=1e-6)
        assert got[f"balanced_accuracy/{name}"] == pytest.approx(sk.balanced_accuracy_score(t[:, k], found), abs=1e-6)
        assert got[f"sensitivity/{name}"] == pytest.approx(sk.recall_score(t[:, k], found), abs=1e-6)
        assert got[f"specificity/{name}"] == pytest.approx(sk.recall_score(t[:, k], found, pos_label=0), abs=1e-6)
        assert got[f"nll/{name}"] == pytest.approx(
            sk.log_loss(t[:, k], np.clip(probabilities[:, k].numpy(), 0, 1)), abs=1e-5
        )
        expected = binary_calibration_error(probabilities[:, k], truth[:, k].int(), n_bins=15).item()
        assert got[f"ece/{name}"] == pytest.approx(expected, abs=1e-6)
    assert got["auroc"] == pytest.approx(sk.roc_auc_score(t, p), abs=1e-6)
    assert got["f1"] == pytest.approx(sk.f1_score(t, p > 0.5, average="macro"), abs=1e-6)


def test_unknown_images_and_labels_change_nothing(multi):
    probabilities, truth = multi
    known = ClassificationMetrics(CLASSES, multi_label=True)
    known.update(probabilities[:60], ClassificationTarget(truth[:60], everything(60)), metas(60))
    masked, labels = ClassificationMetrics(CLASSES, multi_label=True), truth.clone()
    labels[60:] = float("nan")
    present = torch.arange(80) < 70  # 60 to 69 are present without any known label
    masked.update(probabilities, ClassificationTarget(labels, present), metas(80))
    assert values(masked) == values(known)


def test_partly_labelled_rows_count_for_their_known_classes_only(multi):
    probabilities, truth = multi
    labels = truth.clone()
    labels[::2, 1] = float("nan")
    metric = ClassificationMetrics(CLASSES, multi_label=True)
    metric.update(probabilities, ClassificationTarget(labels, everything(80)), metas(80))
    got = values(metric)
    assert got["auroc/benign"] == pytest.approx(sk.roc_auc_score(truth[1::2, 1], probabilities[1::2, 1]), abs=1e-6)
    assert got["auroc/normal"] == pytest.approx(sk.roc_auc_score(truth[:, 0], probabilities[:, 0]), abs=1e-6)


def test_a_class_without_both_labels_is_nan_and_left_out_of_the_mean(multi):
    probabilities, truth = multi
    truth[:, 2], truth[:, 1] = 0, 1
    metric = ClassificationMetrics(CLASSES, multi_label=True)
    metric.update(probabilities, ClassificationTarget(truth, everything(80)), metas(80))
    got = values(metric)
    for name in ("auroc", "ap", "balanced_accuracy", "sensitivity_at_specificity_90"):
        assert np.isnan(got[f"{name}/malignant"])
        assert np.isnan(got[f"{name}/benign"])
        assert got[name] == got[f"{name}/normal"]
    assert np.isnan(got["f1/malignant"])


def test_the_worst_case_image_gives_finite_likelihood():
    metric = ClassificationMetrics(["sick"])
    target = ClassificationTarget(torch.tensor([[1.0], [0.0]]), everything(2))
    metric.update(torch.tensor([[0.0], [1.0]]), target, metas(2))
    got = values(metric)
    assert np.isfinite(got["nll"])
    assert got["auroc"] == 0
    assert got["ece"] == 1


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("multi_label", [False, True])
def test_without_images_every_metric_is_nan(multi_label):
    got = values(ClassificationMetrics(CLASSES, multi_label))
    assert got
    assert all(np.isnan(value) for value in got.values())
