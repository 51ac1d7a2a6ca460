"""DICOM files: transfer syntaxes, header attributes, and files that are damaged or no images."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    HEVCMP51,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
)

from datamodules.images import dicom, dicom_decoding, dicom_parsing, pixels
from datamodules.images.masks import read_mask
from datamodules.images.pixels import read_image
from mtmedformer.errors import DataError
from tests.fixtures.dicom_files import NATIVE, claim_syntax, film, write_dicom


@pytest.fixture
def file(tmp_path):
    return tmp_path / "image.dcm"


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
    elif name in ("says_video", "says_nonsense"):
        write_dicom(file, grey, bits=12)
        header = dcmread(file)
        claim_syntax(file, HEVCMP51 if name == "says_video" else "1.2.3")
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
        ("says_video", "TransferSyntaxUID HEVC.* is not an image encoding"),
        ("says_nonsense", "TransferSyntaxUID 1.2.3 is not an image encoding"),
        ("j2k_of_other_size", "Rows x Columns is 38 x 32 but the compressed image is 40 x 32"),
        ("bomb", "inflates to more than"),
    ],
)
@pytest.mark.parametrize("read", [read_image, read_mask])
def test_bad_dicom_names_itself(tmp_path, monkeypatch, read, name, message):
    monkeypatch.setattr(dicom_parsing, "MAX_BYTES", 1_000_000)
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
