"""What is said, drawn and picked after a test is what the metrics and the images hold."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, precision_recall_curve, roc_curve

from callbacks.reports.cases import chosen, quality
from callbacks.reports.model_card import model_card
from callbacks.reports.model_page import model_page
from callbacks.reports.ranking_curves import curves_of, task_figure
from callbacks.reports.summary_text import abilities, judged, limits
from mtmedformer.batch import IGNORE, ClassificationTarget, DetectionTarget, Meta, SegmentationTarget, Task
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


def test_roc_and_precision_are_those_of_scikit_learn(ranked):
    metric, p, truth = ranked
    found = curves_of(metric)
    assert found["counts"] == {name: int((truth == k).sum()) for k, name in enumerate("abc")}
    for k, name in enumerate("abc"):
        fpr, tpr, _ = roc_curve(truth == k, p[:, k], drop_intermediate=False)
        np.testing.assert_allclose(found["roc"][name], [fpr, tpr], atol=1e-12)
        precision, recall, _ = precision_recall_curve(truth == k, p[:, k])
        ours = np.array(found["pr"][name])
        np.testing.assert_allclose(ours, [recall[:-1][::-1], precision[:-1][::-1]], atol=1e-12)
    np.testing.assert_array_equal(found["confusion"], confusion_matrix(truth, p.argmax(1), labels=[0, 1, 2]))


def test_a_class_without_both_labels_has_no_curve():
    metric = ClassificationMetrics(["a", "b"], multi_label=True)
    labels = torch.tensor([[1.0, 0.0], [0.0, torch.nan], [1.0, 0.0]])
    target = ClassificationTarget(labels=labels, present=torch.ones(3, dtype=torch.bool))
    metric.update(torch.tensor([[0.9, 0.2], [0.1, 0.5], [0.8, 0.1]]), target, metas(3))
    found = curves_of(metric)
    assert set(found["roc"]) == {"a"}
    assert found["counts"] == {"a": 2, "b": 0}
    assert "confusion" not in found


def test_froc_counts_lesions_and_false_alarms():
    metric = DetectionMetrics(["nodule", "mass"])
    boxes = [torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]]), torch.zeros(0, 4)]
    labels = [torch.zeros(2, dtype=torch.long), torch.zeros(0, dtype=torch.long)]
    found = [
        {
            "boxes": torch.tensor([[0.0, 0, 10, 10], [40, 40, 50, 50]]),
            "scores": torch.tensor([0.9, 0.6]),
            "labels": torch.zeros(2, dtype=torch.long),
        },
        {"boxes": torch.tensor([[5.0, 5, 9, 9]]), "scores": torch.tensor([0.8]), "labels": torch.tensor([0])},
    ]
    metric.update(found, DetectionTarget(boxes=boxes, labels=labels, present=torch.ones(2, dtype=torch.bool)), metas(2))
    told = curves_of(metric)
    assert told["counts"] == {"nodule": 2, "mass": 0}
    assert told["froc"] == {"nodule": [[0.0, 0.0, 0.5, 1.0], [0.0, 0.5, 0.5, 0.5]]}


def test_a_long_curve_is_thinned_and_keeps_its_ends():
    metric = ClassificationMetrics(["a"])
    p = torch.linspace(0, 1, 5000)[:, None]
    labels = (torch.arange(5000) % 3 == 0).float()[:, None]
    target = ClassificationTarget(labels=labels, present=torch.ones(5000, dtype=torch.bool))
    metric.update(p, target, [Meta(str(i), str(i)) for i in range(5000)])
    x, y = curves_of(metric)["roc"]["a"]
    assert len(x) == len(y) == 1000
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)


def test_every_kind_of_curve_is_drawn(ranked):
    metric, _, _ = ranked
    bins = {
        "edges": [0, 0.5, 1],
        "count": [3.0, 5.0, 0.0],
        "confidence": [0.3, 0.8, None],
        "accuracy": [0.2, 0.9, None],
    }
    reached = {"b": {"youden": {"threshold": 0.4, "sensitivity": 0.8, "specificity": 0.7}}}
    told = {"bins": {"": bins}, "bins_raw": {"": bins}, "thresholds": reached}
    drawn = task_figure(curves_of(metric), told, ["a", "b", "c"])
    assert [axis.get_title(loc="left") for axis in drawn.axes] == ["ROC", "Precision and recall", "Reliability"]
    assert any(line.get_marker() == "o" and line.get_xdata()[0] == pytest.approx(0.3) for line in drawn.axes[0].lines)
    assert task_figure({"counts": {"a": 0}, "roc": {}}, {}, ["a"]) is None
    dice = SegmentationMetrics(["lung"])
    masks = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    masks[:, :, :4] = 1
    dice.update(masks.float(), SegmentationTarget(masks=masks, present=torch.ones(2, dtype=torch.bool)), metas(2))
    assert curves_of(dice) == {"counts": {"lung": 2}, "dice": {"lung": [1.0, 1.0]}}
    assert task_figure(curves_of(dice), {}, ["lung"]).axes[0].get_title(loc="left") == "Dice of each image"


def test_quality_of_classes():
    one = Task("t", "classification", ("a", "b", "c"))
    many = Task("t", "classification", ("a", "b", "c"), multi_label=True)
    p = torch.tensor([[0.7, 0.2, 0.1]] * 3)
    labels = torch.tensor([[1.0, 0, 0], [0, 1, torch.nan], [0, 1, 0]])
    target = ClassificationTarget(labels=labels, present=torch.tensor([True, True, False]))
    assert quality(one, p, target, 0) == pytest.approx(0.7)
    assert quality(one, p, target, 1) is None, "which class it is, is unknown"
    assert quality(one, p, target, 2) is None
    assert quality(many, p, target, 1) == pytest.approx((0.3 + 0.2) / 2)


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
    assert quality(task, p, target, 0) == pytest.approx(0.5)
    assert quality(task, p, target, 1) is None, "nothing there, nothing drawn: nothing to see"
    assert quality(task, p, target, 2) == 0.0


def test_quality_of_boxes():
    task = Task("t", "detection", ("a", "b"))
    box = torch.tensor([[0.0, 0, 10, 10]])
    target = DetectionTarget(
        boxes=[box, torch.zeros(0, 4), torch.zeros(0, 4)],
        labels=[torch.tensor([1]), torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long)],
        present=torch.ones(3, dtype=torch.bool),
    )

    def found(labels, scores):
        return {"boxes": box.expand(len(labels), 4), "scores": torch.tensor(scores), "labels": torch.tensor(labels)}

    assert quality(task, [found([1], [0.9])], target, 0) == 1.0
    assert quality(task, [found([0], [0.9])], target, 0) == 0.0, "right place, wrong class"
    assert quality(task, [found([1, 0], [0.9, 0.8])], target, 0) == pytest.approx(2 / 3)
    assert quality(task, [found([1], [0.1])], target, 0) == 0.0, "not shown"
    assert quality(task, [None, found([0, 0, 0], [0.9, 0.9, 0.9])], target, 1) == 0.25
    assert quality(task, [None, None, found([0], [0.1])], target, 2) is None


def test_worst_median_and_best_are_picked():
    cases = [(0.9, 0), (0.1, 1), (0.5, 2), (0.6, 3), (math.nan, 4)]
    assert chosen(cases) == {"worst": (0.1, 1), "median": (0.5, 2), "best": (0.9, 0)}
    assert chosen([(0.5, 3)]) == {"worst": (0.5, 3)}
    assert chosen([]) == {}


def facts(**changes):
    part = {
        "dataset": "SomeSet",
        "image_size": [64, 64],
        "preset": "ChestPreset",
        "generated": False,
        "official_splits": True,
        "seed": 0,
        "splits": {"train": {"patients": 5, "images": 9, "labelled": {"health": 9, "organ": 3, "other": 1}}},
        "sites": {"north": {"train": 5, "test": 2}, "south": {"train": 4}},
        "views": {"PA": 9},
        "weak": {},
        "quarantine": {},
        "remarks": {},
        "shared_patients": 0,
        "leaks": {"images": 9, "compared": 9, "across_splits": 0, "across_sites": 0, "across_patients": 0},
    }
    values = {
        "health/n_images": 300, "health/n_patients": 150, "health/auroc": 0.9, "health/auroc_ci_low": 0.85,
        "health/auroc_ci_high": 0.94, "health/balanced_accuracy": 0.8, "health/sensitivity/well": 0.9,
        "health/sensitivity/sick": 0.7, "health/auroc/site=north": 0.91, "health/auroc/site=south": 0.89,
        "health/n_images/site=north": 200, "health/n_images/site=south": 100, "health/ece": 0.02,
        "organ/n_images": 200, "organ/n_patients": 120, "organ/dice": 0.7, "organ/dice_ci_low": math.nan,
        "organ/dice_ci_high": math.nan,
    }  # fmt: skip
    told = {
        "tasks": {
            "health": {"kind": "classification", "classes": ["well", "sick"], "primary": "auroc"},
            "organ": {"kind": "segmentation", "classes": ["organ"], "primary": "dice"},
        },
        "values": values,
        "score": 0.8,
        "curves": {"health": {"counts": {"well": 200, "sick": 100}}, "organ": {"counts": {"organ": 200}}},
        "reliability": {},
        "data": {"": part},
        "model": {"class": "M", "encoder": "e", "parameters": 10, "checkpoint": "best.ckpt", "calibrated": []},
        "config": "seed: 0\n",
        "versions": {"Python": "3"},
    }
    for key, value in changes.items():
        if key in told:
            told[key] = {**told[key], **value} if isinstance(value, dict) else value
        elif key in part:
            part[key] = value
    return told


def test_what_a_model_can_do_is_said_in_words():
    assert abilities(facts()) == [
        "health: ranks images by well, sick well, AUROC 0.900 (0.850 to 0.940) on 300 images of 150 patients; its "
        "decisions are right in 80 % (mean over classes).",
        "organ: outlines organ moderately, Dice 0.700 on 200 images of 120 patients.",
    ]
    assert judged(facts(values={"organ/dice": math.nan}), "organ") is None
    assert "of 12 patients, too few to be sure" in abilities(facts(values={"organ/n_patients": 12}))[1]


def test_a_good_test_has_no_reproach_but_the_standing_one():
    assert len(limits(facts())) == 1
    assert "not for diagnosis" in limits(facts())[0]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"values": {"health/auroc_ci_low": 0.45}}, "not shown to be better than chance"),
        ({"values": {"organ/dice": 0.3}}, "organ: done poorly (dice 0.300)"),
        ({"values": {"organ/dice": math.nan}}, "organ: no test image is labelled"),
        ({"values": {"health/n_patients": 20}}, "few patients (health 20)"),
        ({"values": {"health/auroc/site=south": 0.7}}, "worse at site south (auroc 0.700, 0.900 over all)"),
        ({"values": {"health/ece": 0.25}}, "its probabilities are 0.25 off"),
        ({"values": {"health/sensitivity/sick": 0.1}}, "recognises sick in 10 % of its images only"),
        ({"curves": {"health": {"counts": {"well": 200, "sick": 3}}}}, "few test images of sick (3)"),
        ({"curves": {"health": {"counts": {"well": 200, "sick": 0}}}}, "no sick among the test images"),
        ({"generated": True}, "generated"),
        ({"shared_patients": 2}, "2 patients are in more than one split"),
        ({"weak": {"organ": 7}}, "approximate in 7 images"),
        ({"sites": {"north": {"test": 2}}}, "one place"),
        (
            {"leaks": {"images": 9, "compared": 9, "across_splits": 3, "across_sites": 0, "across_patients": 0}},
            "3 pairs",
        ),
    ],
)
def test_what_it_cannot_do_is_said_too(changes, words):
    said = limits(facts(**changes))
    assert any(words in line for line in said), said
    assert len(said) > 1


def test_what_a_missed_class_is_taken_for_is_said():
    curves = {"health": {"counts": {"well": 20, "sick": 10}, "confusion": [[20, 0], [9, 1]]}}
    said = limits(facts(values={"health/sensitivity/sick": 0.1}, curves=curves))
    assert "health: recognises sick in 10 % of its images only; 9 of 10 are taken for well." in said


def test_page_and_card_say_the_same_and_survive_any_name():
    hostile = "<i>x</i>|`*a*`\n# [y](http://evil.example)"
    told = facts(quarantine={f"image: {hostile}": 4}, config=f"name: {json.dumps(hostile)}\n````\n# end\n")
    told["tasks"]["health"]["classes"][1] = hostile
    page, card = model_page(told, {"organ": Html("<img alt='cases'>")}), model_card(told, "report.html")
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
    assert "labelled: other" not in page, "the model does not answer it"
    for heading in ("Intended use", "Data", "Results", "Left out", "environment", "cannot do"):
        assert heading in card


def test_sites_of_a_federation_are_told_apart():
    told = facts()
    part = told["data"].pop("")
    told["data"] = {"here": part, "there": {**part, "quarantine": {"image: unreadable": 1}}}
    page, card = model_page(told, {}), model_card(told, "report.html")
    assert "here: SomeSet" in page
    assert "there: SomeSet" in card
    assert "unreadable" in page
