"""Temperatures against scipy, bins against torchmetrics, thresholds against what they promise."""

import math

import numpy as np
import pytest
import scipy.special
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from sklearn.metrics import brier_score_loss, f1_score, log_loss, roc_curve
from torchmetrics.classification import BinaryCalibrationError, MulticlassCalibrationError

from mtmedformer import ClassificationHead, ConfigError, DetectionHead, SegmentationHead
from mtmedformer.batch import IGNORE, ClassificationTarget, Meta, SegmentationTarget, Task
from mtmedformer.calibration import (
    OperatingPoint,
    TaskCalibration,
    box_performance,
    box_threshold,
    class_performance,
    class_threshold,
    fit_temperature,
    plain,
    restored,
    tempered,
)
from mtmedformer.heads.capabilities import Calibratable, calibrated
from mtmedformer.metrics.calibration import (
    LOG_TEMPERATURES,
    CalibrationMetrics,
    TemperatureSums,
    decisions,
    likelihood_curve,
    reliability,
    truth_of,
)
from mtmedformer.metrics.classification import ClassificationMetrics
from mtmedformer.metrics.froc import Findings

EXCLUSIVE = Task("finding", "classification", ("a", "b", "c"))
SEVERAL = Task("findings", "classification", ("a", "b"), multi_label=True)
LUNG = Task("lungs", "segmentation", ("lung",))
ORGANS = Task("organs", "segmentation", ("liver", "spleen"))


def meta(n, start=0):
    return [Meta(f"im{start + i}", f"p{start + i}") for i in range(n)]


def planted(temperature, n=4000, classes=3, seed=0):
    """Return logits that are too sure by a known factor, and labels drawn from what they should be."""
    generator = torch.Generator().manual_seed(seed)
    honest = 2 * torch.randn(n, classes, generator=generator)
    drawn = torch.multinomial(honest.softmax(1), 1, generator=generator).squeeze(1)
    return honest * temperature, F.one_hot(drawn, classes).float()


def planted_masks(temperature, n=6, size=96, seed=0):
    generator = torch.Generator().manual_seed(seed)
    honest = 2 * torch.randn(n, 1, size, size, generator=generator)
    masks = (torch.rand(n, 1, size, size, generator=generator) < honest.sigmoid()).to(torch.uint8)
    return honest * temperature, SegmentationTarget(masks, torch.ones(n, dtype=torch.bool))


def fitted(task, logits, target, prior=None):
    sums = TemperatureSums(task)
    sums.update(logits, target, meta(len(logits)))
    return fit_temperature(*sums.sums(), prior)


def everywhere(labels):
    return ClassificationTarget(labels, torch.ones(len(labels), dtype=torch.bool))


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_a_known_temperature_is_recovered_and_equals_scipys(temperature):
    logits, labels = planted(temperature)
    found, nll = fitted(EXCLUSIVE, logits, everywhere(labels))
    assert found == pytest.approx(temperature, rel=0.06)

    def loss(x):
        return log_loss(labels.argmax(1).numpy(), scipy.special.softmax(logits.double().numpy() / math.exp(x), axis=1))

    exact = minimize_scalar(loss, bounds=(-2.3, 2.3), method="bounded", options={"xatol": 1e-8})
    assert found == pytest.approx(math.exp(exact.x), rel=1e-3)
    assert nll == pytest.approx(exact.fun, rel=1e-5)


def test_a_known_temperature_of_mask_pixels_is_recovered():
    logits, target = planted_masks(3.0)
    found, nll = fitted(LUNG, logits, target)
    assert found == pytest.approx(3.0, rel=0.05)
    whole = F.binary_cross_entropy_with_logits(logits / found, target.masks.float())
    assert nll == pytest.approx(float(whole), rel=0.03)  # 4096 of 9216 pixels an image


def test_classes_that_may_hold_together_share_one_temperature_and_skip_what_is_unknown():
    generator = torch.Generator().manual_seed(0)
    honest = 2 * torch.randn(3000, 2, generator=generator)
    labels = (torch.rand(3000, 2, generator=generator) < honest.sigmoid()).float()
    clean, _ = fitted(SEVERAL, 2 * honest, everywhere(labels))
    assert clean == pytest.approx(2.0, rel=0.06)
    wrong = torch.where(torch.arange(3000)[:, None] % 3 == 0, torch.nan, labels)
    kept = torch.arange(3000) % 3 != 0
    partly, _ = fitted(SEVERAL, 2 * honest, everywhere(wrong))
    alone, _ = fitted(SEVERAL, 2 * honest[kept], everywhere(labels[kept]))
    assert partly == pytest.approx(alone, rel=1e-9)


def test_images_without_labels_do_not_change_the_temperature():
    logits, target = planted_masks(3.0)
    more = torch.cat([logits, 50 * torch.ones_like(logits)])
    masks = torch.cat([target.masks, torch.zeros_like(target.masks)])
    mixed = SegmentationTarget(masks, torch.arange(12) < 6)
    assert fitted(LUNG, more, mixed) == fitted(LUNG, logits, target)
    masks = masks.clone()
    masks[6:] = IGNORE
    ignored = SegmentationTarget(masks, torch.ones(12, dtype=torch.bool))
    assert fitted(LUNG, more, ignored) == fitted(LUNG, logits, target)


def test_sums_of_sites_give_the_temperature_of_the_pool():
    logits, labels = planted(2.0, n=600)
    parts = []
    for rows in (slice(0, 100), slice(100, 600)):
        sums = TemperatureSums(EXCLUSIVE)
        sums.update(logits[rows], everywhere(labels[rows]), meta(600)[rows])
        parts.append(sums.sums())
    together = [sum(part[i] for part in parts) for i in range(3)]
    assert fit_temperature(*together) == pytest.approx(fitted(EXCLUSIVE, logits, everywhere(labels), 0.5), rel=1e-9)


def test_scaling_never_raises_the_loss_on_the_images_it_was_fitted_on():
    for seed in range(20):
        logits, labels = planted(0.5 + 0.1 * seed, n=15, seed=seed)
        for prior in (None, 0.5):
            temperature, _ = fitted(EXCLUSIVE, logits, everywhere(labels), prior)
            before, after = (F.cross_entropy(logits.double() / t, labels.double()) for t in (1, temperature))
            assert after <= before + 1e-9


def test_a_few_correct_images_do_not_give_certain_predictions():
    logits, labels = planted(1.0, n=12)
    labels = F.one_hot(logits.argmax(1), 3).float()
    reckless, _ = fitted(EXCLUSIVE, logits, everywhere(labels))
    careful, _ = fitted(EXCLUSIVE, logits, everywhere(labels), prior=0.5)
    assert reckless < 0.11
    assert 0.3 < careful < 1


def test_the_curve_and_its_slope_are_those_of_autograd():
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).double()
    labels = F.one_hot(torch.randint(3, (2, 5), generator=torch.Generator().manual_seed(1)), 3).permute(0, 2, 1)
    labels = labels.double()
    labels[0, :, 0] = torch.nan
    for exclusive in (True, False):
        curve, count = likelihood_curve(logits, labels, exclusive)
        assert count.tolist() == ([4, 5] if exclusive else [12, 15])
        for i in (0, 13, 20, 40):
            x = torch.tensor(LOG_TEMPERATURES[i], requires_grad=True, dtype=torch.float64)
            u = logits / x.exp()
            known = labels.nan_to_num(0.0) * u.log_softmax(1) if exclusive else None
            losses = (
                -known
                if known is not None
                else F.binary_cross_entropy_with_logits(u, labels.nan_to_num(0.0), reduction="none")
            )
            total = losses.masked_fill(labels.isnan(), 0.0).sum()
            total.backward()
            assert float(curve[:, i, 0].sum()) == pytest.approx(total.item(), rel=1e-9)
            assert float(curve[:, i, 1].sum()) == pytest.approx(float(x.grad), rel=1e-9)


def test_scaling_changes_neither_the_predicted_class_nor_the_order():
    torch.manual_seed(0)
    logits, _ = planted(1.0, n=200)
    head = ClassificationHead(["a", "b", "c"])
    head.build(8, (4, 8, 16, 32, 64))
    outputs = head([torch.randn(200, 8, s, s) for s in (8, 4, 2, 1, 1)], (32, 32))
    outputs.logits = logits
    plainly, scaled = head.predict(outputs, (32, 32)), head.predict(head.scaled(outputs, 3.0), (32, 32))
    assert torch.equal(plainly.argmax(1), scaled.argmax(1))
    torch.testing.assert_close(scaled, (logits / 3).softmax(1))
    np.testing.assert_allclose(tempered(plainly.numpy(), 3.0, True), scaled.numpy(), atol=1e-6)
    lungs = SegmentationHead(["lung"])
    lungs.build(8, (4, 8, 16, 32, 64))
    masks = torch.randn(2, 1, 8, 8)
    plainly, scaled = lungs.predict(masks, (30, 30)), lungs.predict(lungs.scaled(masks, 2.0), (30, 30))
    assert torch.equal(plainly > 0.5, scaled > 0.5)
    assert (scaled.flatten()[plainly.flatten().argsort()].diff() >= -1e-6).all()
    np.testing.assert_allclose(tempered(plainly.numpy(), 2.0, False), scaled.numpy(), atol=1e-6)
    assert lungs.class_logits(masks, (30, 30)).shape == (2, 1, 30, 30)


def test_a_detection_head_cannot_be_calibrated():
    head = DetectionHead(["nodule"])
    assert not isinstance(head, Calibratable)
    outputs = object()
    assert calibrated(head, outputs, None) is outputs
    with pytest.raises(ConfigError, match="DetectionHead cannot be calibrated"):
        calibrated(head, outputs, 2.0)


def test_truth_of_exclusive_masks_has_a_background_and_nan_where_unknown():
    masks = torch.tensor([[[[1, IGNORE, 0, IGNORE]], [[IGNORE, 0, 0, 1]]]], dtype=torch.uint8)
    truth = truth_of(ORGANS, SegmentationTarget(masks, torch.tensor([True])))
    assert truth[0, :, 0, 0].tolist() == [0, 1, 0]  # a liver is no spleen, annotated or not
    assert truth[0, :, 0, 1].isnan().all()
    assert truth[0, :, 0, 2].tolist() == [1, 0, 0]
    assert truth[0, :, 0, 3].tolist() == [0, 0, 1]
    assert truth_of(ORGANS, SegmentationTarget(masks, torch.tensor([False]))).isnan().all()


@pytest.mark.parametrize("task", [EXCLUSIVE, SEVERAL])
def test_errors_are_those_of_the_classification_metrics_and_of_torchmetrics(task):
    generator = torch.Generator().manual_seed(0)
    n, k = 300, len(task.classes)
    logits = 3 * torch.randn(n, k, generator=generator)
    if task.multi_label:
        p, labels = logits.sigmoid(), (torch.rand(n, k, generator=generator) < 0.4).float()
        labels[::7, 0] = torch.nan
    else:
        p, labels = logits.softmax(1), F.one_hot(torch.randint(k, (n,), generator=generator), k).float()
    present = torch.arange(n) % 5 != 0
    theirs, ours = ClassificationMetrics(task.classes, task.multi_label), CalibrationMetrics(task)
    for part in (slice(0, 100), slice(100, 300), slice(0, 50)):  # what is served twice counts once
        target = ClassificationTarget(labels[part], present[part])
        for metric in (theirs, ours):
            metric.update(p[part], target, meta(n)[part])
    a, b = theirs.compute(), ours.compute()
    for name in b:
        assert float(b[name]) == pytest.approx(float(a[name]), rel=1e-6), name
    if task.multi_label:
        known = present & ~labels[:, 1].isnan()
        oracle = BinaryCalibrationError(15)(p[known, 1], labels[known, 1].long())
        assert float(b["ece/b"]) == pytest.approx(float(oracle), rel=1e-5)
    else:
        oracle = MulticlassCalibrationError(k, 15)(p[present], labels[present].argmax(1))
        assert float(b["ece"]) == pytest.approx(float(oracle), rel=1e-5)


@pytest.mark.parametrize("task", [LUNG, ORGANS])
def test_pixels_are_scored_as_torchmetrics_scores_them(task):
    generator = torch.Generator().manual_seed(0)
    k = len(task.classes)
    logits = 2 * torch.randn(3, k + (k > 1), 20, 20, generator=generator)
    labels = torch.randint(k + 1, (3, 20, 20), generator=generator)
    masks = torch.stack([(labels == c + 1).to(torch.uint8) for c in range(k)], dim=1)
    unknown = torch.rand(3, 20, 20, generator=generator) < 0.2
    masks[unknown[:, None].expand_as(masks)] = IGNORE
    p = logits.softmax(1)[:, 1:] if k > 1 else logits.sigmoid()
    metric = CalibrationMetrics(task)
    metric.update(p, SegmentationTarget(masks, torch.tensor([True, True, False])), meta(3))
    found = metric.compute()
    keep = ~unknown[:2]
    if k > 1:
        whole = logits.softmax(1).movedim(1, -1)[:2][keep]
        oracle, nll = (
            MulticlassCalibrationError(3, 15)(whole, labels[:2][keep]),
            F.nll_loss(whole.log(), labels[:2][keep]),
        )
    else:
        inside = labels[:2][keep]
        oracle = BinaryCalibrationError(15)(p[:2, 0][keep], inside)
        nll = F.binary_cross_entropy(p[:2, 0][keep], inside.float())
    assert float(found["ece"]) == pytest.approx(float(oracle), rel=1e-4)
    assert float(found["nll"]) == pytest.approx(float(nll), rel=1e-4)
    diagram = metric.diagrams()[task.classes[0] if k == 1 else ""]
    assert diagram.ece == pytest.approx(float(oracle), rel=1e-4)
    assert diagram.count.sum() == int(keep.sum())


def test_likelihood_of_the_truth_gives_brier_score_and_log_loss():
    p, y = torch.rand(50, 1, generator=torch.Generator().manual_seed(0)), (torch.arange(50)[:, None] % 2).float()
    confidence, correct, likelihood = decisions(Task("x", "classification", ("a",), multi_label=True), p, everywhere(y))
    assert float((confidence - correct).square().mean()) == pytest.approx(brier_score_loss(y[:, 0], p[:, 0]), rel=1e-5)
    assert float(-likelihood.log().mean()) == pytest.approx(log_loss(y[:, 0], p[:, 0].double()), rel=1e-5)


def test_reliability_bins_known_labels_only():
    p, y = np.array([[0.05, 0.95], [0.97, 1.0], [0.5, 0.94]]), np.array([[0, 1], [0, 1], [np.nan, 1]])
    found = reliability(p, y, bins=10)
    assert found.count.tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 0, 3, 1]
    assert found.confidence[9] == pytest.approx((0.95 + 0.97 + 0.94) / 3)
    assert found.accuracy[9] == pytest.approx(2 / 3)
    assert math.isnan(found.accuracy[3])
    assert found.ece == pytest.approx((0.05 + abs(0.95 + 0.97 + 0.94 - 2) + 0) / 5)
    assert math.isnan(reliability(np.zeros(0), np.zeros(0)).ece)


def test_a_calibration_goes_through_plain_containers():
    one = {"finding": TaskCalibration(12, 1.5, 0.4, 0.3, {"a": {"youden": 0.4}}), "boxes": TaskCalibration(3)}
    assert restored(plain(one)) == one


def scores(seed, n=83):
    rng = np.random.default_rng(seed)
    truth = rng.random(n) < 0.35
    return np.round(np.clip(rng.normal(0.35 + 0.25 * truth, 0.2), 0, 1), 2), truth


@pytest.mark.parametrize("seed", range(10))
def test_thresholds_just_reach_the_required_value(seed):
    s, truth = scores(seed)
    fpr, tpr, cuts = roc_curve(truth, s, drop_intermediate=False)
    at = {p: class_threshold(s, truth, OperatingPoint.parse(p)) for p in ("sensitivity=0.9", "specificity=0.9")}
    reached = class_performance(s, truth, at["sensitivity=0.9"])
    assert reached["sensitivity"] == pytest.approx(tpr[tpr >= 0.9].min())
    assert reached["specificity"] == pytest.approx(1 - fpr[tpr >= 0.9].min())
    reached = class_performance(s, truth, at["specificity=0.9"])
    assert reached["specificity"] >= 0.9
    assert reached["sensitivity"] == pytest.approx(tpr[1 - fpr >= 0.9].max())
    youden = class_performance(s, truth, class_threshold(s, truth, OperatingPoint("youden")))
    assert sum(youden.values()) - 1 == pytest.approx((tpr - fpr).max())
    best = max(f1_score(truth, s >= cut) for cut in cuts)
    assert f1_score(truth, s >= class_threshold(s, truth, OperatingPoint("f1"))) == pytest.approx(best)


def test_a_threshold_lies_between_two_scores():
    s, truth = scores(0)
    threshold = class_threshold(s, truth, OperatingPoint("sensitivity", 0.9))
    assert threshold not in s
    assert ((s + 1e-7 >= threshold) == (s - 1e-7 >= threshold)).all()
    assert class_threshold(s, np.ones(len(s), bool), OperatingPoint("youden")) is None
    assert class_threshold(s, truth, OperatingPoint("fp_per_image", 1)) is None
    none = class_threshold(np.ones(4), np.array([True, False, False, False]), OperatingPoint("specificity", 0.9))
    assert none > 1


def test_box_thresholds_reach_the_required_value():
    findings = Findings(
        lesion_image=np.array([0, 0, 1, 3]),
        lesion_score=np.array([0.9, 0.6, 0.3, -np.inf]),
        alarm_image=np.array([0, 1, 2, 2, 3]),
        alarm_score=np.array([0.7, 0.5, 0.4, 0.2, 0.1]),
    )
    at = {p: box_threshold(findings, 4, OperatingPoint.parse(p)) for p in ("f1", "fp_per_image=0.5", "sensitivity=0.7")}
    assert at["f1"] == pytest.approx((0.3 + 0.2) / 2)  # 3 of 4 found, three false alarms: 6/10, against 4/7 and 2/5
    assert box_performance(findings, 4, at["fp_per_image=0.5"]) == {"sensitivity": 0.5, "fp_per_image": 0.5}
    assert at["fp_per_image=0.5"] == pytest.approx((0.5 + 0.4) / 2)
    assert box_performance(findings, 4, at["sensitivity=0.7"])["sensitivity"] == 0.75
    assert box_threshold(findings, 4, OperatingPoint("sensitivity", 0.9)) is None  # one lesion is never found
    assert box_threshold(findings, 4, OperatingPoint("youden")) is None


@pytest.mark.parametrize("text", ["sensitivity", "sensitivity=1.5", "youden=2", "best", "fp_per_image=0", "f1=x"])
def test_invalid_operating_points_are_refused_with_a_message(text):
    with pytest.raises(ConfigError, match=text.split("=")[0]):
        OperatingPoint.parse(text)
    assert str(OperatingPoint.parse("sensitivity = 0.90")) == "sensitivity=0.9"
