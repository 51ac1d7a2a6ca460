"""From a batch's predictions to what is found in an original image, and its picture."""

import math

import numpy as np
import pytest
import torch

from datamodules.images.presets import BreastPreset
from mtmedformer.batch import Meta, Task
from mtmedformer.geometry import boxes_in_original, letterbox, mask_in_original, warp
from mtmedformer.inference.results import FoundBox, ImageResult, entropies, image_result
from mtmedformer.plots.predictions import LONGEST, prediction_figure, preview_from_input, preview_of
from mtmedformer.storage.hashing import file_digest, weights_digest

TASKS = {
    "kind": Task("kind", "classification", ("a", "b", "c", "d")),
    "signs": Task("signs", "classification", ("x", "y"), multi_label=True),
    "organ": Task("organ", "segmentation", ("lung", "heart")),
    "spots": Task("spots", "detection", ("nodule", "mass")),
}


def meta(size=(40, 20), frame=None) -> Meta:
    frame = frame or letterbox((0, 0, size[1], size[0]), (20, 20))
    return Meta("im", "p", to_original=frame.to_original, original_size=size, spacing=(0.5, 0.5), laterality="R")


def predictions() -> dict:
    masks = torch.zeros(1, 2, 20, 20)
    masks[0, 0, 4:10, 6:12] = 1
    boxes = {
        "boxes": torch.tensor([[5.0, 0, 10, 10], [6, 4, 8, 6], [-3, 0, 30, 30]]),
        "scores": torch.tensor([0.3, 0.8, 0.01]),
        "labels": torch.tensor([0, 1, 0]),
    }
    return {
        "kind": torch.full((1, 4), 0.25),
        "signs": torch.tensor([[0.5, 1.0]]),
        "organ": masks,
        "spots": [boxes],
        "uncertainty": {"kind": {"mutual_information": torch.tensor([0.125])}, "spots": {"spread": [0.5]}},
    }


def test_results_are_in_the_original_frame():
    found = image_result(predictions(), 0, meta(), TASKS)
    assert found.classes["signs"] == {"x": 0.5, "y": 1.0}
    mask = np.zeros((40, 20), np.uint8)
    mask[8:20, 2:14] = 1  # twice the input's size, less the letterbox's 5 columns
    np.testing.assert_array_equal(found.masks["organ"]["lung"], mask)
    assert not found.masks["organ"]["heart"].any()
    assert [(b.name, round(b.score, 2), b.xyxy) for b in found.boxes["spots"]] == [
        ("mass", 0.8, (2.0, 8.0, 6.0, 12.0)),
        ("nodule", 0.3, (0.0, 0.0, 10.0, 20.0)),
    ]
    assert found.uncertainty["kind"]["mutual_information"] == 0.125
    assert found.uncertainty["spots"] == {"spread": 0.5}


def test_entropies():
    found = entropies(predictions(), 0, meta(), TASKS)
    assert found["kind"]["entropy"] == pytest.approx(math.log(4))
    assert found["signs"]["entropy"] == pytest.approx(math.log(2) / 2)
    assert found["organ"]["entropy"] == 0
    assert "spots" not in found
    unsure = predictions()
    unsure["organ"][:, :, :, :5] = 0.5  # the letterbox's empty border, which is no part of the image
    assert entropies(unsure, 0, meta(), TASKS)["organ"]["entropy"] == 0
    unsure["organ"][:] = 0.5
    assert entropies(unsure, 0, meta(), TASKS)["organ"]["entropy"] == pytest.approx(math.log(2))


@pytest.mark.parametrize("side", ["L", "R"])
@pytest.mark.parametrize("size", [(1111, 700), (1300, 1300)])
def test_masks_mapped_back_in_blocks_equal_those_mapped_at_once(size, side):
    film = np.zeros(size, np.float32)
    film[100:-100, : size[1] // 2] = 0.4
    film = film if side == "L" else film[:, ::-1].copy()
    frame = BreastPreset().frame(film, (160, 128), side)
    rows, columns = np.mgrid[: size[0], : size[1]]
    centre = 0.2 * size[1] if side == "L" else 0.8 * size[1]
    disc = ((rows - 600) ** 2 + (columns - centre) ** 2 < 120**2).astype(np.uint8)
    back = mask_in_original(warp(disc.astype(np.float32), frame), meta(size, frame))
    assert back.dtype == np.uint8
    assert (back & disc).sum() / (back | disc).sum() > 0.97
    middle = np.argwhere(back).mean(axis=0)
    np.testing.assert_allclose(middle, np.argwhere(disc).mean(axis=0), atol=0.5)


def test_mirrored_boxes_are_mapped_back_exactly():
    frame = letterbox((0, 0, 20, 40), (20, 20), flip=True)
    there = boxes_in_original(np.array([[5.0, 0, 10, 10]]), meta(frame=frame))
    np.testing.assert_allclose(there, [[10, 0, 20, 20]])


def test_a_picture_shows_the_original_with_names_of_tasks_and_classes():
    found = image_result(predictions(), 0, meta(), TASKS)
    image = np.random.default_rng(0).random((40, 20)).astype(np.float32)
    figure = prediction_figure(
        preview_of(image), found, TASKS, {("spots", "nodule"): 0.4, ("spots", "mass"): 0.4}, "me"
    )
    for axis in figure.axes:
        np.testing.assert_array_equal(axis.images[0].get_array(), image)
        assert axis.get_ylim() == (40, 0)
    outlines = [patch for patch in figure.axes[1].patches if patch.get_alpha() is None]  # without the dark border
    assert len(outlines) == 1, "a box below its threshold is not drawn"
    said = [text.get_text() for text in (*figure.texts, *figure.axes[1].texts, *figure.legends[0].get_texts())]
    said += [axis.get_title(loc="left") for axis in figure.axes]
    for words in ("Research use only · me", "R · 20 × 40 px", "spots: 1 mass", "0.80", "organ: lung", "lung 0.36 cm²"):
        assert any(words in one for one in said), words


def test_a_large_image_is_shown_reduced_and_whole():
    film = np.zeros((3000, 2000), np.float32)
    film[:, :1000] = 1
    small = preview_of(film)
    assert small.shape == (LONGEST, 933)
    assert small.mean() == pytest.approx(0.5, abs=1e-3)
    frame = letterbox((0, 0, 2000, 3000), (128, 128))
    same = preview_from_input(warp(film, frame), meta((3000, 2000), frame))
    assert same.shape == small.shape
    assert np.abs(same - small).mean() < 0.02


def test_a_result_without_findings_is_drawn():
    tasks = {"spots": TASKS["spots"]}
    found = ImageResult(meta(), boxes={"spots": [FoundBox("mass", 0.1, (0, 0, 5, 5))]})
    figure = prediction_figure(
        np.zeros((40, 20), np.float32), found, tasks, {("spots", "mass"): 0.4, ("spots", "nodule"): 0.4}
    )
    assert any("spots: none" in text.get_text() for text in figure.texts)


def test_digests_distinguish_weights_and_files(tmp_path):
    layer = torch.nn.Linear(3, 2)
    state = layer.state_dict()
    same = {name: value.clone() for name, value in reversed(state.items())} | {"loss.weight": torch.ones(1)}
    assert weights_digest(state) == weights_digest(same)
    same["bias"][0] += 1e-6
    assert weights_digest(state) != weights_digest(same)
    assert weights_digest({"a": torch.zeros(4)}) != weights_digest({"a": torch.zeros(2, 2)})
    assert weights_digest({"a": torch.tensor(1.0, dtype=torch.bfloat16)})
    (tmp_path / "a").write_bytes(b"abc")
    assert file_digest(tmp_path / "a") == "ba7816bf8f01cfea"
