"""The images of an overlay: every class is among them."""

import math

import torch

from callbacks.reports.cases import Case, select_cases
from callbacks.reports.shown_images import MOST, ShownImages, shown_classes
from mtmedformer.batch import (
    Batch,
    ClassificationTarget,
    DetectionTarget,
    Meta,
    SegmentationTarget,
    Task,
)

CLASSES = ("normal", "benign", "malignant")
TASKS = {"pathology": Task("pathology", "classification", CLASSES)}


def batch_of(*labels: int, site: str = "a") -> Batch:
    """Return images of these classes; -1 is unknown."""
    one_hot = torch.stack([torch.eye(3)[k] if k >= 0 else torch.full((3,), math.nan) for k in labels])
    target = ClassificationTarget(one_hot, torch.tensor([k >= 0 for k in labels]))
    metas = [Meta(f"{site}{n}", "p", site=site) for n in range(len(labels))]
    return Batch(torch.zeros(len(labels), 1, 8, 8), {"pathology": target}, metas)


def shown(chosen: list[Batch]) -> list[set[tuple[str, str]]]:
    return [set(shown_classes(one, 0, TASKS)) for one in chosen]


def test_a_rare_class_late_in_the_validation_is_shown():
    images = ShownImages(TASKS, images=4)
    for _ in range(50):
        images.add(batch_of(1, 1, 1, 1))
    images.add(batch_of(1, 2, -1, 0))
    images.add(batch_of(1, 1))
    chosen = shown(images.chosen())
    assert len(chosen) == 4
    assert set().union(*chosen) == {("pathology", c) for c in CLASSES}


def test_more_images_are_shown_where_the_classes_need_them():
    many = {"finding": Task("finding", "classification", tuple("abcdefghijklmnop"))}
    images = ShownImages(many, images=2)
    for k in range(6):
        target = ClassificationTarget(torch.eye(16)[[k]], torch.tensor([True]))
        images.add(Batch(torch.zeros(1, 1, 8, 8), {"finding": target}, [Meta("x", "p")]))
    assert len(images.chosen()) == 6
    for k in range(16):
        target = ClassificationTarget(torch.eye(16)[[k]], torch.tensor([True]))
        images.add(Batch(torch.zeros(1, 1, 8, 8), {"finding": target}, [Meta("x", "p")]))
    assert len(images.chosen()) == MOST


def test_other_sites_fill_the_rest_of_the_picture():
    images = ShownImages(TASKS, images=4)
    images.add(batch_of(0, 1, 2, 0, 1, 2))
    images.add(batch_of(0, 0, site="b"))
    assert {one.meta[0].site for one in images.chosen()} == {"a", "b"}


def test_classes_of_boxes_and_masks_count():
    tasks = {
        "lesions": Task("lesions", "detection", ("mass", "calcification")),
        "organs": Task("organs", "segmentation", ("breast", "muscle")),
    }
    masks = torch.zeros(1, 2, 4, 4, dtype=torch.uint8)
    masks[0, 1, 0, 0] = 1
    targets = {
        "lesions": DetectionTarget([torch.zeros(1, 4)], [torch.tensor([1])], torch.tensor([True])),
        "organs": SegmentationTarget(masks, torch.tensor([True])),
    }
    batch = Batch(torch.zeros(1, 1, 4, 4), targets, [Meta("x", "p")])
    assert shown_classes(batch, 0, tasks) == {("lesions", "calcification"), ("organs", "muscle")}


def test_the_cases_of_a_report_show_every_class():
    benign = [Case(quality, n, ("benign",)) for n, quality in enumerate((0.1, 0.5, 0.9))]
    malignant = [Case(quality, 3 + n, ("malignant",)) for n, quality in enumerate((0.2, 0.3, 0.4))]
    cases = select_cases([*benign, *malignant], CLASSES)
    assert {name: case.position for name, case in cases.items()} == {
        "worst": 0, "median": 4, "best": 2,
    }, "the median is a malignant one: nothing to add"  # fmt: skip
    mostly_benign = [Case(quality, n, ("benign",)) for n, quality in enumerate((0.1, 0.5, 0.6, 0.7, 0.9))]
    cases = select_cases([*mostly_benign, Case(0.2, 7, ("malignant",))], CLASSES)
    assert {name: case.position for name, case in cases.items()} == {
        "worst": 0, "median": 1, "best": 4, "malignant, median": 7,
    }  # fmt: skip
