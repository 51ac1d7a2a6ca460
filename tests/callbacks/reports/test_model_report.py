"""Model report: curves, sentences, selected images, page and card agree with metrics and images."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, precision_recall_curve, roc_curve

from callbacks.reports.cases import Case, prediction_quality, select_cases
from callbacks.reports.model_card import model_card
from callbacks.reports.model_evaluation import DataDescription, ModelDescription, ModelEvaluation, TaskEvaluation
from callbacks.reports.model_page import model_page
from callbacks.reports.ranking_curves import TaskCurves, task_curves, task_figure
from callbacks.reports.reliability_report import TaskReliability, ThresholdResult
from callbacks.reports.summary_text import grade, limitations, performance
from mtmedformer.batch import IGNORE, ClassificationTarget, DetectionTarget, Meta, SegmentationTarget, Task
from mtmedformer.metrics.calibration import Reliability
from mtmedformer.metrics.classification import ClassificationMetrics
from mtmedformer.metrics.detection import DetectionMetrics
from mtmedformer.metrics.segmentation import SegmentationMetrics
from mtmedformer.plots.html import Html


def metas(n):
    return [Meta(f"image-{i}", f"patient-{i // 2}", site=("north", "south")[i % 2]) for i in range(n)]


@pytest.fixture
def ranked():
    """Probabilities of three exclusive classes for 40 images, one of them not labelled."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 3, (40,), generator=generator)
    p = (torch.randn(40, 3, generator=generator) + 1.5 * torch.nn.functional.one_hot(truth, 3)).softmax(1)
    p = (p * 20).round() / 20  # with ties
    labels = torch.nn.functional.one_hot(truth, 3).float()
    present = torch.ones(40, dtype=torch.bool)
    present[7] = False
    labels[7] = torch.nan
    metric = ClassificationMetrics(["a", "b", "c"])
    metric.update(p, ClassificationTarget(labels=labels, present=present), metas(40))
    return metric, p[present].numpy().astype(float), truth[present].numpy()


def test_roc_and_precision_recall_match_scikit_learn(ranked):
    metric, p, truth = ranked
    curves = task_curves(metric)
    assert curves.counts == {name: int((truth == k).sum()) for k, name in enumerate("abc")}
    for k, name in enumerate("abc"):
        fpr, tpr, _ = roc_curve(truth == k, p[:, k], drop_intermediate=False)
        np.testing.assert_allclose(curves.roc[name], [fpr, tpr], atol=1e-12)
        precision, recall, _ = precision_recall_curve(truth == k, p[:, k])
        ours = np.array(curves.precision_recall[name])
        np.testing.assert_allclose(ours, [recall[:-1][::-1], precision[:-1][::-1]], atol=1e-12)
    np.testing.assert_array_equal(curves.confusion, confusion_matrix(truth, p.argmax(1), labels=[0, 1, 2]))


def test_class_without_both_labels_has_no_curve():
    metric = ClassificationMetrics(["a", "b"], multi_label=True)
    labels = torch.tensor([[1.0, 0.0], [0.0, torch.nan], [1.0, 0.0]])
    target = ClassificationTarget(labels=labels, present=torch.ones(3, dtype=torch.bool))
    metric.update(torch.tensor([[0.9, 0.2], [0.1, 0.5], [0.8, 0.1]]), target, metas(3))
    curves = task_curves(metric)
    assert set(curves.roc) == {"a"}
    assert curves.counts == {"a": 2, "b": 0}
    assert not curves.confusion


def test_froc_counts_lesions_and_false_alarms():
    metric = DetectionMetrics(["nodule", "mass"])
    boxes = [torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]]), torch.zeros(0, 4)]
    labels = [torch.zeros(2, dtype=torch.long), torch.zeros(0, dtype=torch.long)]
    predictions = [
        {
            "boxes": torch.tensor([[0.0, 0, 10, 10], [40, 40, 50, 50]]),
            "scores": torch.tensor([0.9, 0.6]),
            "labels": torch.zeros(2, dtype=torch.long),
        },
        {"boxes": torch.tensor([[5.0, 5, 9, 9]]), "scores": torch.tensor([0.8]), "labels": torch.tensor([0])},
    ]
    metric.update(
        predictions, DetectionTarget(boxes=boxes, labels=labels, present=torch.ones(2, dtype=torch.bool)), metas(2)
    )
    curves = task_curves(metric)
    assert curves.counts == {"nodule": 2, "mass": 0}
    assert curves.froc == {"nodule": ([0.0, 0.0, 0.5, 1.0], [0.0, 0.5, 0.5, 0.5])}


def test_long_curve_is_thinned_and_keeps_its_ends():
    metric = ClassificationMetrics(["a"])
    p = torch.linspace(0, 1, 5000)[:, None]
    labels = (torch.arange(5000) % 3 == 0).float()[:, None]
    target = ClassificationTarget(labels=labels, present=torch.ones(5000, dtype=torch.bool))
    metric.update(p, target, [Meta(str(i), str(i)) for i in range(5000)])
    x, y = task_curves(metric).roc["a"]
    assert len(x) == len(y) == 1000
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)


def test_every_kind_of_curve_is_drawn(ranked):
    metric, _, _ = ranked
    bins = Reliability(
        edges=np.array([0, 0.5, 1]),
        count=np.array([3.0, 5.0, 0.0]),
        confidence=np.array([0.3, 0.8, math.nan]),
        accuracy=np.array([0.2, 0.9, math.nan]),
    )
    reached = {"b": {"youden": ThresholdResult(threshold=0.4, sensitivity=0.8, specificity=0.7)}}
    reliability = TaskReliability(diagrams={"": bins}, raw_diagrams={"": bins}, thresholds=reached)
    drawn = task_figure(task_curves(metric), reliability, ["a", "b", "c"])
    assert [axis.get_title(loc="left") for axis in drawn.axes] == ["ROC", "Precision and recall", "Reliability"]
    assert any(line.get_marker() == "o" and line.get_xdata()[0] == pytest.approx(0.3) for line in drawn.axes[0].lines)
    assert task_figure(TaskCurves(counts={"a": 0}), TaskReliability(), ["a"]) is None
    dice = SegmentationMetrics(["lung"])
    masks = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    masks[:, :, :4] = 1
    dice.update(masks.float(), SegmentationTarget(masks=masks, present=torch.ones(2, dtype=torch.bool)), metas(2))
    assert task_curves(dice) == TaskCurves(counts={"lung": 2}, dice={"lung": [1.0, 1.0]})
    assert task_figure(task_curves(dice), TaskReliability(), ["lung"]).axes[0].get_title(loc="left") == "Dice per image"


def test_quality_of_classes():
    one = Task("t", "classification", ("a", "b", "c"))
    many = Task("t", "classification", ("a", "b", "c"), multi_label=True)
    p = torch.tensor([[0.7, 0.2, 0.1]] * 3)
    labels = torch.tensor([[1.0, 0, 0], [0, 1, torch.nan], [0, 1, 0]])
    target = ClassificationTarget(labels=labels, present=torch.tensor([True, True, False]))
    assert prediction_quality(one, p, target, 0) == pytest.approx(0.7)
    assert prediction_quality(one, p, target, 1) is None, "the true class is unknown"
    assert prediction_quality(one, p, target, 2) is None
    assert prediction_quality(many, p, target, 1) == pytest.approx((0.3 + 0.2) / 2)


def test_quality_of_masks():
    task = Task("t", "segmentation", ("a", "b"), multi_label=True)
    masks = torch.zeros(3, 2, 4, 4, dtype=torch.uint8)
    masks[0, 0, :2] = 1
    masks[0, 1] = IGNORE
    p = torch.zeros(3, 2, 4, 4)
    p[0, 0, 1:3] = 0.9
    p[0, 1] = 0.9  # where nothing is annotated
    p[2, 0, 0, 0] = 0.9
    target = SegmentationTarget(masks=masks, present=torch.ones(3, dtype=torch.bool))
    assert prediction_quality(task, p, target, 0) == pytest.approx(0.5)
    assert prediction_quality(task, p, target, 1) is None, "nothing present and nothing predicted"
    assert prediction_quality(task, p, target, 2) == 0.0


def test_quality_of_boxes():
    task = Task("t", "detection", ("a", "b"))
    box = torch.tensor([[0.0, 0, 10, 10]])
    target = DetectionTarget(
        boxes=[box, torch.zeros(0, 4), torch.zeros(0, 4)],
        labels=[torch.tensor([1]), torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long)],
        present=torch.ones(3, dtype=torch.bool),
    )

    def boxes_of(labels, scores):
        return {"boxes": box.expand(len(labels), 4), "scores": torch.tensor(scores), "labels": torch.tensor(labels)}

    assert prediction_quality(task, [boxes_of([1], [0.9])], target, 0) == 1.0
    assert prediction_quality(task, [boxes_of([0], [0.9])], target, 0) == 0.0, "right place, wrong class"
    assert prediction_quality(task, [boxes_of([1, 0], [0.9, 0.8])], target, 0) == pytest.approx(2 / 3)
    assert prediction_quality(task, [boxes_of([1], [0.1])], target, 0) == 0.0, "score too low"
    assert prediction_quality(task, [None, boxes_of([0, 0, 0], [0.9, 0.9, 0.9])], target, 1) == 0.25
    assert prediction_quality(task, [None, None, boxes_of([0], [0.1])], target, 2) is None


def test_worst_median_and_best_are_selected():
    cases = [Case(*case) for case in ((0.9, 0), (0.1, 1), (0.5, 2), (0.6, 3), (math.nan, 4))]
    assert select_cases(cases) == {"worst": Case(0.1, 1), "median": Case(0.5, 2), "best": Case(0.9, 0)}
    assert select_cases([Case(0.5, 3)]) == {"worst": Case(0.5, 3)}
    assert select_cases([]) == {}


def evaluation(values=None, counts=None, confusion=(), config="seed: 0\n", **data):
    """Return a good test of two tasks.

    Args:
        values: Changed metric values by ``<task>/<metric>``.
        counts: Changed numbers of images by class of the task ``health``.
        confusion: Confusion matrix of the task ``health``.
        config: The configuration.
        data: Changed fields of the data description.
    """
    part = DataDescription(
        dataset="SomeSet",
        image_size=[64, 64],
        preset="ChestPreset",
        generated=False,
        official_splits=True,
        seed=0,
        splits={"train": {"patients": 5, "images": 9, "labelled": {"health": 9, "organ": 3, "other": 1}}},
        sites={"north": {"train": 5, "test": 2}, "south": {"train": 4}},
        views={"PA": 9},
        weak={},
        quarantine={},
        remarks={},
        shared_patients=0,
        leaks={"images": 9, "compared": 9, "across_splits": 0, "across_sites": 0, "across_patients": 0},
    )
    health = {
        "n_images": 300, "n_patients": 150, "auroc": 0.9, "auroc_ci_low": 0.85, "auroc_ci_high": 0.94,
        "balanced_accuracy": 0.8, "sensitivity/well": 0.9, "sensitivity/sick": 0.7, "auroc/site=north": 0.91,
        "auroc/site=south": 0.89, "n_images/site=north": 200, "n_images/site=south": 100, "ece": 0.02,
    }  # fmt: skip
    organ = {"n_images": 200, "n_patients": 120, "dice": 0.7, "dice_ci_low": math.nan, "dice_ci_high": math.nan}
    for key, value in (values or {}).items():
        task, metric = key.split("/", 1)
        {"health": health, "organ": organ}[task][metric] = value
    curves = TaskCurves(counts=counts or {"well": 200, "sick": 100}, confusion=list(confusion))
    return ModelEvaluation(
        tasks={
            "health": TaskEvaluation("classification", ("well", "sick"), "auroc", health, curves),
            "organ": TaskEvaluation("segmentation", ("organ",), "dice", organ, TaskCurves(counts={"organ": 200})),
        },
        score=0.8,
        data={"": replace(part, **data)},
        model=ModelDescription("M", "e", 10, "best.ckpt", []),
        config=config,
        versions={"Python": "3"},
    )


def test_performance_has_one_sentence_per_task():
    assert performance(evaluation()) == [
        "health: good separation of well, sick: AUROC 0.900 (0.850 to 0.940) on 300 images of 150 patients; balanced "
        "accuracy 80 %.",
        "organ: moderate segmentation of organ: Dice 0.700 on 200 images of 120 patients.",
    ]
    assert grade(evaluation(values={"organ/dice": math.nan}).tasks["organ"]) is None
    sentence = performance(evaluation(values={"organ/n_patients": 12}))[1]
    assert "of 12 patients, too few for a reliable estimate" in sentence


def test_good_test_has_only_the_standing_limitation():
    assert len(limitations(evaluation())) == 1
    assert "not for diagnosis" in limitations(evaluation())[0]


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"values": {"health/auroc_ci_low": 0.45}}, "not shown to be better than chance"),
        ({"values": {"organ/dice": 0.3}}, "organ: poor result (dice 0.300)"),
        ({"values": {"organ/dice": math.nan}}, "organ: no test image has a usable label"),
        ({"values": {"health/n_patients": 20}}, "Few patients in the test (health 20)"),
        ({"values": {"health/auroc/site=south": 0.7}}, "weaker for site south (auroc 0.700, overall 0.900)"),
        ({"values": {"health/ece": 0.25}}, "probabilities are off by 0.25"),
        ({"values": {"health/sensitivity/sick": 0.1}}, "recognises sick in only 10 % of its images"),
        ({"counts": {"well": 200, "sick": 3}}, "few test images of sick (3)"),
        ({"counts": {"well": 200, "sick": 0}}, "no sick among the test images"),
        ({"generated": True}, "synthetic"),
        ({"shared_patients": 2}, "2 patients are in more than one split"),
        ({"weak": {"organ": 7}}, "approximate in 7 images"),
        ({"sites": {"north": {"test": 2}}}, "one site"),
        (
            {"leaks": {"images": 9, "compared": 9, "across_splits": 3, "across_sites": 0, "across_patients": 0}},
            "3 pairs",
        ),
    ],
)
def test_limitations_name_each_weakness(changes, text):
    points = limitations(evaluation(**changes))
    assert any(text in point for point in points), points
    assert len(points) > 1


def test_limitations_name_the_class_that_a_missed_class_is_confused_with():
    points = limitations(
        evaluation(
            values={"health/sensitivity/sick": 0.1}, counts={"well": 20, "sick": 10}, confusion=[[20, 0], [9, 1]]
        )
    )
    assert "health: recognises sick in only 10 % of its images; 9 of 10 are classified as well." in points


def test_page_and_card_agree_and_escape_hostile_names():
    hostile = "<i>x</i>|`*a*`\n# [y](http://evil.example)"
    result = evaluation(quarantine={f"image: {hostile}": 4}, config=f"name: {json.dumps(hostile)}\n````\n# end\n")
    result.tasks["health"] = replace(result.tasks["health"], classes=("well", hostile))
    page, card = model_page(result, {"organ": Html("<img alt='cases'>")}, {}), model_card(result, "report.html")
    assert "<i>x" not in page
    assert page.count("<img alt='cases'>") == 1
    assert "Worst, median and best" in page
    body = card.split("````")[0]
    assert "\n# [" not in body
    assert "<i>" not in body.replace("\\<i", "")
    assert card.count("````") == 2
    assert "AUROC 0.900 (0.850 to 0.940)" in page
    assert "AUROC 0.900 (0.850 to 0.940)" in card
    assert "labelled: health" in page
    assert "labelled: other" not in page, "the model has no such task"
    for heading in ("Intended use", "Data", "Results", "Excluded", "environment", "Limitations"):
        assert heading in card


def test_data_of_a_federation_is_described_by_site():
    result = evaluation()
    part = result.data[""]
    sites = {"here": part, "there": replace(part, quarantine={"image: unreadable": 1})}
    result = replace(result, data=sites)
    page, card = model_page(result, {}, {}), model_card(result, "report.html")
    assert "here: SomeSet" in page
    assert "there: SomeSet" in card
    assert "unreadable" in page
