"""Colour images, from the file to the network's input: raster files, DICOM, presets, cache."""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.pixels import apply_color_lut
from pydicom.pixels.processing import convert_color_space
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
)

from datamodules import BreastPreset, ColourPreset
from datamodules.cache.cache import Cache
from datamodules.cache.preprocessing import Preprocessing
from datamodules.images.pixels import read_image
from datamodules.images.presets import PlainPreset
from datamodules.loading.dataset import CachedDataset
from datamodules.loading.single_image import prepare_array, prepare_file
from datamodules.records import MaskSource, MaskTruth, Record
from mtmedformer.batch import Task
from mtmedformer.errors import DataError
from tests.fixtures.dicom_files import film, write_dicom, write_stream


def photograph(rows: int = 40, columns: int = 32) -> np.ndarray:
    """Return a smooth picture, uint8 (H, W, 3), with other values in each channel."""
    red = film(rows, columns, bits=8)
    return np.dstack([red, np.flipud(red) // 2, 255 - np.fliplr(red)])


RGB = photograph()


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp", "webp", "ppm", "jp2"])
def test_raster_colours_are_kept_on_request_and_else_luminance(tmp_path, suffix):
    file = tmp_path / f"a.{suffix}"
    Image.fromarray(RGB).save(file, **({"lossless": True} if suffix == "webp" else {}))
    read = read_image(file, colour=True)
    assert np.array_equal(read.pixels, (RGB / 255).astype(np.float32))
    assert (read.bits, read.path[-1]) == (8, "colour")
    grey = read_image(file)
    assert grey.pixels == pytest.approx(RGB @ [0.299, 0.587, 0.114] / 255, abs=1e-5)
    assert grey.path[-1] == "luminance"


def test_16_bit_colours_have_the_white_level_of_their_set(tmp_path):
    deep = RGB.astype(np.uint16) * 16
    cv2.imwrite(str(tmp_path / "a.png"), deep[..., ::-1])
    assert read_image(tmp_path / "a.png", 4095, colour=True).pixels == pytest.approx(deep / 4095, abs=1e-6)
    assert read_image(tmp_path / "a.png", 65535, colour=True).pixels == pytest.approx(deep / 65535, abs=1e-6)
    with pytest.raises(DataError, match="above the white level 255"):
        read_image(tmp_path / "a.png", 255, colour=True)


def test_grey_files_stay_grey_and_transparency_is_dropped(tmp_path):
    Image.fromarray(np.dstack([RGB[..., 0]] * 3)).save(tmp_path / "grey.png")
    assert read_image(tmp_path / "grey.png", colour=True).pixels.shape == (40, 32)
    Image.fromarray(np.dstack([RGB, RGB[..., 0]])).save(tmp_path / "alpha.png")
    assert np.array_equal(read_image(tmp_path / "alpha.png", colour=True).pixels, (RGB / 255).astype(np.float32))
    Image.fromarray(RGB).quantize(256).save(tmp_path / "palette.png")
    assert read_image(tmp_path / "palette.png", colour=True).pixels == pytest.approx(RGB / 255, abs=0.1)


def test_an_exif_orientation_turns_a_photograph(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RGB).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "a.png", colour=True).pixels * 255, np.rot90(RGB, -1))


def ybr(values: np.ndarray) -> np.ndarray:
    return convert_color_space(values, "RGB", "YBR_FULL")


def palette(bits: int = 16, big: bool = False, words: int = 16) -> dict[str, object]:
    """Return a palette of three ramps; ``bits`` in its descriptor, entries of ``words`` bits."""
    ramps = {"Red": np.arange(256), "Green": np.arange(256)[::-1], "Blue": np.arange(256) // 2}
    found: dict[str, object] = {}
    for name, ramp in ramps.items():
        entries = ramp * (257 if bits == 16 else 1)
        table = entries.astype(">u2" if big else "<u2") if words == 16 else entries.astype(np.uint8)
        data = table.view("<u2").byteswap().tobytes() if big and words == 8 else table.tobytes()
        found |= {
            f"{name}PaletteColorLookupTableDescriptor": [256, 0, bits],
            f"{name}PaletteColorLookupTableData": data,
        }
    return found


def coloured(index: np.ndarray) -> np.ndarray:
    return np.dstack([index, 255 - index, index // 2]) / 255


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ExplicitVRBigEndian, JPEG2000Lossless, RLELossless,
                                    JPEGLSLossless])  # fmt: skip
def test_rgb_of_lossless_encodings(tmp_path, syntax):
    read = read_image(write_dicom(tmp_path / "a.dcm", RGB, syntax), colour=True)
    assert np.array_equal(read.pixels, (RGB / 255).astype(np.float32))
    assert "colour" in read.path


def test_planes_deep_colours_and_ybr(tmp_path):
    planes = np.ascontiguousarray(RGB.transpose(2, 0, 1)).tobytes()
    file = write_dicom(tmp_path / "a.dcm", RGB, PlanarConfiguration=1, PixelData=planes)
    assert np.array_equal(read_image(file, colour=True).pixels, (RGB / 255).astype(np.float32))
    deep = RGB.astype(np.uint16) * 16
    read = read_image(write_dicom(tmp_path / "b.dcm", deep, bits=12), colour=True)
    assert read.pixels == pytest.approx(deep / 4095, abs=1e-6)
    assert read.bits == 12
    file = write_dicom(tmp_path / "c.dcm", ybr(RGB), PhotometricInterpretation="YBR_FULL")
    assert read_image(file, colour=True).pixels == pytest.approx(RGB / 255, abs=0.01)
    subsampled = ybr(np.repeat(RGB[:, ::2], 2, axis=1))
    pairs = np.concatenate([subsampled[:, ::2, :1], subsampled[:, 1::2, :1], subsampled[:, ::2, 1:]], axis=2)
    attributes = {"PhotometricInterpretation": "YBR_FULL_422", "PixelData": pairs.tobytes()}
    read = read_image(write_dicom(tmp_path / "d.dcm", RGB, **attributes), colour=True)
    assert read.pixels == pytest.approx(np.repeat(RGB[:, ::2], 2, axis=1) / 255, abs=0.01)


@pytest.mark.parametrize("claimed", ["YBR_FULL_422", "RGB"])
def test_jpeg_baseline_whatever_the_header_claims(tmp_path, claimed):
    """A JFIF marker means YBR, and many writers leave RGB in the header."""
    stream = io.BytesIO()
    Image.fromarray(RGB).save(stream, format="JPEG", quality=95)
    pieces = [b"", stream.getvalue() + b"\0" * (len(stream.getvalue()) % 2)]
    colour = {"SamplesPerPixel": 3, "PlanarConfiguration": 0, "PhotometricInterpretation": claimed}
    file = write_stream(tmp_path / "a.dcm", pieces, 40, 32, JPEGBaseline8Bit, **colour)
    assert read_image(file, colour=True).pixels == pytest.approx(RGB / 255, abs=0.08)


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("bits, words", [(16, 16), (8, 8), (8, 16)])
def test_palettes_of_every_depth(tmp_path, bits, words, big):
    """Entries of 8 bits may lie in words of 16, and a big-endian file swaps the bytes of each word."""
    syntax = ExplicitVRBigEndian if big else ExplicitVRLittleEndian
    index = film(bits=8)
    file = write_dicom(
        tmp_path / "a.dcm", index, syntax, PhotometricInterpretation="PALETTE COLOR", **palette(bits, big, words)
    )
    assert read_image(file, colour=True).pixels == pytest.approx(coloured(index), abs=1e-6)


def test_colour_dicom_for_a_grey_network_names_the_setting(tmp_path):
    with pytest.raises(DataError, match=r"^a\.dcm: .*colour image.*set encoder\.in_chans to 3"):
        read_image(write_dicom(tmp_path / "a.dcm", RGB))


PYDICOM = [
    "SC_rgb",
    "SC_rgb_16bit",
    "SC_rgb_32bit",
    "SC_rgb_expb",
    "color-pl",
    "color-px",
    "SC_ybr_full_uncompressed",
    "SC_ybr_full_422_uncompressed",
    "US1_J2KI",
    "US1_J2KR",
    "US1_UNCI",
    "GDCMJ2K_TextGBR",
    "SC_jpeg_no_color_transform",
    "SC_rgb_jpeg_dcmtk",
    "SC_rgb_dcmtk_+eb+cr",
    "SC_rgb_dcmtk_+eb+cy+n1",
    "SC_rgb_dcmtk_+eb+cy+np",
    "SC_rgb_dcmtk_+eb+cy+s4",
    "SC_rgb_gdcm_KY",
    "SC_rgb_rle",
    "SC_rgb_jls_lossy_line",
    "SC_rgb_jpeg_gdcm",
    "examples_jpeg2k",
    "examples_rgb_color",
    "OBXXXX1A",
    "examples_palette",
]


@pytest.mark.parametrize("name", PYDICOM)
def test_colours_of_known_files_are_those_of_pydicom(name):
    if (found := get_testdata_file(f"{name}.dcm", download=False)) is None:
        pytest.skip(f"{name} not here: install pydicom-data")
    header = dcmread(str(found))
    values = header.pixel_array
    if header.PhotometricInterpretation == "PALETTE COLOR":
        values = apply_color_lut(values, header)
    ours = read_image(Path(str(found)), colour=True)
    assert "colour" in ours.path
    assert ours.pixels == pytest.approx(values / np.iinfo(values.dtype).max, abs=1e-6)


# --- cache, presets, samples


def test_samples_have_three_channels_and_grey_images_three_equal_ones(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "colour.png")
    Image.fromarray(RGB[..., 0]).save(tmp_path / "grey.png")
    Image.fromarray((RGB[..., 0] > 128).astype(np.uint8) * 255).save(tmp_path / "mask.png")
    truth = {"spot": MaskTruth((MaskSource(tmp_path / "mask.png"),))}
    records = [Record(n, tmp_path / f"{n}.png", n, truth) for n in ("colour", "grey")]
    task = {"spot": Task("spot", "segmentation", ("spot",), multi_label=True)}
    samples = {}
    for channels in (3, 1):
        for folder in (None, tmp_path / "cache"):
            prepared = Preprocessing(PlainPreset(), (40, 32), channels=channels)
            cache, keys = Cache(folder), prepared.keys(records)
            assert not [r.issues for r in cache.fill(records, keys, prepared) if r.issues]
            data = CachedDataset(records, keys, task, cache, prepared)
            samples[channels, folder is None] = [data[0], data[1]]
    colour, grey = samples[3, True]
    assert torch.equal(colour.image, torch.from_numpy(RGB.transpose(2, 0, 1) / np.float32(255)))
    assert all(torch.equal(plane, torch.from_numpy(RGB[..., 0] / np.float32(255))) for plane in grey.image)
    assert [s.image.shape for s in samples[1, True]] == [(1, 40, 32)] * 2
    for key in (1, 3):
        for one, other in zip(samples[key, True], samples[key, False], strict=True):
            assert torch.equal(one.image, other.image)
    assert len({Preprocessing(PlainPreset(), (40, 32), channels=c).keys(records)[0] for c in (1, 3)}) == 2


@pytest.mark.parametrize("preset", [PlainPreset(), ColourPreset(), BreastPreset()], ids=["plain", "colour", "breast"])
def test_an_array_gives_the_sample_of_its_file(tmp_path, preset):
    Image.fromarray(RGB).save(tmp_path / "a.png")
    prepared = Preprocessing(preset, (24, 20), channels=3)
    sample, array = prepare_file(Record("a", tmp_path / "a.png", "p"), prepared), prepare_array(RGB, prepared)
    assert sample.image.shape == (3, 24, 20)
    assert torch.equal(sample.image, array.image)
    assert prepare_array(RGB[..., 0], prepared).image.shape == (3, 24, 20)
    with pytest.raises(DataError, match="give one grey image"):
        prepare_array(RGB, Preprocessing(preset, (24, 20)))


NOTHING = (np.zeros((0, 40, 32), np.uint8), np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
STILL = {"rotation": 0, "zoom": 0, "shift": 0, "horizontal_flip": 0, "vertical_flip": 0}


def augmented(image: np.ndarray, seed: int, **options: float) -> np.ndarray:
    return ColourPreset(**options).augment(image, *NOTHING, np.random.default_rng(seed)).image


def test_without_jitter_no_colour_appears_or_turns():
    """Brightness, contrast and gamma treat the channels alike: grey stays grey, the order of the channels remains."""
    grey = np.repeat(RGB[..., :1] / np.float32(255), 3, axis=2)
    colour = RGB / np.float32(255)
    for seed in range(8):
        out = augmented(grey, seed)
        assert np.ptp(out, axis=2).max() < 1e-6
        assert not np.array_equal(out, grey)
        kept = augmented(colour, seed, **STILL)
        inside = (kept > 0.01).all(axis=2) & (kept < 0.99).all(axis=2)
        assert np.array_equal(kept.argmax(axis=2)[inside], colour.argmax(axis=2)[inside])
        assert np.array_equal(kept, augmented(colour, seed, **STILL))


def test_jitter_of_hue_and_saturation_changes_colours_and_leaves_grey():
    options = {**STILL, "brightness": 0, "contrast": 0, "gamma": 0, "hue": 0.1, "saturation": 0.5}
    grey = np.repeat(RGB[..., :1] / np.float32(255), 3, axis=2)
    colour = RGB / np.float32(255)
    changes = [np.abs(augmented(colour, seed, **options) - colour).max() for seed in range(8)]
    assert max(changes) > 0.1
    assert all(np.abs(augmented(grey, seed, **options) - grey).max() < 0.01 for seed in range(8))


def test_a_black_border_stays_black_and_a_dark_channel_is_no_border():
    fundus = RGB / np.float32(255)
    fundus[:, :6] = 0
    fundus[:, 6:, 2] = 0  # no blue
    out = augmented(fundus, 3, **STILL, noise=0.1)
    assert not out[:, :6].any()
    assert out[:, 6:, 2].any()


def test_image_mask_and_box_move_together():
    image, masks = np.zeros((64, 64, 3), np.float32), np.zeros((1, 64, 64), np.uint8)
    image[20:36, 24:44] = (0.9, 0.2, 0.1)
    masks[0, 20:36, 24:44] = 1
    box = np.array([[24, 20, 44, 36]], np.float32)
    for seed in range(6):
        moved = ColourPreset().augment(image, masks, box, np.zeros(1, np.int64), np.random.default_rng(seed))
        inside = moved.masks[0] == 1
        assert moved.image[inside, 0].mean() > 4 * moved.image[inside, 2].mean()
        assert moved.image[~inside, 0].mean() < 0.02
        rows, columns = np.nonzero(inside)
        centre = ((columns.min() + columns.max() + 1) / 2, (rows.min() + rows.max() + 1) / 2)
        assert moved.boxes[0].reshape(2, 2).mean(axis=0) == pytest.approx(centre, abs=1.5)
