"""The display chain of DICOM images, step by step, against the formulas of the standard."""

from __future__ import annotations

import math

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from datamodules.images import grayscale
from datamodules.images.pixels import read_image
from tests.fixtures.dicom_files import NATIVE, film, lut_item, write_dicom

CUT = (0.5, 99.5)
RAMP = np.arange(4096, dtype=np.uint16).reshape(64, 64)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "image.dcm"


def shown_by_standard(x, centre, width, function):
    """PS3.3 C.11.2.1.2 and C.11.2.1.3, one value, ymin = 0 and ymax = 1, in the standard's own words."""
    if function == "SIGMOID":
        return 1 / (1 + math.exp(min(700.0, -4 * (x - centre) / width)))
    if function == "LINEAR_EXACT":
        if x <= centre - width / 2:
            return 0.0
        return 1.0 if x > centre + width / 2 else (x - centre) / width + 0.5
    if x <= centre - 0.5 - (width - 1) / 2:
        return 0.0
    return 1.0 if x > centre - 0.5 + (width - 1) / 2 else (x - (centre - 0.5)) / (width - 1) + 0.5


@pytest.mark.parametrize("function", [None, "LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("centre, width", [(2048, 4096), (1000, 401), (900.5, 1), (-20, 300.25), (40, 2)])
def test_window_is_the_standards_formula(file, function, centre, width):
    write_dicom(file, RAMP, bits=12, WindowCenter=centre, WindowWidth=width, VOILUTFunction=function or "LINEAR")
    expected = [shown_by_standard(float(x), centre, width, function) for x in RAMP.flat]
    read = read_image(file)
    assert read.path[-1] == f"window:0:{function or 'LINEAR'}"
    assert read.pixels.dtype == np.float32
    assert read.bits == 12
    assert read.pixels == pytest.approx(np.reshape(expected, RAMP.shape), abs=1e-6)


def test_first_of_several_windows_counts(file):
    write_dicom(file, RAMP, bits=12, WindowCenter=[1000, 3000], WindowWidth=[500, 10])
    assert read_image(file).pixels[0, 0] == 0
    assert read_image(file).pixels.flat[1100] == pytest.approx((1100 - 999.5) / 499 + 0.5)


def test_rescale_comes_before_the_window(file):
    write_dicom(file, RAMP, bits=12, RescaleSlope=2, RescaleIntercept=-1000, WindowCenter=0, WindowWidth=1001)
    read = read_image(file)
    assert read.path[1:] == ("rescale", "window:0:LINEAR")
    expected = [shown_by_standard(2 * float(x) - 1000, 0, 1001, None) for x in RAMP.flat]
    assert read.pixels.ravel() == pytest.approx(expected, abs=1e-6)


def test_a_negative_slope_inverts_the_image(file):
    write_dicom(file, RAMP, bits=12, RescaleSlope=-1, RescaleIntercept=4095)
    assert read_image(file).pixels.ravel() == pytest.approx(1 - RAMP.ravel() / 4095)


def test_monochrome1_is_inverted_after_the_window(file, tmp_path):
    window = {"bits": 12, "WindowCenter": 3000, "WindowWidth": 500}
    write_dicom(file, RAMP, **window)
    inverted = write_dicom(tmp_path / "1.dcm", RAMP, PhotometricInterpretation="MONOCHROME1", **window)
    assert read_image(inverted).path[1:] == ("window:0:LINEAR", "invert:MONOCHROME1")
    assert read_image(inverted).pixels == pytest.approx(1 - read_image(file).pixels, abs=1e-7)


def test_presentation_lut_shape_inverts_once(file, tmp_path):
    both = write_dicom(file, RAMP, bits=12, PhotometricInterpretation="MONOCHROME1", PresentationLUTShape="INVERSE")
    alone = write_dicom(tmp_path / "2.dcm", RAMP, bits=12, PresentationLUTShape="INVERSE")
    same = write_dicom(tmp_path / "3.dcm", RAMP, bits=12, PresentationLUTShape="IDENTITY")
    assert read_image(both).pixels[0, 0] == read_image(alone).pixels[0, 0] == 1
    assert read_image(alone).path[-1] == "invert:PresentationLUTShape"
    assert read_image(same).pixels[0, 0] == 0


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_padding_becomes_background(file, photometric, syntax):
    stored = film(bits=12, signed=True)
    stored[:5], stored[5:9] = -2000, -1990
    write_dicom(
        file,
        stored,
        syntax,
        bits=12,
        PhotometricInterpretation=photometric,
        PixelPaddingValue=-2000,
        PixelPaddingRangeLimit=-1980,
    )
    read = read_image(file)
    assert "padding" in read.path
    assert not read.pixels[:9].any()
    assert read.pixels[9:].max() == 1  # and the rest is stretched without it
    assert read.pixels[9:].min() == 0


def test_padding_written_as_unsigned_is_applied(file):
    stored = film(bits=16, signed=True)
    stored[:5] = -2000
    write_dicom(file, stored, PhotometricInterpretation="MONOCHROME1")
    header = dcmread(file)
    header.add_new("PixelPaddingValue", "US", 65536 - 2000)
    header.save_as(file)
    assert not read_image(file).pixels[:5].any()


@pytest.mark.parametrize("syntax", NATIVE)
@pytest.mark.parametrize("as_bytes", [False, True])
def test_voi_lut_is_preferred_to_the_window(file, syntax, as_bytes):
    if as_bytes and syntax == ExplicitVRBigEndian:
        pytest.skip("pydicom writes OW bytes as they are")
    levels = np.rint(65535 * (np.arange(1000) / 999) ** 2).astype(np.uint16)
    item = lut_item(500, levels, as_bytes=as_bytes)
    write_dicom(file, RAMP, syntax, bits=12, VOILUTSequence=[item], WindowCenter=2000, WindowWidth=10)
    expected = levels[np.clip(RAMP.astype(int) - 500, 0, 999)] / 65535
    assert read_image(file).path[-1] == "voi-lut:0"
    assert read_image(file).pixels == pytest.approx(expected, abs=1e-6)


def test_voi_lut_of_negative_values(file):
    stored = film(bits=12, signed=True)
    write_dicom(file, stored, bits=12, VOILUTSequence=[lut_item(-1000, np.arange(2000) * 2, bits=12)])
    expected = np.clip(stored.astype(int) + 1000, 0, 1999) * 2 / 4095
    assert read_image(file).pixels == pytest.approx(expected, abs=1e-6)


def test_modality_lut_replaces_rescale(file):
    levels = np.arange(4096)[::-1] * 2
    window = {"WindowCenter": 1000, "WindowWidth": 500}
    write_dicom(file, RAMP, bits=12, ModalityLUTSequence=[lut_item(0, levels)], RescaleSlope=7, **window)
    read = read_image(file)
    assert read.path[1:] == ("modality-lut", "window:0:LINEAR")
    expected = [shown_by_standard(float(v), 1000, 500, None) for v in levels]
    assert read.pixels.ravel() == pytest.approx(expected, abs=1e-6)


def broken_luts():
    short, empty, flat = lut_item(0, np.arange(50)), Dataset(), lut_item(0, np.full(4096, 9))
    short.LUTDescriptor = [4096, 0, 16]
    bits = lut_item(0, np.arange(4096))
    bits.LUTDescriptor = [4096, 0, 40]
    return {"short": short, "empty": empty, "flat": flat, "bits": bits}


@pytest.mark.parametrize("name", broken_luts())
def test_a_broken_voi_lut_is_replaced_by_the_window_or_the_range(file, name):
    write_dicom(file, RAMP, bits=12, VOILUTSequence=[broken_luts()[name]], WindowCenter=1000, WindowWidth=500)
    read = read_image(file)
    assert read.path[1] in ("voi-lut:0:broken", "voi-lut:0:outside")
    assert read.path[2] == "window:0:LINEAR"
    write_dicom(file, RAMP, bits=12, VOILUTSequence=[broken_luts()[name]])
    assert read_image(file).path[2] == "range:stored"
    assert read_image(file).pixels.max() == 1


@pytest.mark.parametrize("window", [(100, 0), (100, -5), (9000, 10), (-500, 10), (100, 0.5)])
def test_an_unusable_window_is_replaced_by_the_range(file, window):
    write_dicom(file, RAMP, bits=12, WindowCenter=window[0], WindowWidth=window[1])
    read = read_image(file)
    assert read.path[1] in ("window:0:broken", "window:0:outside")
    assert np.array_equal(read.pixels, (RAMP / 4095).astype(np.float32))


@pytest.mark.parametrize("signed", [False, True])
def test_without_a_16_bit_look_up_in_opencv_the_result_is_the_same(file, monkeypatch, signed):
    def too_old(*_):
        raise grayscale.cv2.error

    write_dicom(file, film(300, 301, bits=16, signed=signed), WindowCenter=100, WindowWidth=3000)
    expected = read_image(file).pixels
    monkeypatch.setattr(grayscale.cv2, "LUT", too_old)
    assert np.array_equal(read_image(file).pixels, expected)


def test_a_window_that_few_pixels_reach_is_used(file):
    stored = np.random.default_rng(0).integers(0, 1000, (600, 600)).astype(np.uint16)
    stored[301, 303] = 4000
    write_dicom(file, stored, bits=12, WindowCenter=4000, WindowWidth=10)
    read = read_image(file)
    assert read.path[-1] == "window:0:LINEAR"
    assert read.pixels.sum() == pytest.approx(read.pixels[301, 303])


def test_a_window_of_letters_is_replaced_by_the_range(file):
    write_dicom(file, RAMP, bits=12, WindowCenter=1000, WindowWidth=1234)
    file.write_bytes(file.read_bytes().replace(b"1234", b"abcd"))
    assert read_image(file).path[1:] == ("window:0:broken", "range:stored")


@pytest.mark.parametrize(
    "modality, stored, bits, kind, low, high",
    [
        ("CR", film(bits=8), 8, "range:stored", 0, 255),
        ("CT", film(bits=8), 8, "range:stored", 0, 255),
        ("MG", film(bits=16), 16, "range:stored", 0, 65535),
        ("MG", film(bits=12), 16, "range:values", 0, 4095),
        ("DX", film(bits=12, signed=True), 12, "range:values", -2048, 2047),
        ("MR", film(bits=12), 12, "range:percentiles", *np.percentile(film(bits=12), CUT)),
        (
            "CT",
            film(bits=12, signed=True),
            16,
            "range:percentiles",
            *np.percentile(film(bits=12, signed=True), CUT),
        ),
        ("PT", film(bits=20), 20, "range:percentiles", *np.percentile(film(bits=20), CUT)),
    ],
)
def test_range_without_a_window(file, modality, stored, bits, kind, low, high):
    write_dicom(file, stored, bits=bits, Modality=modality)
    read = read_image(file)
    assert read.path[-1] == kind
    assert read.pixels == pytest.approx(np.clip((stored.astype(float) - low) / (high - low), 0, 1), abs=1e-6)


def test_constant_image_is_black(file):
    write_dicom(file, np.full((8, 8), 777, np.int16))
    assert not read_image(file).pixels.any()
