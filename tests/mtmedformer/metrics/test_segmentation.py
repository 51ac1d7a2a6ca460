"""Segmentation metrics against MONAI and torchmetrics."""

from __future__ import annotations

import math

import pytest
import torch
from monai.metrics import compute_hausdorff_distance, compute_iou
from monai.metrics.meandice import compute_dice
from torchmetrics.segmentation import DiceScore

from mtmedformer.batch import IGNORE, Meta, SegmentationTarget
from mtmedformer.metrics import SegmentationMetrics
from mtmedformer.metrics.segmentation import binarise

pytestmark = pytest.mark.filterwarnings("ignore:monai.metrics.utils get_mask_edges:FutureWarning")


def metas(n: int) -> list[Meta]:
    return [Meta(id=f"i{i}", patient=f"p{i}") for i in range(n)]


def blobs(n: int, classes: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    field = torch.rand(n, classes, 5, 5, generator=generator)
    return torch.nn.functional.interpolate(field, size=(32, 32), mode="bicubic").clamp(0, 1)


def values(metric: SegmentationMetrics) -> dict[str, float]:
    return {name: value.item() for name, value in metric.compute().items()}


def scored(probabilities, masks, present=None, **options) -> dict[str, float]:
    metric = SegmentationMetrics([f"c{k}" for k in range(masks.shape[1])], multi_label=True, **options)
    present = torch.ones(len(masks), dtype=torch.bool) if present is None else present
    metric.update(probabilities, SegmentationTarget(masks, present), metas(len(masks)))
    return values(metric)


def test_dice_iou_and_hd95_equal_monai_and_torchmetrics():
    probabilities, masks = blobs(6, 2, 0), (blobs(6, 2, 1) > 0.5).byte()
    got, found = scored(probabilities, masks), probabilities > 0.5
    assert got["dice"] == pytest.approx(compute_dice(found, masks).mean().item(), abs=1e-6)
    assert got["iou"] == pytest.approx(compute_iou(found, masks).mean().item(), abs=1e-6)
    expected = compute_hausdorff_distance(found, masks, include_background=True, percentile=95)
    assert got["hd95"] == pytest.approx(expected.mean().item(), abs=1e-5)
    assert got["hd95/c1"] == pytest.approx(expected[:, 1].mean().item(), abs=1e-5)
    theirs = DiceScore(2, average="none", input_format="one-hot", aggregation_level="samplewise")
    theirs.update(found.int(), masks.int())
    assert [got["dice/c0"], got["dice/c1"]] == pytest.approx(theirs.compute().tolist(), abs=1e-5)


def test_a_missed_structure_scores_zero_and_a_false_alarm_lowers_empty_correct():
    masks = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    masks[0, 0, 2:6, 2:6] = 1
    found = torch.zeros(3, 1, 8, 8)
    found[1, 0, 0, 0] = 1  # image 0: missed; 1: false alarm; 2: rightly empty
    got = scored(found, masks)
    assert got["dice"] == 0
    assert got["iou"] == 0
    assert got["empty_correct"] == 0.5
    assert math.isnan(got["hd95"])


def test_only_empty_masks_have_no_dice():
    got = scored(torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    assert math.isnan(got["dice"])
    assert got["empty_correct"] == 1


def test_unannotated_pixels_classes_and_images_change_nothing():
    probabilities, masks = blobs(4, 2, 2), (blobs(4, 2, 3) > 0.5).byte()
    masks[:, :, :, 20:] = 0
    probabilities[:, :, :, 20:] = 0
    expected = scored(probabilities, masks)
    noisy, partial = probabilities.clone(), masks.clone()
    noisy[:, :, :, 20:], partial[:, :, :, 20:] = 1, IGNORE
    noisy, partial = torch.cat([noisy, blobs(2, 2, 4)]), torch.cat([partial, (blobs(2, 2, 5) > 0.5).byte()])
    partial[4] = IGNORE
    got = scored(noisy, partial, torch.tensor([True] * 5 + [False]))
    assert got == pytest.approx(expected, nan_ok=True)


def test_a_class_without_annotation_is_nan_and_left_out():
    masks = (blobs(3, 2, 6) > 0.5).byte()
    masks[:, 1] = IGNORE
    got = scored(blobs(3, 2, 7), masks)
    assert all(math.isnan(got[f"{name}/c1"]) for name in ("dice", "iou", "hd95", "empty_correct"))
    assert got["dice"] == got["dice/c0"]


def test_single_label_pixels_go_to_the_most_probable_of_classes_and_background():
    probabilities = torch.tensor([[0.4, 0.3, 0.1, 0.5], [0.3, 0.3, 0.2, 0.5]])[None, :, None]  # (1, 2, 1, 4)
    masks = binarise(probabilities, multi_label=False, threshold=0.5)
    # background keeps 0.3, 0.4, 0.7 and 0: it wins the second and third pixel; the last is a tie of the classes
    assert masks[0, :, 0].tolist() == [[True, False, False, True], [False, False, False, False]]
    assert not (masks.sum(1) > 1).any()


def test_hd95_can_be_left_out():
    got = scored(blobs(2, 1, 0), (blobs(2, 1, 1) > 0.5).byte(), hausdorff=False)
    assert set(got) == {f"{name}{c}" for name in ("dice", "iou", "empty_correct") for c in ("", "/c0")}
