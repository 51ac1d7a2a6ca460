"""Reading images and masks: the standard's steps one by one, every other format, and everything that is broken."""

from __future__ import annotations

import io
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    HEVCMP51,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    RLELossless,
)

from datamodules.images import dicom, dicom_decoding, grayscale, pixels
from datamodules.images.pixels import read_image, read_mask
from mtmedformer.errors import DataError
from tests.fixtures.dicom_files import NATIVE, film, lut_item, write_dicom

LZW = {"compression": "tiff_lzw"}
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


@pytest.mark.parametrize("syntax", [*NATIVE, RLELossless, JPEG2000Lossless])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("size", [(41, 33), (300, 301)])  # below and above the size from which a table is used
def test_every_syntax_reads_the_same(file, syntax, signed, size):
    stored = film(*size, bits=12, signed=signed)
    steps = {"WindowCenter": 100, "WindowWidth": 3000, "PhotometricInterpretation": "MONOCHROME1"}
    write_dicom(file, stored, syntax, bits=12, **steps)
    expected = 1 - np.clip((stored.astype(float) - 99.5) / 2999 + 0.5, 0, 1)
    read = read_image(file)
    assert read.pixels == pytest.approx(expected, abs=1e-6)
    assert read.pixels.flags.writeable
    assert np.array_equal(read_mask(file), stored)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_dicom_is_recognised_by_content(tmp_path, syntax):
    bare = write_dicom(tmp_path / "bare.png", film(), syntax, bits=12, preamble=False)
    named = write_dicom(tmp_path / "IM0001", film(), syntax, bits=12)
    assert np.array_equal(read_image(bare).pixels, read_image(named).pixels)


def test_overlays_in_unused_bits_are_cleared(file, tmp_path):
    stored = film(bits=12)
    clean = write_dicom(file, stored, bits=12)
    overlay = write_dicom(tmp_path / "2.dcm", stored | (np.arange(32) % 2 * 0x8000).astype(np.uint16), bits=12)
    upper = write_dicom(tmp_path / "3.dcm", stored << 4, bits=12, HighBit=15)
    claimed = write_dicom(tmp_path / "5.dcm", stored, bits=12, HighBit=15)  # and not kept in the upper bits
    assert np.array_equal(read_image(claimed).pixels, read_image(clean).pixels)
    signed = write_dicom(tmp_path / "4.dcm", film(bits=12, signed=True) & 0x0FFF, bits=12)
    expected = read_image(clean).pixels
    assert np.array_equal(read_image(overlay).pixels, expected)
    assert np.array_equal(read_image(upper).pixels, expected)
    assert np.array_equal(read_mask(signed), film(bits=12, signed=True))


@pytest.mark.parametrize(
    "attributes, spacing, view, side",
    [
        ({}, None, None, None),
        ({"PixelSpacing": [0.1, 0.2], "ImagerPixelSpacing": [1, 1], "ViewPosition": "PA"}, (0.1, 0.2), "PA", None),
        ({"PixelSpacing": [0, 0], "ImagerPixelSpacing": [0.3, 0.3], "ImageLaterality": "L"}, (0.3, 0.3), None, "L"),
        ({"NominalScannedPixelSpacing": [0.05, 0.05], "Laterality": "R"}, (0.05, 0.05), None, "R"),
        ({"ImageLaterality": "R", "Laterality": "L", "PatientOrientation": "MLO"}, None, "MLO", "R"),
        ({"PatientOrientation": ["A", "F"], "ImageLaterality": "B"}, None, None, None),
        ({"code": "399162004"}, None, "CC", None),
        ({"code": "R-10226"}, None, "MLO", None),
        ({"code": "399348003", "ViewPosition": ""}, None, "AP", None),
        ({"code": "R-10242", "ViewPosition": "ML"}, None, "ML", None),
    ],
)
def test_header_facts(file, attributes, spacing, view, side):
    attributes = dict(attributes)
    if code := attributes.pop("code", None):
        item = Dataset()
        item.CodeValue = code
        attributes["ViewCodeSequence"] = Sequence([item])
    read = read_image(write_dicom(file, film(), bits=12, **attributes))
    assert (read.spacing, read.view, read.laterality) == (spacing, view, side)


def test_nothing_of_the_patient_is_parsed(file, monkeypatch):
    parsed, check = [], dicom_decoding._check
    monkeypatch.setattr(dicom_decoding, "_check", lambda path, header: (parsed.append(header), check(path, header)))
    read_image(write_dicom(file, film(), bits=12))
    assert parsed[0].Rows == 40
    assert "PatientName" not in parsed[0]
    assert "PatientID" not in parsed[0]


def test_an_image_for_processing_is_flagged(file):
    write_dicom(file, film(), bits=12, PresentationIntentType="FOR PROCESSING")
    assert "for-processing" in read_image(file).path


def test_grey_in_three_channels_is_grey(file):
    grey = film(bits=8)
    write_dicom(file, np.dstack([grey] * 3))
    read = read_image(file)
    assert read.path[1:] == ("equal-channels", "range:stored")
    assert read.pixels == pytest.approx(grey / 255)
    assert np.array_equal(read_mask(file), grey)


def test_grey_palette_is_grey(file):
    index = film(bits=8)
    table = (np.arange(256)[::-1] * 257).astype("<u2")
    colours = {f"{c}PaletteColorLookupTableDescriptor": [256, 0, 16] for c in ("Red", "Green", "Blue")}
    colours |= {f"{c}PaletteColorLookupTableData": table.tobytes() for c in ("Red", "Green", "Blue")}
    write_dicom(file, index, PhotometricInterpretation="PALETTE COLOR", **colours)
    assert read_image(file).pixels == pytest.approx(1 - index / 255)
    assert np.array_equal(read_mask(file), index)


def bad(name: str, folder: Path) -> Path:
    """Write a file that cannot be used."""
    file = folder / f"{name}.dcm"
    grey, colour = film(bits=12), np.random.default_rng(0).integers(0, 255, (20, 20, 3)).astype(np.uint8)
    if name == "empty":
        file.write_bytes(b"")
    elif name == "text":
        file.write_text("patient,label\n1,2\n")
    elif name == "zeros":
        file.write_bytes(bytes(1000))
    elif name == "preamble":
        file.write_bytes(bytes(128) + b"DICM")
    elif name == "folder":
        file.mkdir()
    elif name == "frames":
        write_dicom(file, np.vstack([grey, grey]), bits=12, NumberOfFrames=2, Rows=grey.shape[0])
    elif name == "colour":
        write_dicom(file, colour)
    elif name == "no_pixels":
        write_dicom(file, grey, PixelData=None)
    elif name == "no_rows":
        write_dicom(file, grey, Rows=None)
    elif name == "no_photometric":
        write_dicom(file, grey, PhotometricInterpretation=None)
    elif name == "strange_photometric":
        write_dicom(file, grey, PhotometricInterpretation="PURPLE")
    elif name == "too_few":
        write_dicom(file, grey, Rows=grey.shape[0] + 3)
    elif name == "huge":
        write_dicom(file, grey, Rows=65535, Columns=65535)
    elif name == "bits":
        write_dicom(file, grey, BitsStored=40)
    elif name == "cut":
        write_dicom(file, grey, bits=12)
        file.write_bytes(file.read_bytes()[:-500])
    elif name in ("cut_j2k", "cut_rle"):
        write_dicom(file, film(bits=12), JPEG2000Lossless if name == "cut_j2k" else RLELossless, bits=12)
        file.write_bytes(file.read_bytes()[:-600])
    elif name in ("says_rle", "says_j2k", "says_jpeg", "says_video", "says_nonsense"):
        write_dicom(file, grey, bits=12)
        header = dcmread(file)
        syntaxes = [RLELossless, JPEG2000Lossless, JPEGLosslessSV1, HEVCMP51, "1.2.3"]
        names = ("says_rle", "says_j2k", "says_jpeg", "says_video", "says_nonsense")
        content = file.read_bytes()
        old, new = (str(u).encode() for u in (header.file_meta.TransferSyntaxUID, syntaxes[names.index(name)]))
        at, size = content.index(old), len(old) + len(old) % 2
        padded = new + b"\0" * (len(new) % 2)
        length = int.from_bytes(content[140:144], "little") + len(padded) - size
        content = content[: at - 2] + len(padded).to_bytes(2, "little") + padded + content[at + size :]
        file.write_bytes(content[:140] + length.to_bytes(4, "little") + content[144:])
    elif name == "j2k_of_other_size":
        write_dicom(file, grey, JPEG2000Lossless, bits=12)
        header = dcmread(file)
        header.Rows = header.Rows - 2
        header.save_as(file)
    elif name == "bomb":
        write_dicom(file, grey, DeflatedExplicitVRLittleEndian, bits=12)
        content = file.read_bytes()
        start = 144 + int.from_bytes(content[140:144], "little")
        packer = zlib.compressobj(9, wbits=-15)
        file.write_bytes(content[:start] + packer.compress(bytes(2_000_000)) + packer.flush())
    return file


@pytest.mark.parametrize(
    "name, message",
    [
        ("empty", "0 bytes"),
        ("text", "cannot be read as"),
        ("zeros", "cannot be read as"),
        ("preamble", "no PixelData"),
        ("folder", "no such file"),
        ("absent", "no such file"),
        ("frames", "NumberOfFrames is 2"),
        ("colour", "colour image"),
        ("no_pixels", "no PixelData"),
        ("no_rows", "Rows missing"),
        ("no_photometric", "PhotometricInterpretation missing"),
        ("strange_photometric", "Photometric Interpretation"),
        ("too_few", "[Pp]ixel [Dd]ata"),
        ("huge", "Rows x Columns is 4294836225 pixels"),
        ("bits", "Bits Stored"),
        ("cut", "damaged, incomplete"),
        ("cut_j2k", "incomplete"),
        ("cut_rle", "incomplete"),
        ("says_rle", "damaged"),
        ("says_j2k", "damaged"),
        ("says_jpeg", "damaged"),
        ("says_video", "TransferSyntaxUID HEVC.* is not an image encoding"),
        ("says_nonsense", "TransferSyntaxUID 1.2.3 is not an image encoding"),
        ("j2k_of_other_size", "Rows x Columns is 38 x 32 but the compressed image is 40 x 32"),
        ("bomb", "inflates to more than"),
    ],
)
@pytest.mark.parametrize("read", [read_image, read_mask])
def test_bad_dicom_names_itself(tmp_path, monkeypatch, read, name, message):
    monkeypatch.setattr(dicom_decoding, "MAX_BYTES", 1_000_000)
    file = bad(name, tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        read(file)
    assert str(caught.value).startswith(f"{file.name}: ")
    assert "secret" not in str(caught.value).lower()


def test_too_large_a_file_is_refused_before_reading(file, monkeypatch):
    monkeypatch.setattr(pixels, "MAX_BYTES", 1000)
    with pytest.raises(DataError, match="more than one image needs"):
        read_image(write_dicom(file, film(), bits=12))


def test_an_interrupt_is_not_reported_as_a_broken_file(file, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(dicom, "apply_chain", interrupted)
    with pytest.raises(KeyboardInterrupt):
        read_image(write_dicom(file, film(), bits=12))


def test_memory_errors_name_the_file(file, monkeypatch):
    def exhausted(*_):
        raise MemoryError

    monkeypatch.setattr(dicom, "apply_chain", exhausted)
    with pytest.raises(DataError, match=r"image\.dcm: .*MemoryError"):
        read_image(write_dicom(file, film(), bits=12))


# -- other formats


def save(file: Path, values: np.ndarray, mode: str | None = None, **options) -> Path:
    image = Image.fromarray(values)
    (image.convert(mode) if mode else image).save(file, **options)
    return file


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm", "bmp", "gif", "webp", "jp2"])
def test_8_bit_files(tmp_path, suffix):
    grey = film(bits=8)
    file = save(tmp_path / f"a.{suffix}", grey, **({"lossless": True} if suffix == "webp" else {}))
    read = read_image(file)
    assert np.array_equal(read.pixels, (grey / 255).astype(np.float32))
    assert read.bits == 8
    assert (read.spacing, read.view, read.laterality) == (None, None, None)
    assert np.array_equal(read_mask(file), grey)


@pytest.mark.parametrize("suffix, options", [("png", {}), ("tif", {}), ("tif", LZW), ("pgm", {})])
def test_16_bit_files_keep_16_bits(tmp_path, suffix, options):
    grey = film(bits=16)
    file = save(tmp_path / f"a.{suffix}", grey, **options)
    assert np.array_equal(read_image(file).pixels, (grey / 65535).astype(np.float32))
    assert read_image(file).bits == 16
    assert np.array_equal(read_mask(file), grey)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("channels", [3, 4])
def test_16_bit_colour_keeps_16_bits(tmp_path, suffix, channels):
    import cv2

    grey = film(bits=16)
    stack = np.dstack([grey] * channels)
    cv2.imwrite(str(tmp_path / f"a.{suffix}"), stack)
    read = read_image(tmp_path / f"a.{suffix}")
    assert np.array_equal(read.pixels, (grey / 65535).astype(np.float32))
    assert np.array_equal(read_mask(tmp_path / f"a.{suffix}"), grey)
    stack[..., 2] = 0  # red, in the order of OpenCV
    cv2.imwrite(str(tmp_path / f"a.{suffix}"), stack)
    read = read_image(tmp_path / f"a.{suffix}")
    assert read.path[-1] == "luminance"
    assert read.pixels == pytest.approx(grey / 65535 * 0.701, abs=1e-4)


def test_shallow_data_in_16_bits_is_not_black(tmp_path):
    twelve, eight = save(tmp_path / "12.png", film(bits=12)), save(tmp_path / "8.png", film(bits=8).astype(np.uint16))
    assert (read_image(twelve).bits, read_image(twelve).path[-1]) == (12, "range:4095")
    assert (read_image(eight).bits, read_image(eight).path[-1]) == (8, "range:255")
    assert read_image(twelve).pixels.max() == read_image(eight).pixels.max() == 1
    assert np.array_equal(read_mask(twelve), film(bits=12))


@pytest.mark.parametrize("maximum", [1, 15, 255, 1023, 4095, 65535])
@pytest.mark.parametrize("plain", [False, True])
def test_pgm_of_any_depth(tmp_path, maximum, plain):
    grey = np.rint(film(bits=16) / 65535 * maximum).astype(int)
    header = f"P{2 if plain else 5}\n# made by a scanner\n{grey.shape[1]} # width\n{grey.shape[0]}\n{maximum}\n"
    raw = grey.astype("u1" if maximum < 256 else ">u2").tobytes()
    file = tmp_path / "a.pgm"
    file.write_bytes(header.encode() + (" ".join(map(str, grey.flat)).encode() if plain else raw))
    assert read_image(file).pixels == pytest.approx(grey / maximum, abs=1e-7)
    assert read_image(file).bits == maximum.bit_length()
    assert np.array_equal(read_mask(file), grey)


@pytest.mark.parametrize("suffix", ["png", "tif", "pbm"])
def test_1_bit_files(tmp_path, suffix):
    spot = film(bits=8) > 128
    file = save(tmp_path / f"a.{suffix}", spot)
    assert np.array_equal(read_image(file).pixels, spot.astype(np.float32))
    assert read_image(file).bits == 1
    assert np.array_equal(read_mask(file), spot.astype(int))


@pytest.mark.parametrize("bits", [2, 4])
def test_2_and_4_bit_png(tmp_path, bits):
    """Written by hand: Pillow does not write them."""
    values = film(8, 8, bits=bits)
    bitstrings = ("".join(f"{v:0{bits}b}" for v in row) for row in values)
    content = b"".join(b"\0" + int(row, 2).to_bytes(bits, "big") for row in bitstrings)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    header = (8).to_bytes(4, "big") * 2 + bytes([bits, 0, 0, 0, 0])
    file = tmp_path / "a.png"
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(content)) + chunk(b"IEND", b"")
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    assert np.array_equal(read_mask(file), values)
    assert read_image(file).pixels == pytest.approx(values / ((1 << bits) - 1))
    assert read_image(file).bits == bits


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P"])
def test_grey_in_any_png_mode(tmp_path, mode):
    grey = film(bits=8)
    file = save(tmp_path / "a.png", grey, mode)
    assert np.array_equal(read_image(file).pixels, (grey / 255).astype(np.float32))
    assert np.array_equal(read_mask(file), grey)


def test_alpha_is_dropped_not_multiplied(tmp_path):
    grey = film(bits=8)
    save(tmp_path / "a.png", np.dstack([grey, grey, grey, np.full_like(grey, 7)]))
    assert np.array_equal(read_image(tmp_path / "a.png").pixels, (grey / 255).astype(np.float32))


def test_colour_becomes_luminance_but_is_no_mask(tmp_path):
    colour = np.zeros((4, 4, 3), np.uint8)
    colour[0], colour[1], colour[2], colour[3] = (255, 0, 0), (0, 255, 0), (0, 0, 255), 255
    file = save(tmp_path / "a.png", colour)
    read = read_image(file)
    assert read.path == ("decode:PNG", "luminance")
    assert read.pixels[:, 0] == pytest.approx([0.299, 0.587, 0.114, 1], abs=1e-6)
    assert read.pixels.max() <= 1
    with pytest.raises(DataError, match=r"a\.png: a mask in colours"):
        read_mask(file)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_jpeg(tmp_path, mode):
    grey = film(64, 64, bits=8)
    file = save(tmp_path / "a.jpeg", grey, mode, quality=98)
    assert read_image(file).pixels == pytest.approx(grey / 255, abs=0.04)
    assert read_image(file).path[0] == "decode:JPEG"


def test_jpeg_mask_is_cleaned(tmp_path):
    spot = np.zeros((64, 64), np.uint8)
    spot[20:41, 11:50] = 255
    assert np.array_equal(read_mask(save(tmp_path / "a.jpg", spot, quality=60)), spot)
    assert np.array_equal(read_mask(save(tmp_path / "b.jpg", spot, "RGB", quality=60)), spot)
    with pytest.raises(DataError, match="more than two levels"):
        read_mask(save(tmp_path / "c.jpg", film(bits=8)))


def test_palette_mask_is_its_grey_levels_or_its_indices(tmp_path):
    index = (film(bits=8) // 64).astype(np.uint8)
    image = Image.fromarray(index, "P")
    image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0])
    image.save(tmp_path / "classes.png")
    assert np.array_equal(read_mask(tmp_path / "classes.png"), index)
    image.putpalette([255, 255, 255, 0, 0, 0, 100, 100, 100, 50, 50, 50])
    image.save(tmp_path / "grey.png")
    assert np.array_equal(read_mask(tmp_path / "grey.png"), np.array([255, 0, 100, 50])[index])
    assert read_image(tmp_path / "grey.png").pixels[0, 0] == np.float32(np.array([255, 0, 100, 50])[index[0, 0]] / 255)


def test_exif_orientation_is_applied(tmp_path):
    grey = film(20, 30, bits=8)
    exif = Image.Exif()
    exif[0x0112] = 6
    read = read_image(save(tmp_path / "a.png", grey, exif=exif))
    assert "exif-orientation:6" in read.path
    assert np.array_equal(read.pixels, np.rot90(grey / 255, -1).astype(np.float32))


def test_white_is_zero_tiff_is_inverted(tmp_path):
    for values, white in ((film(bits=8), 255), (film(bits=16), 65535)):
        file = save(tmp_path / "a.tif", values)
        content = bytearray(file.read_bytes())
        entry = content.index((262).to_bytes(2, "little") + (3).to_bytes(2, "little"))
        content[entry + 8] = 0  # PhotometricInterpretation: WhiteIsZero
        file.write_bytes(content)
        assert read_image(file).pixels == pytest.approx(1 - values / white, abs=1e-6)


def test_float_tiff(tmp_path):
    level = film(bits=8).astype(np.float32) / 255
    file = save(tmp_path / "a.tif", level)
    assert np.array_equal(read_image(file).pixels, level)
    with pytest.raises(DataError, match="fractions"):
        read_mask(file)
    assert np.array_equal(read_mask(save(file, np.round(level * 3))), np.round(level * 3))
    with pytest.raises(DataError, match=r"a\.tif: floating-point or signed values outside \[0, 1\]"):
        read_image(save(file, level * 300))
    level[0, 0] = np.nan
    with pytest.raises(DataError, match="floating-point"):
        read_image(save(file, level))


@pytest.mark.parametrize("suffix", ["tif", "gif", "png", "webp"])
def test_several_pages_are_refused(tmp_path, suffix):
    pages = [Image.fromarray(film(bits=8, seed=i)) for i in range(3)]
    file = tmp_path / f"a.{suffix}"
    pages[0].save(file, save_all=True, append_images=pages[1:])
    for read in (read_image, read_mask):
        with pytest.raises(DataError, match="several pages or frames"):
            read(file)


def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(pixels, "MAX_PIXELS", 1000)
    for suffix in ("png", "pgm", "tif", "jpg"):
        with pytest.raises(DataError, match=r"40 x 32|32 x 40"):
            read_image(save(tmp_path / f"a.{suffix}", film(bits=8)))


def test_decompression_bomb_names_itself(tmp_path):
    file = tmp_path / "a.png"
    save(file, film(bits=8))
    content = bytearray(file.read_bytes())
    content[16:24] = (200_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.png: .*DecompressionBomb"):
        read_image(file)


def test_postscript_is_never_run(tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(DataError, match="cannot be read as an image"):
        read_image(file)


@pytest.mark.parametrize(
    "header",
    [
        b"P5\n",
        b"P5 3 3\n",
        b"P5 3 3 70000\n",
        b"P5 0 3 255\n",
        b"P5 99999 99999 255\n",
        b"P2 2 1 5 7 8",
        b"P2 2 1 5 1 x",
        b"P5 2 2 255 abc",
    ],
)
def test_bad_pgm_names_itself(tmp_path, header):
    (tmp_path / "a.pgm").write_bytes(header)
    with pytest.raises(DataError, match=r"^a\.pgm: "):
        read_image(tmp_path / "a.pgm")


# -- fuzz: whatever is done to a file, it reads or it says so

SEEDS: dict[str, bytes] = {}


def seed_files(folder: Path) -> dict[str, bytes]:
    if not SEEDS:
        for syntax in (ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, RLELossless, JPEG2000Lossless):
            name = folder / f"{syntax.keyword}.dcm"
            window = {"WindowCenter": 900, "WindowWidth": 2000, "PixelPaddingValue": 5}
            lut = [lut_item(0, np.arange(100))]
            write_dicom(name, film(34, 36), syntax, bits=12, VOILUTSequence=lut, **window)
            SEEDS[name.name] = name.read_bytes()
        grey = Image.fromarray(film(12, 14, bits=16))
        for suffix in ("png", "tif", "pgm"):
            content = io.BytesIO()
            grey.save(content, {"tif": "TIFF", "png": "PNG", "pgm": "PPM"}[suffix])
            SEEDS[f"a.{suffix}"] = content.getvalue()
        content = io.BytesIO()
        Image.fromarray(film(12, 14, bits=8)).save(content, "JPEG")
        SEEDS["a.jpg"] = content.getvalue()
    return SEEDS


@settings(max_examples=250, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_files_read_or_name_themselves(tmp_path, data):
    seeds = seed_files(tmp_path)
    name = data.draw(st.sampled_from(sorted(seeds)))
    content = bytearray(seeds[name])
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))]
    file = tmp_path / name
    file.write_bytes(content)
    for read in (read_image, read_mask):
        try:
            found = read(file)
        except DataError as error:
            if not str(error).startswith(f"{name}: "):
                raise
            continue
        if isinstance(found, np.ndarray):
            assert found.dtype.kind in "iu"
            assert found.ndim == 2
        else:
            assert found.pixels.dtype == np.float32
            assert found.pixels.ndim == 2
            assert found.pixels.min() >= 0
            assert found.pixels.max() <= 1
