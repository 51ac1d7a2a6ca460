from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from matplotlib.path import Path as Outline
from PIL import Image, ImageDraw
from scipy import ndimage

from datamodules.cache.rasterize import (
    CLIPPED,
    OTHER_SIDE,
    RESIZED,
    UNCERTAIN,
    CacheEntry,
    Canvas,
    UnusableError,
    draw,
    rasterize,
)
from datamodules.cache.shapes import fill_disc, fill_polygon, mask_boxes
from datamodules.images.masks import SOFT_EDGES
from datamodules.images.pixels import Pixels
from datamodules.images.presets import BreastPreset, PlainPreset, Preset
from datamodules.records import BoxTruth, MaskSource, MaskTruth, Record
from mtmedformer.batch import IGNORE
from mtmedformer.geometry import Frame, boxes_to_original, letterbox

SIZE = (48, 64)  # height, width of the films below


def film(folder: Path, size: tuple[int, int] = SIZE, kind: type = np.uint8) -> Path:
    pixels = np.random.default_rng(0).integers(1, np.iinfo(kind).max, size, kind)
    Image.fromarray(pixels).save(folder / "film.png")
    return folder / "film.png"


def mask_file(folder: Path, values: np.ndarray, name: str = "mask.png") -> Path:
    Image.fromarray(values.astype(np.uint8)).save(folder / name)
    return folder / name


def rasterized(record: Record, size: tuple[int, int] = (32, 32), preset: Preset | None = None) -> CacheEntry:
    found = rasterize(record, preset or PlainPreset(), size)
    assert isinstance(found, CacheEntry), found
    return found


def canvas(size: tuple[int, int] = SIZE, **more: object) -> Canvas:
    return Canvas(size, letterbox((0, 0, size[1], size[0]), size), **more)  # type: ignore[arg-type]


def only_issue(entry: CacheEntry, task: str) -> str:
    assert [issue.subject for issue in entry.issues] == [task]
    assert task not in entry.masks
    assert task not in entry.boxes
    return entry.issues[0].reason


@pytest.mark.parametrize("seed", range(8))
def test_polygons_fill_the_pixels_whose_centres_are_inside(seed: int) -> None:
    rng = np.random.default_rng(seed)
    angles = np.sort(rng.uniform(0, 2 * np.pi, 9))  # a star-shaped polygon, partly outside
    radii = rng.uniform(4, 30, 9)
    points = np.stack([32 + radii * np.cos(angles), 20 + radii * np.sin(angles)], axis=1)
    mask = np.zeros(SIZE, bool)
    count = fill_polygon(mask, points)
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    centres = np.stack([columns.ravel() + 0.5, rows.ravel() + 0.5], axis=1)
    expected = Outline(points).contains_points(centres).reshape(SIZE)
    assert count == expected.sum() > 100
    np.testing.assert_array_equal(mask, expected)


def test_a_rectangle_fills_exactly_its_pixels() -> None:
    mask = np.zeros(SIZE, bool)
    assert fill_polygon(mask, np.array([(3.0, 5.0), (9.0, 5.0), (9.0, 7.0), (3.0, 7.0)])) == 12
    assert mask[5:7, 3:9].all()
    assert mask.sum() == 12


@pytest.mark.parametrize("x, y, radius", [(20.3, 18.7, 7.5), (1.0, 47.0, 6.0), (33.5, 10.5, 0.0), (12.0, 12.0, 0.4)])
def test_discs_fill_the_pixels_whose_centres_are_within_the_radius(x: float, y: float, radius: float) -> None:
    mask = np.zeros(SIZE, bool)
    count = fill_disc(mask, x, y, radius)
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    expected = np.hypot(columns + 0.5 - x, rows + 0.5 - y) <= radius
    expected[int(y), int(x)] = True
    np.testing.assert_array_equal(mask, expected)
    assert count == expected.sum()


def test_boxes_around_components_agree_with_opencv() -> None:
    mask = np.random.default_rng(1).random(SIZE) > 0.75
    found = mask_boxes(mask, SIZE, components=True, min_area=3)
    _, _, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    expected = {(x, y, x + w, y + h) for x, y, w, h, area in stats[1:].tolist() if area >= 3}
    assert {tuple(int(v) for v in box) for box in found} == expected
    assert len(found) > 5
    rows, columns = np.nonzero(mask)
    assert mask_boxes(mask, SIZE, False, 1).tolist() == [[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]
    assert mask_boxes(np.zeros(SIZE, bool), SIZE, True, 1).shape == (0, 4)
    assert mask_boxes(np.zeros(SIZE, bool), SIZE, False, 1).shape == (0, 4)


def test_pixels_keep_their_depth(tmp_path: Path) -> None:
    eight = rasterized(Record("a", film(tmp_path), "p"), SIZE)
    assert eight.image.dtype == np.uint8
    np.testing.assert_array_equal(eight.image, np.asarray(Image.open(tmp_path / "film.png")))
    sixteen = rasterized(Record("a", film(tmp_path, kind=np.uint16), "p"), SIZE)
    assert sixteen.image.dtype == np.uint16
    np.testing.assert_array_equal(sixteen.image, np.asarray(Image.open(tmp_path / "film.png")))


def test_boxes_map_back_to_the_original(tmp_path: Path) -> None:
    boxes = ((2.0, 3.0, 20.0, 30.0), (40.5, 10.25, 63.0, 47.5))
    entry = rasterized(Record("a", film(tmp_path), "p", {"spots": BoxTruth(boxes, (1, 0))}), (40, 24))
    back = boxes_to_original(entry.boxes["spots"], Frame(entry.to_original, (40, 24)))
    np.testing.assert_allclose(back, boxes, atol=1e-4)
    assert entry.labels["spots"].tolist() == [1, 0]
    assert entry.original_size == SIZE


def test_annotated_and_empty_differs_from_unknown(tmp_path: Path) -> None:
    truth = {
        "spots": BoxTruth(),
        "lungs": MaskTruth((MaskSource(), None)),
    }
    entry = rasterized(Record("a", film(tmp_path), "p", truth))
    assert entry.boxes["spots"].shape == (0, 4)
    assert entry.labels["spots"].shape == (0,)
    assert not entry.masks["lungs"][0].any()
    assert (entry.masks["lungs"][1] == IGNORE).all()
    assert entry.issues == ()


def test_mask_values_make_classes(tmp_path: Path) -> None:
    values = np.zeros(SIZE, np.uint8)
    values[:16], values[16:32] = 1, 7
    file = mask_file(tmp_path, values)
    truth = MaskTruth((MaskSource(file, (1,)), MaskSource(file, (1, 7)), MaskSource(file)))
    masks = rasterized(Record("a", film(tmp_path), "p", {"m": truth}), SIZE).masks["m"]
    np.testing.assert_array_equal(masks[0], values == 1)
    np.testing.assert_array_equal(masks[1], values > 0)
    np.testing.assert_array_equal(masks[2], values > 0)


def test_an_uncertain_mask_is_unknown_and_not_decoded_again(tmp_path: Path) -> None:
    values = np.zeros(SIZE, np.uint8)
    values[5:30, 8:40] = 1
    Image.fromarray(values).save(tmp_path / "m.jpg", quality=95)
    source = MaskSource(tmp_path / "m.jpg")
    truth = {"m": MaskTruth((source,)), "b": BoxTruth(masks=(source,), mask_labels=(0,))}
    entry = rasterized(Record("a", film(tmp_path), "p", truth))
    assert [(i.subject, i.reason) for i in entry.issues] == [("m", UNCERTAIN), ("b", UNCERTAIN)]
    assert "without a value above 48" in entry.issues[0].detail
    assert not entry.report().transient


def test_declared_values_of_the_classes_of_a_file_are_taken_together(tmp_path: Path) -> None:
    values = np.zeros(SIZE, np.uint8)
    values[:16] = 7
    file = mask_file(tmp_path, values)
    channels = (MaskSource(file, (1,)), MaskSource(file, (7,)))
    masks = rasterized(Record("a", film(tmp_path), "p", {"m": MaskTruth(channels)}), SIZE).masks["m"]
    assert masks.any(axis=(1, 2)).tolist() == [False, True]  # the first class is a known negative
    entry = rasterized(Record("a", film(tmp_path), "p", {"m": MaskTruth(channels[:1])}), SIZE)
    assert only_issue(entry, "m") == UNCERTAIN


def test_soft_edges_are_cut_and_counted(tmp_path: Path) -> None:
    values = np.zeros(SIZE)
    values[10:35, 15:45] = 255
    soft = np.rint(ndimage.gaussian_filter(values, 1.5))
    entry = rasterized(
        Record("a", film(tmp_path), "p", {"m": MaskTruth((MaskSource(mask_file(tmp_path, soft)),))}), SIZE
    )
    assert (soft > 0).sum() > 1.3 * (values > 0).sum()
    assert (entry.masks["m"] == 1).sum() == pytest.approx((values > 0).sum(), rel=0.03)
    assert entry.remarks == (SOFT_EDGES,)


def test_a_smaller_mask_of_the_same_shape_is_enlarged_and_counted(tmp_path: Path) -> None:
    small = np.zeros((24, 32), np.uint8)
    small[5:15, 8:20] = 255
    source = MaskSource(mask_file(tmp_path, small))
    truth = {"m": MaskTruth((source,)), "b": BoxTruth(masks=(source,), mask_labels=(0,), components=True)}
    entry = rasterized(Record("a", film(tmp_path), "p", truth), SIZE)
    np.testing.assert_array_equal(entry.masks["m"][0], np.kron(small > 0, np.ones((2, 2))))
    assert entry.boxes["b"].tolist() == [[16.0, 10.0, 40.0, 30.0]]
    assert entry.remarks == (RESIZED, RESIZED)


@pytest.mark.parametrize("shape", [(64, 48), (48, 66), (24, 33)])
def test_a_mask_of_another_shape_makes_only_its_task_unknown(tmp_path: Path, shape: tuple[int, int]) -> None:
    truth = {"m": MaskTruth((MaskSource(mask_file(tmp_path, np.ones(shape))),)), "b": BoxTruth(((1, 1, 9, 9),), (0,))}
    entry = rasterized(Record("a", film(tmp_path), "p", truth))
    if shape == (24, 33):  # one pixel is rounding
        assert set(entry.masks) == {"m"}
    else:
        assert only_issue(entry, "m") == "mask of another aspect ratio than its image"
        assert f"{shape[1]}x{shape[0]}" in entry.issues[0].detail
    assert set(entry.boxes) == {"b"}


@pytest.mark.parametrize(
    "content, reason",
    [(None, "mask file missing"), (b"", "mask unreadable"), (b"not a mask", "mask unreadable")],
)
def test_a_broken_mask_makes_its_task_unknown_and_is_decoded_again(
    tmp_path: Path, content: bytes | None, reason: str
) -> None:
    file = tmp_path / "broken.png"
    if content is not None:
        file.write_bytes(content)
    entry = rasterized(Record("a", film(tmp_path), "p", {"m": MaskTruth((MaskSource(file),))}))
    assert only_issue(entry, "m") == reason
    assert entry.report().transient


def test_a_lesion_smaller_than_a_pixel_of_the_frame_stays(tmp_path: Path) -> None:
    values = np.zeros((256, 256), np.uint8)
    values[101:103, 57:59] = 255
    source = MaskSource(mask_file(tmp_path, values))
    entry = rasterized(Record("a", film(tmp_path, (256, 256)), "p", {"m": MaskTruth((source,))}), (32, 32))
    assert np.argwhere(entry.masks["m"][0]).tolist() == [[12, 7]]


@pytest.mark.parametrize(
    "box, reason",
    [
        ((9, 9, 3, 20), "box without area or with corners swapped"),
        ((9, 9, 9, 20), "box without area or with corners swapped"),
        ((float("nan"), 1, 2, 3), "box with a coordinate that is not a number"),
        ((0, 0, float("inf"), 3), "box with a coordinate that is not a number"),
        ((64, 0, 80, 20), "box outside the image"),
        ((5, -20, 10, 0), "box outside the image"),
    ],
)
def test_an_invalid_box_makes_only_its_task_unknown(tmp_path: Path, box: tuple[float, ...], reason: str) -> None:
    truth = {"b": BoxTruth(((1, 1, 9, 9), box), (0, 0)), "m": MaskTruth((MaskSource(),))}
    entry = rasterized(Record("a", film(tmp_path), "p", truth))
    assert only_issue(entry, "b") == reason
    assert set(entry.masks) == {"m"}


def test_a_box_partly_outside_is_clipped_and_counted(tmp_path: Path) -> None:
    truth = {"b": BoxTruth(((-4, 10, 12, 60), (50, 20, 70, 30), (1, 1, 9, 9)), (0, 0, 0))}
    entry = rasterized(Record("a", film(tmp_path), "p", truth), SIZE)
    assert entry.boxes["b"].tolist() == [[0, 10, 12, 48], [50, 20, 64, 30], [1, 1, 9, 9]]
    assert entry.remarks == (CLIPPED, CLIPPED)


def test_truth_of_a_larger_original_is_scaled(tmp_path: Path) -> None:
    source = MaskSource(polygons=(((20, 20), (60, 20), (60, 40), (20, 40)),), discs=((100, 60, 8),))
    truth = {"b": BoxTruth(((20, 20, 60, 40),), (0,)), "m": MaskTruth((source,))}
    record = Record("a", film(tmp_path), "p", truth, size=(96, 128))
    entry = rasterized(record, SIZE)
    assert entry.boxes["b"].tolist() == [[10, 10, 30, 20]]
    assert entry.masks["m"][0, 10:20, 10:30].all()
    disc = entry.masks["m"][0, :, 40:]
    assert disc.sum() == pytest.approx(np.pi * 4**2, rel=0.1)
    other = rasterized(Record("a", film(tmp_path), "p", truth, size=(96, 96)))
    assert {issue.reason for issue in other.issues} == {"truth of another aspect ratio than its image"}
    assert {issue.subject for issue in other.issues} == {"b", "m"}


def test_points_become_discs_and_tiny_polygons_one_pixel() -> None:
    points = MaskSource(polygons=(((10.5, 10.5),), ((30.5, 20.5), (40.5, 20.5))), point_radius=2.0)
    mask = draw(points, canvas())
    assert mask.sum() == 3 * 13
    assert mask[10, 8:13].all()
    assert mask[20, 28:33].all()
    assert mask[20, 38:43].all()
    tiny = draw(MaskSource(polygons=(((7.1, 3.1), (7.2, 3.1), (7.15, 3.2)),)), canvas())
    assert np.argwhere(tiny).tolist() == [[3, 7]]


def test_file_and_shapes_are_united(tmp_path: Path) -> None:
    values = np.zeros(SIZE, np.uint8)
    values[0, 0] = 9
    mask = draw(MaskSource(mask_file(tmp_path, values), discs=((20.5, 20.5, 1.0),)), canvas())
    assert mask.sum() == 6
    assert mask[0, 0]


@pytest.mark.parametrize(
    "source",
    [
        MaskSource(polygons=(((70, 1), (80, 1), (80, 9)),)),
        MaskSource(polygons=(((-5, -5),),)),
        MaskSource(discs=((100, 100, 5),)),
        MaskSource(discs=((float("nan"), 10, 5),)),
    ],
)
def test_a_shape_outside_the_image_is_refused(source: MaskSource) -> None:
    with pytest.raises(UnusableError, match="shape outside the image"):
        draw(source, canvas())


def test_a_polygon_with_a_coordinate_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(UnusableError, match="not a number"):
        draw(MaskSource(polygons=(((1, 1), (float("nan"), 5), (3, 9)),)), canvas())


def test_boxes_come_from_components_of_masks(tmp_path: Path) -> None:
    values = np.zeros(SIZE, np.uint8)
    values[2:6, 3:9], values[20:30, 40:50], values[40, 40] = 255, 255, 255
    source = MaskSource(mask_file(tmp_path, values))
    record = Record(
        "a",
        film(tmp_path),
        "p",
        {
            "each": BoxTruth(masks=(source,), mask_labels=(1,), components=True, min_area=4),
            "whole": BoxTruth(((1, 1, 2, 2),), (0,), (source,), (1,)),
            "none": BoxTruth(masks=(MaskSource(),), mask_labels=(0,), components=True),
        },
    )
    entry = rasterized(record, SIZE)
    assert entry.boxes["each"].tolist() == [[3, 2, 9, 6], [40, 20, 50, 30]]
    assert entry.labels["each"].tolist() == [1, 1]
    assert entry.boxes["whole"].tolist() == [[1, 1, 2, 2], [3, 2, 50, 41]]
    assert entry.labels["whole"].tolist() == [0, 1]
    assert entry.boxes["none"].shape == (0, 4)


@pytest.mark.parametrize(
    "pixels, reason",
    [
        (np.full(SIZE, 9, np.uint8), "image constant"),
        (np.zeros(SIZE, np.uint8), "image constant"),
        (np.arange(40, dtype=np.uint8).reshape(4, 10), "image too small"),
    ],
)
def test_a_constant_image_is_an_issue(tmp_path: Path, pixels: np.ndarray, reason: str) -> None:
    file = mask_file(tmp_path, pixels, "film.png")
    issue = rasterize(Record("a", file, "Name^X"), PlainPreset(), (32, 32))
    assert not isinstance(issue, CacheEntry)
    assert (issue.subject, issue.reason, issue.file) == ("image", reason, "film.png")
    assert "Name" not in repr(issue)


def test_an_image_that_cannot_be_read_is_an_issue_and_tried_again(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n cut off")
    for name, reason in (("bad.png", "image unreadable"), ("gone.png", "image file missing")):
        issue = rasterize(Record("a", tmp_path / name, "p"), PlainPreset(), (32, 32))
        assert not isinstance(issue, CacheEntry)
        assert issue.reason == reason
        assert issue.transient


def test_values_that_are_not_numbers_are_an_issue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).random(SIZE, np.float32)
    pixels[3, 3] = np.nan
    monkeypatch.setattr("datamodules.cache.rasterize.read_image", lambda *_: Pixels(pixels, 16, ()))
    issue = rasterize(Record("a", film(tmp_path), "p"), PlainPreset(), (32, 32))
    assert not isinstance(issue, CacheEntry)
    assert issue.reason == "image with values that are not numbers"


@pytest.fixture
def mammogram(tmp_path: Path) -> Path:
    """A right breast (chest wall at the right edge) with a bright spot, on a wide dark film."""
    image = Image.new("L", (300, 200), 3)
    ImageDraw.Draw(image).ellipse((180, 30, 420, 170), fill=120)
    ImageDraw.Draw(image).rectangle((240, 90, 249, 99), fill=250)
    image.save(tmp_path / "film.png")
    return tmp_path / "film.png"


def test_crop_and_flip_carry_masks_and_boxes_along(tmp_path: Path, mammogram: Path) -> None:
    values = np.zeros((200, 300), np.uint8)
    values[90:100, 240:250] = 255
    source = MaskSource(mask_file(tmp_path, values))
    truth = {"b": BoxTruth(((240, 90, 250, 100),), (0,)), "m": MaskTruth((source,))}
    entry = rasterized(Record("a", mammogram, "p", truth, laterality="R"), (160, 128), BreastPreset())
    assert entry.to_original[0] < 0  # turned to the left
    bright = entry.image > 200
    rows, columns = np.nonzero(bright)
    around = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    np.testing.assert_allclose(entry.boxes["b"][0], around, atol=1.5)
    overlap = (bright & (entry.masks["m"][0] == 1)).sum() / (bright | (entry.masks["m"][0] == 1)).sum()
    assert overlap > 0.8
    back = boxes_to_original(entry.boxes["b"], Frame(entry.to_original, (160, 128)))
    np.testing.assert_allclose(back, [[240, 90, 250, 100]], atol=1e-3)


def test_a_label_outside_the_crop_does_not_become_negative(tmp_path: Path, mammogram: Path) -> None:
    values = np.zeros((200, 300), np.uint8)
    values[5:9, 5:9] = 255  # on the dark film, far from the breast
    source = MaskSource(mask_file(tmp_path, values))
    truth = {"b": BoxTruth(((5, 5, 9, 9),), (0,)), "m": MaskTruth((source,))}
    entry = rasterized(Record("a", mammogram, "p", truth), (160, 128), BreastPreset())
    assert {issue.reason for issue in entry.issues} == {
        "box outside the cropped frame",
        "mask outside the cropped frame",
    }
    assert not entry.boxes
    assert not entry.masks


def test_a_side_that_differs_from_the_header_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).random(SIZE, np.float32)
    monkeypatch.setattr(
        "datamodules.cache.rasterize.read_image", lambda *_: Pixels(pixels, 16, (), (0.1, 0.2), "CC", "L")
    )
    entry = rasterized(Record("a", film(tmp_path), "p", laterality="R"))
    assert entry.remarks == (OTHER_SIDE,)
    assert (entry.laterality, entry.view, entry.spacing) == ("L", "CC", (0.1, 0.2))
