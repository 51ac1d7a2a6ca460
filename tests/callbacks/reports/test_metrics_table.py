"""Printed tables, and predictions mapped back to original pixels."""

import math

import numpy as np
import pytest

from callbacks.reports.metrics_table import print_metrics
from datamodules.images.presets import BreastPreset, PlainPreset
from mtmedformer.batch import Meta
from mtmedformer.geometry import boxes_in_original, mask_in_original, warp

VALUES = {
    "test/lungs/dice": 0.91,
    "test/lungs/dice_ci_low": 0.88,
    "test/lungs/dice_ci_high": 0.93,
    "test/lungs/dice/lung": 0.91,
    "test/lungs/dice/site=north": 0.95,
    "test/lungs/n_images/site=north": 12,
    "test/lungs/dice/site=south": 0.85,
    "test/lungs/n_images/site=south": 7,
    "test/lungs/dice/view=PA": 0.91,
    "test/lungs/hd95": math.nan,
    "test/score": 0.91,
}


def test_table_fits_a_terminal_and_shows_unknown_values(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    print_metrics(VALUES, "test", "Test")
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    for word in ("lungs", "0.910", "0.880 to 0.930", "site north", "12", "–", "score"):
        assert word in out
    assert "nan" not in out
    assert "view PA" not in out, "a single view is not compared"


def meta(frame, shape):
    return Meta("im", "p", to_original=tuple(frame.to_original), original_size=shape)


@pytest.mark.parametrize(
    "preset", [PlainPreset(), BreastPreset(crop=False, flip_to="L")], ids=lambda p: type(p).__name__
)
def test_masks_and_boxes_return_to_their_original_position(preset):
    height, width = 120, 90
    image = np.zeros((height, width), np.float32)
    image[:, 45:] = 0.4  # a breast against the right edge, so that a flip happens
    mask = np.zeros((height, width), np.uint8)
    mask[30:70, 50:80] = 1
    frame = preset.frame(image, (160, 160), "R")
    inside = warp(mask.astype(np.float32), frame)
    back = mask_in_original(inside, meta(frame, (height, width))) > 0
    assert (back & (mask > 0)).sum() / (back | (mask > 0)).sum() > 0.95
    rows, columns = np.nonzero(inside >= 0.5)
    box = np.array([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]])
    np.testing.assert_allclose(boxes_in_original(box, meta(frame, (height, width))), [[50, 30, 80, 70]], atol=1.0)


def test_boxes_outside_the_image_are_clipped_to_it():
    boxes = boxes_in_original(np.array([[-5.0, -5.0, 500.0, 10.0]]), Meta("im", "p", original_size=(20, 30)))
    np.testing.assert_array_equal(boxes, [[0, 0, 30, 10]])


def test_table_by_site_has_no_column_of_unknown_counts(capsys):
    known = {"val/lungs/dice": 0.8, "val/lungs/dice/site=a": 0.9, "val/lungs/dice/site=b": 0.7}
    print_metrics(known, "val", "Validation")
    out = capsys.readouterr().out
    assert "site a" in out
    assert "images" not in out
    assert "nan" not in out
    print_metrics(known | {"val/lungs/n_images/site=a": 3.0}, "val", "Validation")
    assert "images" in capsys.readouterr().out


def test_task_without_labels_has_a_line_and_no_table(capsys):
    print_metrics({**VALUES, "test/lesions/n_images": 0, "test/lesions/map50": math.nan}, "test", "Test")
    out = capsys.readouterr().out
    assert "lesions: no image has a label for it" in out
    assert "map50" not in out
    assert "dice" in out
