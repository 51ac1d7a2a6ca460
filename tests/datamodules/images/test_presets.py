from __future__ import annotations

import json
import math
import random

import cv2
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from datamodules.images.breast_region import breast_region, breast_side
from datamodules.images.presets import BreastPreset, ChestPreset, PlainPreset
from mtmedformer.batch import IGNORE
from mtmedformer.geometry import (
    IDENTITY,
    Frame,
    boxes_to_frame,
    boxes_to_original,
    clip_boxes,
    compose,
    invert,
    letterbox,
    map_boxes,
    map_points,
    warp,
    warp_mask,
)
from tests.fixtures.real_data import real

NO_BOXES = np.zeros((0, 4), np.float32)
NO_LABELS = np.zeros(0, np.int64)
NO_MASKS = np.zeros((0, 96, 96), np.uint8)
PRESETS = [
    PlainPreset(),
    ChestPreset(noise=0.05, blur=1.0),
    ChestPreset(horizontal_flip=0.5),
    BreastPreset(),
    BreastPreset(flip_to=None, crop=False, noise=0.02),
]

size = st.integers(8, 200)
number = st.floats(-300, 300)
boxes_of = st.lists(st.tuples(number, number, st.floats(0.1, 200), st.floats(0.1, 200)), max_size=5).map(
    lambda rows: np.array([(x, y, x + w, y + h) for x, y, w, h in rows], np.float64).reshape(-1, 4)
)


def ellipse(size=(96, 96), centre=(55, 40), radii=(14, 9)):
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    inside = ((x - centre[0]) / radii[0]) ** 2 + ((y - centre[1]) / radii[1]) ** 2 <= 1
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    return inside, np.array([[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]], np.float32)


def breast(height=300, width=220, side="L", noise=0.01, seed=0):
    """Half an ellipse on the chest-wall side of a dark film, skin line faint."""
    y, x = np.mgrid[:height, :width] + 0.5
    depth = 1 - np.hypot(x / (0.62 * width), (y - 0.5 * height) / (0.38 * height))
    film = np.where(depth > 0, 0.15 + 0.6 * np.clip(depth, 0, 1), 0.02)
    film = film + np.random.default_rng(seed).normal(0, noise, film.shape)
    film, inside = np.clip(film, 0, 1).astype(np.float32), depth > 0
    return (film, inside) if side == "L" else (film[:, ::-1].copy(), inside[:, ::-1].copy())


# frames


@given(size, size, size, size, st.booleans(), st.floats(0, 1), boxes_of)
def test_boxes_map_back_through_any_letterbox(h, w, height, width, flip, align, boxes):
    frame = letterbox((0, 0, w, h), (height, width), flip, align)
    there = boxes_to_frame(boxes, frame)
    assert (there[:, 2:] >= there[:, :2]).all()
    np.testing.assert_allclose(boxes_to_original(there, frame), boxes, atol=1e-6)
    corners = map_points(invert(frame.to_original), np.array([(0, 0), (w, h)]))
    assert corners.min() > -1e-6
    assert (corners <= np.array([width, height]) + 1e-6).all()
    used = np.abs(corners[1] - corners[0]) / (width, height)
    assert used.max() == pytest.approx(1)  # one side is used to the full


@given(st.lists(st.floats(-3, 3), min_size=6, max_size=6), st.lists(st.tuples(number, number), min_size=1, max_size=5))
def test_invert_and_compose_undo_each_other(values, points):
    a, b, _, d, e, _ = values
    if abs(a * e - b * d) < 0.1:
        return
    there = map_points(tuple(values), np.array(points))
    np.testing.assert_allclose(map_points(invert(tuple(values)), there), points, atol=1e-5)
    np.testing.assert_allclose(compose(invert(tuple(values)), tuple(values)), IDENTITY, atol=1e-6)


def test_compose_applies_the_inner_one_first():
    double, shift = (2.0, 0.0, 0.0, 0.0, 2.0, 0.0), (1.0, 0.0, 5.0, 0.0, 1.0, 0.0)
    assert map_points(compose(double, shift), np.array([[1.0, 1.0]])).tolist() == [[12.0, 2.0]]


@given(boxes_of)
def test_mapping_boxes_under_flips_equals_mapping_corners(boxes):
    for affine in [(-1.0, 0.0, 50.0, 0.0, 2.0, 3.0), (0.5, 0.0, 0.0, 0.0, -0.5, 9.0), (0.0, 1.0, 0.0, -1.0, 0.0, 7.0)]:
        corners = np.stack([map_points(affine, boxes[:, :2]), map_points(affine, boxes[:, 2:])])
        np.testing.assert_allclose(map_boxes(affine, boxes), np.hstack([corners.min(0), corners.max(0)]), atol=1e-9)


def test_box_of_a_rotated_disc_does_not_grow():
    turned = math.cos(0.5), -math.sin(0.5), 0.0, math.sin(0.5), math.cos(0.5), 0.0
    box = map_boxes(turned, np.array([[10.0, 10.0, 30.0, 30.0]]))
    np.testing.assert_allclose(box[:, 2:] - box[:, :2], 20.0)


# pixels


def test_shrinking_by_a_whole_factor_is_the_block_mean():
    image = np.random.default_rng(0).random((48, 64)).astype(np.float32)
    out = warp(image, letterbox((0, 0, 64, 48), (12, 16)))
    np.testing.assert_allclose(out, image.reshape(12, 4, 16, 4).mean((1, 3)), atol=1e-6)
    np.testing.assert_allclose(out, cv2.resize(image, (16, 12), interpolation=cv2.INTER_AREA), atol=1e-6)


def test_shrinking_by_a_fraction_agrees_with_opencv_area():
    image = np.random.default_rng(0).random((50, 70)).astype(np.float32)
    out = warp(image, Frame((70 / 31, 0.0, 0.0, 0.0, 50 / 23, 0.0), (23, 31)))
    np.testing.assert_allclose(out, cv2.resize(image, (31, 23), interpolation=cv2.INTER_AREA), atol=1e-5)


def test_enlarging_agrees_with_opencv_linear():
    image = np.random.default_rng(0).random((10, 12)).astype(np.float32)
    out = warp(image, Frame((12 / 36, 0.0, 0.0, 0.0, 10 / 30, 0.0), (30, 36)))
    np.testing.assert_allclose(out, cv2.resize(image, (36, 30), interpolation=cv2.INTER_LINEAR), atol=1e-5)


def test_flip_and_identity_are_exact_and_padding_is_zero():
    image = np.random.default_rng(0).random((20, 30)).astype(np.float32)
    assert (warp(image, Frame(IDENTITY, (20, 30))) == image).all()
    assert (warp(image, letterbox((0, 0, 30, 20), (20, 30), flip=True)) == image[:, ::-1]).all()
    boxed = warp(image, letterbox((0, 0, 30, 20), (30, 30)))
    assert (boxed[5:25] == image).all()
    assert (boxed[:5] == 0).all()
    assert (boxed[25:] == 0).all()


def test_rotated_warp_agrees_with_straight_warp_at_no_rotation():
    image = cv2.GaussianBlur(np.random.default_rng(0).random((40, 40)).astype(np.float32), (0, 0), 2)
    straight = warp(image, Frame((0.8, 0.0, 3.3, 0.0, 0.8, 1.7), (32, 32)))
    tilted = warp(image, Frame((0.8, 1e-9, 3.3, 1e-9, 0.8, 1.7), (32, 32)))
    np.testing.assert_allclose(tilted, straight, atol=5e-3)  # OpenCV places samples at 1/32 pixel


def test_thin_lines_keep_their_mean_under_shrinking():
    image = np.zeros((256, 256), np.float32)
    image[:, ::9] = 1
    for frame in (letterbox((0, 0, 256, 256), (32, 32)), Frame((7.9, 0.8, 0.0, -0.8, 7.9, 0.0), (30, 30))):
        inner = warp(image, frame)[6:-6, 6:-6]
        assert inner.mean() == pytest.approx(1 / 9, abs=0.01)
        assert inner.max() < 0.3  # aliasing would leave lines of 1


@given(st.integers(0, 2**31), st.booleans())
@settings(max_examples=30)
def test_masks_keep_their_values_and_their_boxes(seed, flip):
    rng = np.random.default_rng(seed)
    mask = rng.choice(np.array([0, 1, IGNORE], np.uint8), size=(12, 16)).repeat(4, 0).repeat(4, 1)
    frame = letterbox((0, 0, 64, 48), (int(rng.integers(20, 80)), int(rng.integers(20, 80))), flip)
    assert set(np.unique(warp_mask(mask, frame))) <= {0, 1, IGNORE}
    assert set(np.unique(warp(mask, frame, nearest=True))) <= {0, 1, IGNORE}
    assert warp(mask, frame, nearest=True).dtype == np.uint8


def test_a_tiny_lesion_keeps_a_pixel_and_an_empty_mask_stays_empty():
    mask = np.zeros((256, 256), np.uint8)
    frame = letterbox((0, 0, 256, 256), (32, 32))
    assert warp_mask(mask, frame).sum() == 0
    mask[100:102, 40:42] = 1
    small = warp_mask(mask, frame)
    assert small.sum() == 1
    assert small[12, 5] == 1


def test_an_unannotated_mask_stays_unannotated_in_the_padding_too():
    unknown = np.full((40, 20), IGNORE, np.uint8)
    assert (warp_mask(unknown, letterbox((0, 0, 20, 40), (32, 32))) == IGNORE).all()
    preset, rng = ChestPreset(shift=0.3), np.random.default_rng(1)
    masks = np.stack([np.full((96, 96), IGNORE, np.uint8), np.zeros((96, 96), np.uint8)])
    moved = preset.augment(np.ones((96, 96), np.float32), masks, NO_BOXES, NO_LABELS, rng)
    assert (moved.masks[0] == IGNORE).all()
    assert (moved.masks[1] == 0).all()
    assert (moved.image == 0).any()  # some outside did come in


def test_clip_boxes_clips_drops_and_counts():
    boxes = np.array(
        [
            [10, 10, 20, 20],  # inside
            [-10, 30, 10, 40],  # half in
            [-95, 30, 5, 40],  # a twentieth in
            [200, 10, 220, 20],  # outside
            [30, 30, 31, 60],  # too thin
            [50, 50, 40, 60],  # inverted
            [np.nan, 1, 5, 5],
        ],
        np.float32,
    )
    kept, labels, dropped = clip_boxes(boxes, np.arange(7), (100, 100), min_side=2, min_visible=0.25)
    assert kept.tolist() == [[10, 10, 20, 20], [0, 30, 10, 40]]
    assert labels.tolist() == [0, 1]
    assert dropped == 5


# presets


@pytest.mark.parametrize("preset", PRESETS)
def test_the_lesion_stays_under_its_mask_and_box(preset):
    inside, box = ellipse()
    image = np.where(inside, 0.9, 0.2).astype(np.float32)
    masks = np.stack([inside, ~inside]).astype(np.uint8)
    for seed in range(40):
        out = preset.augment(image, masks, box, np.array([3]), np.random.default_rng(seed))
        assert out.image.dtype == np.float32
        assert out.image.shape == image.shape
        assert 0 <= out.image.min() <= out.image.max() <= 1
        assert out.labels.tolist() == [3]
        assert out.dropped == 0
        rows, columns = np.flatnonzero(out.masks[0].any(1)), np.flatnonzero(out.masks[0].any(0))
        tight = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        np.testing.assert_allclose(out.boxes[0], tight, atol=2.1)
        if getattr(preset, "exposure", None) is None or not preset.exposure.active:
            bright = out.image > 0.55
        else:
            smooth = cv2.GaussianBlur(out.image, (0, 0), 1.5)
            bright = smooth > (smooth[out.masks[0] == 1].mean() + smooth[out.masks[1] == 1].mean()) / 2
        both = (bright & (out.masks[0] == 1)).sum()
        assert 2 * both / (bright.sum() + (out.masks[0] == 1).sum()) > 0.93
        back = map_boxes(out.to_input, out.boxes)
        np.testing.assert_allclose((back[:, :2] + back[:, 2:]) / 2, (box[:, :2] + box[:, 2:]) / 2, atol=1e-3)


def test_points_map_back_through_augmentation_and_frame():
    film, _ = breast(side="R")
    preset = BreastPreset()
    frame = preset.frame(film, (96, 96), "R")
    point = np.array([[150.0, 120.0]])
    out = preset.augment(warp(film, frame), NO_MASKS, NO_BOXES, NO_LABELS, np.random.default_rng(3))
    in_input = map_points(invert(frame.to_original), point)
    in_augmented = map_points(invert(out.to_input), in_input)
    np.testing.assert_allclose(map_points(compose(frame.to_original, out.to_input), in_augmented), point, atol=1e-6)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_generator_alone_decides(preset):
    inside, box = ellipse()
    image = np.where(inside, 0.9, 0.2).astype(np.float32)

    def run(seed):
        return preset.augment(image, inside[None].astype(np.uint8), box, np.array([0]), np.random.default_rng(seed))

    first = run(7)
    run(8)
    np.random.seed(0)
    random.seed(0)
    again = run(7)
    assert (first.image == again.image).all()
    assert (first.masks == again.masks).all()
    assert (first.boxes == again.boxes).all()
    assert first.to_input == again.to_input
    if not isinstance(preset, PlainPreset):
        assert not (run(9).image == first.image).all()


def test_inputs_are_left_untouched():
    inside, box = ellipse()
    image, masks = np.where(inside, 0.9, 0.2).astype(np.float32), inside[None].astype(np.uint8)
    copies = image.copy(), masks.copy(), box.copy()
    ChestPreset(noise=0.1, blur=1).augment(image, masks, box, np.array([0]), np.random.default_rng(0))
    assert (image == copies[0]).all()
    assert (masks == copies[1]).all()
    assert (box == copies[2]).all()


def test_a_chest_is_never_upside_down_nor_mirrored_by_default():
    for seed in range(200):
        a, _, _, _, e, _ = ChestPreset().movement.sample((64, 64), np.random.default_rng(seed))
        assert e > 0
        assert a > 0
    mirrored = [
        ChestPreset(horizontal_flip=0.5).movement.sample((64, 64), np.random.default_rng(s)) for s in range(200)
    ]
    assert 60 < sum(m[0] < 0 for m in mirrored) < 140
    assert all(m[4] > 0 for m in mirrored)


def test_breasts_are_turned_upside_down_but_mirrored_only_without_a_side():
    def draws(preset):
        return [preset.movement.sample((64, 64), np.random.default_rng(s)) for s in range(200)]

    sided, free = draws(BreastPreset()), draws(BreastPreset(flip_to=None))
    assert 60 < sum(m[4] < 0 for m in sided) < 140
    assert all(m[0] > 0 for m in sided)
    assert 60 < sum(m[0] < 0 for m in free) < 140


def test_a_lesion_that_leaves_the_image_is_dropped_and_counted():
    preset = ChestPreset(rotation=0, zoom=0, shift=0.4, brightness=0, contrast=0, gamma=0)
    corner = np.array([[0, 0, 6, 6], [40, 40, 56, 56], [1, 1, np.nan, 3]], np.float32)
    counts = []
    for seed in range(40):
        out = preset.augment(np.ones((96, 96), np.float32), NO_MASKS, corner, np.arange(3), np.random.default_rng(seed))
        assert len(out.boxes) + out.dropped == 3
        assert out.boxes.min() >= 0
        assert out.boxes.max() <= 96
        assert len(out.labels) == len(out.boxes)
        assert 2 not in out.labels
        counts.append(out.dropped)
    assert {1, 2} <= set(counts)


def test_padding_stays_black():
    image = warp(np.full((96, 40), 0.5, np.float32), letterbox((0, 0, 40, 96), (96, 96)))
    preset = ChestPreset(rotation=0, zoom=0, shift=0, brightness=0.5, noise=0.2, blur=2)
    for seed in range(10):
        out = preset.augment(image, NO_MASKS, NO_BOXES, NO_LABELS, np.random.default_rng(seed))
        assert (out.image[image == 0] == 0).all()
        assert out.image[image > 0].mean() > 0.1


# the breast


@pytest.mark.parametrize("side", ["L", "R"])
@pytest.mark.parametrize("size", [(96, 96), (128, 64)])
def test_breast_crop_holds_the_breast_and_leaves_out_labels_and_rims(side, size):
    film, inside = breast(side=side)
    film[5:25, 170:205] = film[5:25, 15:50] = 1.0  # a lead label on either side
    film[:2] = film[-2:] = 0.95  # bright scanner rims
    film[:, :2] = film[:, -2:] = 0.95
    frame = BreastPreset().frame(film, size, side)
    kept = warp(inside.astype(np.float32), frame).sum() * abs(frame.to_original[0] * frame.to_original[4])
    assert kept > 0.99 * inside.sum()
    region, scale = breast_region(film)
    assert breast_side(region) == side
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    x0, x1 = sorted(map_points(frame.to_original, np.array([(0, 0), (size[1], 0)]))[:, 0])
    if size == (96, 96):  # the crop is taller than wide: width has room to spare, at the far side
        assert frame.to_original[4] * 96 == pytest.approx(rows[-1] + 1 - rows[0] + 2 * 0.03 * 300, abs=8 * scale)
    wall = columns[0] if side == "L" else columns[-1] + 1
    assert abs((x0 if side == "L" else x1) - wall) < 10
    assert (frame.to_original[0] < 0) == (side == "R")


def test_pixels_overrule_a_wrong_side_and_undecided_pixels_leave_it():
    film, _ = breast(side="R")
    assert BreastPreset(flip_to="L").frame(film, (64, 64), "L").to_original[0] < 0
    assert BreastPreset(flip_to="R").frame(film, (64, 64), "L").to_original[0] > 0
    blank = np.full((60, 60), 0.5, np.float32)
    assert BreastPreset(flip_to="L").frame(blank, (64, 64), "R").to_original[0] < 0
    assert BreastPreset(flip_to="L").frame(blank, (64, 64), None).to_original[0] > 0
    assert BreastPreset(flip_to=None).frame(film, (64, 64), "R").to_original[0] > 0


@pytest.mark.parametrize("shape", [(1, 1), (3, 400), (5, 5)])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_degenerate_films_get_a_frame(shape, value):
    frame = BreastPreset().frame(np.full(shape, value, np.float32), (32, 32), None)
    assert np.isfinite(frame.to_original).all()


def test_breast_crop_on_real_films():
    root = real("mini_mias")
    table = pd.read_csv(root / "labels.csv", dtype=str)
    preset, sides, kept, lost = BreastPreset(), [], [], 0
    for row in table.iloc[::4].itertuples():
        film = np.asarray(Image.open(root / row.image).convert("L"), np.float32) / 255
        mask = np.asarray(Image.open(root / row.mask_breast)) > 0
        frame = preset.frame(film, (256, 256), row.laterality)
        area = abs(frame.to_original[0] * frame.to_original[4])
        kept.append(warp(mask.astype(np.float32), frame).sum() * area / mask.sum())
        sides.append(frame.to_original[0] < 0)
        if row.boxes and isinstance(row.boxes, str):
            boxes = np.array(json.loads(row.boxes), np.float32).reshape(-1, 4)
            lost += clip_boxes(boxes_to_frame(boxes, frame), np.zeros(len(boxes)), (256, 256), 0.1, 0.9)[2]
    assert min(kept) > 0.95
    assert np.mean(kept) > 0.98
    flipped = np.array(sides) == (table.laterality.iloc[::4] == "R")
    assert flipped.mean() > 0.95  # two films of the set are stored mirrored, so pixels and label disagree there
    assert lost == 0
