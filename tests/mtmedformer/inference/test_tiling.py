"""Windows and mirrors change nothing where they should not, and agree with MONAI's sliding window."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.inferers import sliding_window_inference
from scipy import ndimage
from torch import Tensor, nn

from mtmedformer.batch import Task
from mtmedformer.errors import ConfigError
from mtmedformer.inference.tiling import average_boxes, mirror_boxes, place_windows, predict_tiled

TASKS = {
    "lungs": Task("lungs", "segmentation", ("left", "right"), multi_label=True),
    "lesions": Task("lesions", "detection", ("mass", "cyst")),
    "density": Task("density", "classification", ("a", "b", "c")),
    "signs": Task("signs", "classification", ("x", "y"), multi_label=True),
}


class Toy:
    """A model that moves with the image: a small convolution, bright blobs as boxes, and shares of brightness."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 2, 5, padding=2).requires_grad_(False)
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, image: Tensor) -> dict[str, Any]:
        self.shapes.append(tuple(image.shape))
        bright = image.mean(dim=(1, 2, 3))
        return {
            "lungs": self.conv(image).sigmoid(),
            "lesions": [blobs(x[0]) for x in image],
            "density": torch.stack([bright, 1 - bright, torch.ones_like(bright)], dim=1) / 2,
            "signs": torch.stack([image.amax(dim=(1, 2, 3)), bright], dim=1),
        }


def blobs(image: Tensor) -> dict[str, Tensor]:
    """Return the boxes of what is brighter than 0.5: class 1 where brighter than 0.75; the score grows with area."""
    labelled, _ = ndimage.label(image.numpy() > 0.5)
    rows = []
    for i, (y, x) in enumerate(ndimage.find_objects(labelled)):
        area = int((labelled == i + 1).sum())
        kind = int(image[y, x].max() > 0.75)
        rows.append((area / (area + 50) - 1e-6 * x.start, [x.start, y.start, x.stop, y.stop], kind))
    rows.sort(reverse=True)
    return {
        "boxes": torch.tensor([r[1] for r in rows], dtype=torch.float32).reshape(-1, 4),
        "scores": torch.tensor([r[0] for r in rows], dtype=torch.float32),
        "labels": torch.tensor([r[2] for r in rows], dtype=torch.int64),
    }


def scene(height: int, width: int, seed: int = 0, side: int = 9) -> Tensor:
    """Draw separate rectangles no larger than ``side`` on a dim ground."""
    rng = np.random.default_rng(seed)
    image = 0.4 * rng.random((height, width))
    for y in range(2, height - side - 2, side + 4):
        for x in range(2, width - side - 2, side + 4):
            if rng.random() < 0.5:
                h, w = rng.integers(4, side + 1, 2)
                dy, dx = rng.integers(0, side + 1 - h), rng.integers(0, side + 1 - w)
                image[y + dy : y + dy + h, x + dx : x + dx + w] = 0.6 if rng.random() < 0.5 else 0.9
    return torch.tensor(image, dtype=torch.float32)[None]


def same_boxes(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    def rows(found: dict[str, Tensor]) -> list[list[float]]:
        return sorted(torch.cat([found["boxes"], found["labels"][:, None].float()], dim=1).tolist())

    assert len(a["boxes"]) == len(b["boxes"])
    assert np.allclose(rows(a), rows(b), atol=1e-4)


@pytest.mark.parametrize("size", [(32, 48), (30, 48), (32, 20), (9, 9)])
def test_an_image_that_fits_one_window_is_predicted_in_one_pass(size):
    image = torch.stack([scene(*size, seed=s) for s in range(2)])
    toy = Toy()
    expected, got = toy(image), predict_tiled(toy, image, TASKS, tile=(32, 48))
    assert torch.equal(got["lungs"], expected["lungs"])
    assert torch.equal(got["density"], expected["density"])
    for a, b in zip(got["lesions"], expected["lesions"], strict=True):
        assert all(torch.equal(a[name], b[name]) for name in b)


def test_masks_equal_monai_sliding_window():
    image, toy = torch.rand(2, 1, 68, 92), Toy()
    got = predict_tiled(toy, image, TASKS, tile=(32, 32), overlap=0.625)  # steps of 12, which divide 36 and 60 evenly
    expected = sliding_window_inference(
        image, (32, 32), 4, lambda x: toy(x)["lungs"], overlap=0.625, mode="gaussian", sigma_scale=0.125
    )
    assert torch.allclose(got["lungs"], expected, atol=4e-7)
    inner = toy(image)["lungs"]
    assert not torch.allclose(expected, inner, atol=1e-5)  # windows do matter to this model


@pytest.mark.parametrize("size", [(100, 70), (61, 128), (33, 33)])
@pytest.mark.parametrize("tile", [(32, 32), (48, 40)])
def test_tiles_find_the_boxes_of_the_whole_image_once(size, tile):
    image = torch.stack([scene(*size, seed=s) for s in range(2)])
    toy = Toy()
    expected = toy(image)["lesions"]
    got = predict_tiled(toy, image, TASKS, tile, overlap=0.5)["lesions"]
    for a, b in zip(got, expected, strict=True):
        assert len(b["boxes"]) > 0
        same_boxes(a, b)
        assert (a["scores"].diff() <= 0).all()


def test_masks_of_a_pixelwise_model_are_those_of_the_whole_image():
    image = torch.rand(1, 1, 77, 91)
    tasks = {"lungs": TASKS["lungs"]}
    got = predict_tiled(lambda x: {"lungs": torch.cat([x, x**2], dim=1)}, image, tasks, (32, 24))
    assert torch.allclose(got["lungs"], torch.cat([image, image**2], dim=1), atol=4e-7)


def test_neighbours_of_one_window_are_left_to_the_head():
    """Boxes that the head kept within a window overlap more than ``nms_iou`` and stay."""
    pair = {
        "boxes": torch.tensor([[8.0, 8.0, 16.0, 16.0], [9.0, 8.0, 17.0, 16.0]]),
        "scores": torch.tensor([0.9, 0.8]),
        "labels": torch.zeros(2, dtype=torch.int64),
    }
    nothing = {name: value[:0] for name, value in pair.items()}
    calls = iter([pair, nothing])
    tasks = {"lesions": TASKS["lesions"]}
    got = predict_tiled(lambda x: {"lesions": [next(calls) for _ in x]}, torch.zeros(1, 1, 32, 48), tasks, (32, 32))
    assert got["lesions"][0]["boxes"].tolist() == pair["boxes"].tolist()


def test_of_two_boxes_of_one_object_the_better_one_is_kept():
    one = {"boxes": torch.tensor([[20.0, 8.0, 28.0, 16.0]]), "scores": torch.tensor([0.6]), "labels": torch.tensor([0])}
    other = {
        "boxes": torch.tensor([[5.0, 8.0, 12.0, 16.0], [5.0, 8.0, 12.0, 16.0]]),  # in the image 16 further right
        "scores": torch.tensor([0.7, 0.5]),
        "labels": torch.tensor([0, 1]),
    }
    calls = iter([one, other])
    tasks = {"lesions": TASKS["lesions"]}
    got = predict_tiled(
        lambda x: {"lesions": [next(calls) for _ in x]}, torch.zeros(1, 1, 32, 48), tasks, (32, 32), overlap=0.5
    )["lesions"][0]
    assert got["boxes"].tolist() == [[21.0, 8.0, 28.0, 16.0], [21.0, 8.0, 28.0, 16.0]]
    assert got["scores"].tolist() == pytest.approx([0.7, 0.5])
    assert got["labels"].tolist() == [0, 1]  # another class is another object


def test_an_object_larger_than_every_window_is_not_lost():
    image = torch.zeros(1, 1, 32, 96)
    image[..., 10:20, 4:92] = 0.6
    got = predict_tiled(Toy(), image, TASKS, (32, 32), overlap=0.25)["lesions"][0]["boxes"]
    covered = torch.zeros(96, dtype=torch.bool)
    for x0, _, x1, _ in got.int().tolist():
        covered[x0:x1] = True
    assert covered[4:92].all()


def test_class_probabilities_are_pooled_over_windows():
    image = torch.zeros(1, 1, 32, 64)
    image[..., 48:] = 1
    toy = Toy()
    left, right = toy(image[..., :32]), toy(image[..., 32:])
    for pool, expected in {"max": torch.maximum, "mean": lambda a, b: (a + b) / 2}.items():
        got = predict_tiled(toy, image, TASKS, (32, 32), overlap=0, pool=pool)
        assert torch.allclose(got["signs"], expected(left["signs"], right["signs"]))
        pooled = expected(left["density"], right["density"])
        assert torch.allclose(got["density"], pooled / pooled.sum())
        assert got["density"].sum().item() == pytest.approx(1)


@pytest.mark.parametrize("sw_batch_size", [1, 3, 100])
def test_the_number_of_windows_at_once_changes_no_result_but_bounds_the_memory(sw_batch_size):
    image = torch.stack([scene(70, 70, seed=s) for s in range(2)])
    toy, alive, peak = Toy(), weakref.WeakSet(), 0
    expected = predict_tiled(toy, image, TASKS, (32, 32))

    def watched(crops: Tensor) -> dict[str, Any]:
        nonlocal peak
        alive.add(crops)
        peak = max(peak, sum(len(crop) for crop in alive))
        assert crops.shape[0] <= sw_batch_size
        assert crops.shape[-2:] == (32, 32)
        return toy(crops)

    got = predict_tiled(watched, image, TASKS, (32, 32), sw_batch_size=sw_batch_size)
    assert peak <= 2 * sw_batch_size
    assert torch.allclose(got["lungs"], expected["lungs"], atol=4e-7)
    assert torch.allclose(got["density"], expected["density"], atol=1e-6)
    for a, b in zip(got["lesions"], expected["lesions"], strict=True):
        same_boxes(a, b)


def test_a_single_image_is_a_batch_of_one():
    image = scene(50, 50)
    got, expected = (predict_tiled(Toy(), x, TASKS, (32, 32)) for x in (image, image[None]))
    assert got["lungs"].shape == (1, 2, 50, 50)
    assert torch.equal(got["lungs"], expected["lungs"])
    assert len(got["lesions"]) == 1


def test_gradients_are_not_kept():
    toy = Toy()
    toy.conv.requires_grad_(True)
    assert not predict_tiled(toy, scene(50, 50), TASKS, (32, 32))["lungs"].requires_grad


@pytest.mark.parametrize("tile", [(64, 80), (32, 32)])
def test_with_mirrors_the_mirrored_image_gives_the_mirrored_prediction(tile):
    image = torch.stack([scene(64, 80, seed=s) for s in range(2)])
    toy = Toy()
    one, other = (predict_tiled(toy, x, TASKS, tile, overlap=0.5, flip_tta=True) for x in (image, image.flip(-1)))
    assert torch.allclose(other["lungs"].flip(-1), one["lungs"], atol=4e-7)
    assert torch.allclose(other["signs"], one["signs"], atol=1e-6)
    plain = predict_tiled(toy, image, TASKS, tile, overlap=0.5)
    assert not torch.allclose(plain["lungs"], one["lungs"], atol=1e-4)
    for a, b, c in zip(one["lesions"], other["lesions"], plain["lesions"], strict=True):
        assert len(a["boxes"]) > 0
        same_boxes(a, mirror_boxes(b, 80))
        same_boxes(a, c)  # blobs are the same in the mirror


def test_boxes_of_image_and_mirror_are_averaged_and_lone_ones_lose_half_their_score():
    a = {
        "boxes": torch.tensor([[0.0, 0.0, 10.0, 10.0], [40.0, 40.0, 50.0, 50.0]]),
        "scores": torch.tensor([0.8, 0.6]),
        "labels": torch.tensor([0, 0]),
    }
    b = {
        "boxes": torch.tensor([[2.0, 0.0, 12.0, 10.0], [1.0, 0.0, 11.0, 10.0], [0.0, 0.0, 10.0, 10.0]]),
        "scores": torch.tensor([0.7, 0.6, 0.5]),
        "labels": torch.tensor([0, 0, 1]),
    }
    got = average_boxes(a, b, 0.5)
    assert got["scores"].tolist() == pytest.approx([0.7, 0.35, 0.3, 0.25])
    assert got["labels"].tolist() == [0, 0, 0, 1]
    assert got["boxes"].tolist() == [[0.5, 0, 10.5, 10], [2, 0, 12, 10], [40, 40, 50, 50], [0, 0, 10, 10]]
    swapped = average_boxes(b, a, 0.5)
    assert all(torch.equal(swapped[name], got[name]) for name in got)
    nothing = {name: value[:0] for name, value in a.items()}
    assert average_boxes(nothing, nothing, 0.5)["boxes"].shape == (0, 4)
    assert average_boxes(a, nothing, 0.5)["scores"].tolist() == pytest.approx([0.4, 0.3])


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 200), st.integers(1, 200)),
    st.tuples(st.integers(1, 64), st.integers(1, 64)),
    st.floats(0, 0.9),
)
def test_windows_cover_the_image_within_it_and_with_the_overlap(size, tile, overlap):
    windows = place_windows(size, tile, overlap)
    seen = np.zeros(size, dtype=bool)
    for w in windows:
        assert w.y0 >= 0
        assert w.x0 >= 0
        assert (w.y1 - w.y0, w.x1 - w.x0) == (min(tile[0], size[0]), min(tile[1], size[1]))
        seen[w.y0 : w.y1, w.x0 : w.x1] = True
    assert seen.all()
    for starts, side in ((sorted({w.y0 for w in windows}), tile[0]), (sorted({w.x0 for w in windows}), tile[1])):
        steps = np.diff(starts)
        if len(steps):
            assert steps.max() <= max(1, side * (1 - overlap)) + 1e-9


@pytest.mark.parametrize("options", [{"tile": (0, 8)}, {"overlap": 1.0}, {"overlap": -0.1}, {"sw_batch_size": 0}])
def test_invalid_windows_are_refused(options):
    with pytest.raises(ConfigError, match=r"tile=.*overlap=.*sw_batch_size="):
        predict_tiled(Toy(), scene(20, 20), TASKS, **{"tile": (8, 8), **options})
