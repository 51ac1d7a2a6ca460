"""Which pixels of a mask file belong to the class, for each kind of file; an uncertain file is never an empty mask."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from pydicom.uid import JPEGBaseline8Bit
from scipy import ndimage

from datamodules.images.masks import (
    LABELS,
    OTHER_LEVELS,
    SOFT_EDGES,
    VOID,
    UncertainMaskError,
    read_mask,
    shape_of,
    with_values,
)
from tests.fixtures.dicom_files import write_dicom

SIZE = (200, 160)


def disc(level: int = 255, size: tuple[int, int] = SIZE) -> np.ndarray:
    image = Image.new("L", (size[1], size[0]), 0)
    ImageDraw.Draw(image).ellipse((40, 50, 110, 120), fill=level)
    return np.asarray(image)


SHAPE = disc() > 0


def soft(radius: float = 2.0) -> np.ndarray:
    return np.rint(ndimage.gaussian_filter(disc().astype(float), radius)).astype(np.uint8)


def antialiased() -> np.ndarray:
    large = Image.new("L", (SIZE[1] * 8, SIZE[0] * 8), 0)
    ImageDraw.Draw(large).ellipse([v * 8 for v in (40, 50, 111, 121)], fill=255)
    return np.asarray(large.resize((SIZE[1], SIZE[0]), Image.Resampling.BOX))


def resized(method: Image.Resampling) -> np.ndarray:
    small = Image.fromarray(disc()).resize((40, 50), Image.Resampling.NEAREST)
    return np.asarray(small.resize((SIZE[1], SIZE[0]), method))


def save(file: Path, values: np.ndarray, mode: str | None = None, **options) -> Path:
    image = Image.fromarray(values)
    (image.convert(mode) if mode else image).save(file, **options)
    return file


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


def labels(*levels: int, dtype: type = np.uint8) -> np.ndarray:
    values = np.zeros(SIZE, dtype)
    for i, level in enumerate(levels):
        values[20 + 30 * i : 40 + 30 * i, 30:90] = level
    return values


TWO_LEVELS = {
    "0 and 1": (disc(1), {}),
    "0 and 255": (disc(), {}),
    "0 and 100": (disc(100), {}),
    "16 bit 0 and 1": (disc(1).astype(np.uint16), {}),
    "16 bit 0 and 65535": (disc().astype(np.uint16) * 257, {}),
    "1 bit": (SHAPE, {}),
    "grey palette": (disc(), {"mode": "P"}),
    "equal channels": (np.dstack([disc()] * 3), {}),
    "opaque": (np.dstack([disc()] * 3 + [np.full(SIZE, 255, np.uint8)]), {}),
    "transparent background": (np.dstack([disc()] * 4), {}),
}


@pytest.mark.parametrize("kind", TWO_LEVELS)
def test_two_levels_are_read_exactly(kind, tmp_path):
    values, options = TWO_LEVELS[kind]
    shape, remark = shape_of(read_mask(save(tmp_path / "a.png", values, **options)))
    assert np.array_equal(shape, SHAPE)
    assert remark == ""


def test_a_coloured_palette_gives_its_class_numbers(tmp_path):
    image = Image.fromarray(disc(1)).convert("P")
    image.putpalette([0, 0, 0, 200, 0, 0])
    image.save(tmp_path / "a.png")
    assert np.array_equal(shape_of(read_mask(tmp_path / "a.png"))[0], SHAPE)
    other = Image.fromarray(1 - disc(1)).convert("P")
    other.putpalette([200, 0, 0, 0, 0, 0])
    other.save(tmp_path / "b.png")
    with pytest.raises(Exception, match="black has index 1"):
        read_mask(tmp_path / "b.png")


@pytest.mark.parametrize("suffix", ["tif", "gif", "bmp", "pgm", "webp", "jp2"])
def test_other_formats_of_0_and_255(suffix, tmp_path):
    lossless = {"lossless": True} if suffix == "webp" else {}
    assert np.array_equal(shape_of(read_mask(save(tmp_path / f"a.{suffix}", disc(), **lossless)))[0], SHAPE)


@pytest.mark.parametrize(
    "values",
    [soft(1.0), soft(2.0), soft(4.0), antialiased(), resized(Image.Resampling.BILINEAR)],
    ids=["blur 1", "blur 2", "blur 4", "antialiased", "bilinear"],
)
def test_soft_edges_are_cut_at_half_of_the_largest_level(values):
    shape, remark = shape_of(values)
    assert remark == SOFT_EDGES
    assert overlap(shape, SHAPE) > 0.93
    assert abs(int(shape.sum()) - int(SHAPE.sum())) < 0.05 * SHAPE.sum()


def test_a_small_soft_shape_beside_a_large_one_is_kept_or_uncertain():
    values = disc().astype(float)
    values[160:163, 20:23] = 255
    shape, _ = shape_of(np.rint(ndimage.gaussian_filter(values, 0.8)).astype(np.uint8))
    assert shape[161, 21]
    with pytest.raises(UncertainMaskError, match="1 region"):
        shape_of(np.rint(ndimage.gaussian_filter(values, 3.0)).astype(np.uint8))


def test_specks_near_zero_are_background():
    values = disc().astype(np.int64) + np.random.default_rng(0).integers(-8, 8, SIZE)
    shape, remark = shape_of(values.clip(0, 255).astype(np.uint8))
    assert np.array_equal(shape, SHAPE)
    assert remark in ("", SOFT_EDGES)


@pytest.mark.parametrize("levels", [(1, 2), (1, 2, 3), (85, 170, 255), (127, 255), (64, 128, 192), (1, 2, 3, 4, 5, 6)])
def test_areas_of_several_levels_all_belong(levels):
    shape, remark = shape_of(labels(*levels[:5]))
    assert np.array_equal(shape, labels(*levels[:5]) > 0)
    assert remark == LABELS


@pytest.mark.parametrize(
    "values, reason",
    [
        (np.where(SHAPE, 255, 127), "127 and 255, so it covers the whole image"),
        (np.where(SHAPE, 2, 1), "1 and 2, so it covers the whole image"),
        (labels(1, 255), "neither edges nor areas"),
        (labels(*range(1, 6)) + labels(0, 0, 0, 0, 0) - 5 * SHAPE, "negative"),
        (np.random.default_rng(0).integers(0, 255, SIZE), "grey levels"),
        (np.rint(ndimage.gaussian_filter(disc().astype(float), 25)), "grey levels"),
    ],
    ids=["grey background", "classes from 1", "void", "negative", "noise", "heat map"],
)
def test_uncertain_levels_are_refused(values, reason):
    with pytest.raises(UncertainMaskError, match=reason):
        shape_of(values.astype(np.int64))


def test_empty_and_full_masks_are_read_as_they_are():
    assert not shape_of(np.zeros(SIZE, np.uint8))[0].any()
    assert shape_of(np.full(SIZE, 255, np.uint8))[0].all()


@pytest.mark.parametrize("quality", [30, 50, 75, 90, 100])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_jpeg_of_0_and_255_is_read_through_its_compression(quality, mode, tmp_path):
    shape, remark = shape_of(read_mask(save(tmp_path / "a.jpg", disc(), mode, quality=quality)))
    assert np.array_equal(shape, SHAPE)
    assert remark == ""


@pytest.mark.parametrize("level, reason", [(1, "without a value above 48"), (2, "above 48"), (40, "above 48")])
def test_a_jpeg_of_faint_levels_is_uncertain(level, reason, tmp_path):
    with pytest.raises(UncertainMaskError, match=reason):
        read_mask(save(tmp_path / "a.jpg", disc(level), quality=95))


def test_a_jpeg_of_other_levels_is_uncertain(tmp_path):
    with pytest.raises(UncertainMaskError, match="brightest pixel is"):
        read_mask(save(tmp_path / "a.jpg", disc(120), quality=95))
    small = np.zeros(SIZE, np.uint8)
    small[30:150, 20:140] = 255
    small[165:173, 10:18] = 100  # below 2 % of the image
    with pytest.raises(UncertainMaskError, match="grey shapes away from the bright ones"):
        read_mask(save(tmp_path / "b.jpg", small, quality=95))


def test_other_lossy_files_are_read_as_jpeg(tmp_path):
    assert np.array_equal(read_mask(save(tmp_path / "a.webp", disc(), quality=60)) > 0, SHAPE)
    with pytest.raises(UncertainMaskError, match="48"):
        read_mask(save(tmp_path / "b.webp", disc(6), quality=90))
    save(tmp_path / "c.jp2", disc(), irreversible=True, quality_mode="rates", quality_layers=[30])
    assert set(np.unique(read_mask(tmp_path / "c.jp2"))) == {0, 255}


def test_a_lossy_dicom_mask_is_read_as_jpeg(tmp_path):
    from pydicom.encaps import encapsulate
    from pydicom.uid import ExplicitVRLittleEndian

    for level, name in ((255, "a"), (1, "b")):
        jpeg = save(tmp_path / "a.jpg", disc(level), quality=90).read_bytes()
        file = write_dicom(tmp_path / f"{name}.dcm", disc(level), ExplicitVRLittleEndian, bits=8)
        from pydicom import dcmread

        dataset = dcmread(file)
        dataset.PixelData = encapsulate([jpeg])
        dataset["PixelData"].is_undefined_length = True
        dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
        dataset.save_as(file)
    assert np.array_equal(read_mask(tmp_path / "a.dcm") > 0, SHAPE)
    with pytest.raises(UncertainMaskError, match="without a value above 48"):
        read_mask(tmp_path / "b.dcm")


def alpha_only(grey: int) -> np.ndarray:
    return np.dstack([np.full(SIZE, grey, np.uint8)] * 3 + [disc()])


@pytest.mark.parametrize("grey", [0, 255])
@pytest.mark.parametrize("bits", [8, 16])
def test_a_shape_in_the_transparency_is_uncertain(grey, bits, tmp_path):
    values = alpha_only(grey)
    cv2.imwrite(str(tmp_path / "a.png"), values if bits == 8 else values.astype(np.uint16) * 257)
    with pytest.raises(UncertainMaskError, match=r"a\.png: a mask of one colour with its shape in the transparency"):
        read_mask(tmp_path / "a.png")
    save(tmp_path / "b.png", alpha_only(grey)[..., 2:])
    with pytest.raises(UncertainMaskError, match="transparency"):
        read_mask(tmp_path / "b.png")


def test_a_palette_with_its_shape_in_the_transparency_is_uncertain(tmp_path):
    image = Image.fromarray(disc(1)).convert("P")
    image.putpalette([0, 0, 0, 0, 0, 0])
    image.save(tmp_path / "a.png", transparency=bytes([0, 255]))
    with pytest.raises(UncertainMaskError, match="transparency"):
        read_mask(tmp_path / "a.png")


def test_colours_below_full_transparency_are_uncertain(tmp_path):
    values = np.dstack([disc()] * 3 + [255 - disc()])
    with pytest.raises(UncertainMaskError, match="different shapes"):
        read_mask(save(tmp_path / "a.png", values))


def test_a_shape_in_one_colour_is_uncertain(tmp_path):
    red = np.dstack([disc(), np.zeros(SIZE, np.uint8), np.zeros(SIZE, np.uint8)])
    for suffix in ("png", "jpg"):
        with pytest.raises(UncertainMaskError, match=rf"a\.{suffix}: a mask in colours"):
            read_mask(save(tmp_path / f"a.{suffix}", red))


def test_fractions_are_uncertain(tmp_path):
    for values in (soft() / 255, np.where(SHAPE, np.nan, 0)):
        with pytest.raises(UncertainMaskError, match="fractions"):
            read_mask(save(tmp_path / "a.tif", values.astype(np.float32)))
    assert np.array_equal(read_mask(save(tmp_path / "b.tif", SHAPE.astype(np.float32))), SHAPE)


def test_declared_values_that_do_not_occur_are_uncertain():
    assert with_values(disc(2), (2,), (1, 2))[0].any()
    assert not with_values(disc(2), (1,), (1, 2))[0].any()  # another class of the file is there
    assert not with_values(np.zeros(SIZE, np.uint8), (1,), (1, 2))[0].any()
    assert with_values(labels(127, 255), (255,), (255,))[1] == ""  # a region of another kind
    with pytest.raises(UncertainMaskError, match="levels 0, 255, and no class has one of them"):
        with_values(disc(), (1,), (1, 2))


def test_a_resampled_label_map_is_counted_and_loses_no_region():
    shape, remark = with_values(soft(), (255,), (255,))
    assert remark == OTHER_LEVELS
    assert shape.any()
    two = disc().astype(float)
    two[160:163, 20:23] = 255
    with pytest.raises(UncertainMaskError, match="1 region"):
        with_values(np.rint(ndimage.gaussian_filter(two, 3.0)).astype(np.uint8), (255, 254), (255, 254))


def test_level_255_beside_class_numbers_is_counted():
    assert with_values(labels(1, 255), (1,), (1, 2))[1] == VOID
    assert with_values(labels(1, 255), (1,), (1, 255))[1] == ""


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_mask_that_is_not_empty_never_becomes_empty(data):
    kind = data.draw(st.sampled_from([np.uint8, np.uint16, np.int32]))
    pool = data.draw(st.lists(st.integers(0, 255), min_size=1, max_size=12))
    size = data.draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
    levels = np.random.default_rng(data.draw(st.integers(0, 99))).choice(pool, size).astype(kind)
    try:
        shape, _ = shape_of(levels)
    except UncertainMaskError:
        assert levels.any()
        return
    assert shape.any() == levels.any()
    assert not shape[levels == 0].any()
