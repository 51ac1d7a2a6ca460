"""Referral: the Dice of what is kept, against sorting by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mtmedformer.batch import Meta, SegmentationTarget, Task
from mtmedformer.metrics.referral import ReferralMetrics, mask_uncertainty
from mtmedformer.metrics.rows import load_rows, save_rows

LUNGS = Task("lungs", "segmentation", ("lung",))


def filled(size: int = 10, seed: int = 0) -> tuple[ReferralMetrics, np.ndarray, np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    p = torch.rand(size, 1, 8, 8, generator=generator) ** torch.linspace(0.2, 3, size)[:, None, None, None]
    truth = torch.rand(size, 1, 8, 8, generator=generator) > 0.5
    metric = ReferralMetrics(LUNGS)
    metas = [Meta(id=f"i{i}", patient=f"p{i}") for i in range(size)]
    metric.update(p, SegmentationTarget(truth.to(torch.uint8), torch.ones(size, dtype=torch.bool)), metas)
    found = p > 0.5
    dice = 2 * (found & truth).sum((1, 2, 3)).double() / (found.sum((1, 2, 3)) + truth.sum((1, 2, 3)))
    return metric, dice.numpy(), mask_uncertainty(p, True).numpy()


def test_the_eight_most_certain_of_ten_images_are_kept():
    metric, dice, unsure = filled()
    values = {name: value.item() for name, value in metric.compute().items()}
    kept = dice[np.argsort(unsure)[:8]].mean()
    assert values["dice_at80"] == pytest.approx(kept, abs=1e-6)
    assert values["gain_at80"] == pytest.approx(kept - dice.mean(), abs=1e-6)


def test_the_area_is_the_mean_risk_over_coverages():
    metric, dice, unsure = filled()
    risks = np.cumsum(1 - dice[np.argsort(unsure)]) / np.arange(1, 11)
    assert metric.compute()["aurc"].item() == pytest.approx(risks.mean(), abs=1e-6)


def test_a_weight_of_two_equals_the_image_twice():
    metric, dice, unsure = filled(5)
    weights = np.array([[2.0, 1, 0, 1, 1]])
    values = metric.prepare(metric.seen().rows)(weights[:, metric.seen().rows])
    twice = np.repeat(np.arange(5), weights[0].astype(int))
    ranked = twice[np.argsort(unsure[twice], kind="stable")]
    assert values["dice_at80"][0] == pytest.approx(dice[ranked[:4]].mean(), abs=1e-6)


def test_uncertainty_is_lowest_for_certain_pixels_and_highest_at_one_half():
    sure, half = torch.zeros(1, 1, 4, 4), torch.full((1, 1, 4, 4), 0.5)
    sure[..., :2] = 1
    assert mask_uncertainty(sure, True).item() == 0
    assert mask_uncertainty(half, True).item() == pytest.approx(2 * math.log(2))
    exclusive = torch.full((1, 2, 4, 4), 1 / 3)
    assert mask_uncertainty(exclusive, False).item() == pytest.approx(math.log(3) * 1.5)


def test_an_image_without_the_structure_is_left_out():
    metric = ReferralMetrics(LUNGS)
    masks = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    masks[0, :, :2] = 1
    present = torch.ones(2, dtype=torch.bool)
    metric.update(masks.float(), SegmentationTarget(masks, present), [Meta(id=i, patient=i) for i in "ab"])
    assert metric.compute()["dice_at80"].item() == 1
    empty = ReferralMetrics(LUNGS)
    empty.update(masks[1:].float(), SegmentationTarget(masks[1:], present[1:]), [Meta(id="b", patient="b")])
    assert math.isnan(empty.compute()["dice_at80"].item())


def test_rows_are_read_back_from_disk(tmp_path):
    metric, _, _ = filled()
    save_rows({"lungs~referral": metric}, tmp_path / "rows.npz", "")
    rows = load_rows([tmp_path / "rows.npz"])["lungs~referral"]
    once = np.ones((1, len(rows.rows)))
    assert rows.evaluate()(once)["aurc"][0] == pytest.approx(metric.compute()["aurc"].item())
