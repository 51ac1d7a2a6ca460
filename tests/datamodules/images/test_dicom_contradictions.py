"""DICOM files whose header contradicts the pixels, or whose envelope is damaged: read right, or refused in words."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.encaps import generate_frames
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from datamodules.images.masks import read_mask
from datamodules.images.pixels import read_image
from mtmedformer.errors import DataError
from tests.fixtures.dicom_files import claim_syntax, film, lut_item, write_dicom, write_stream

GREY = film(bits=12)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "image.dcm"


def smooth(bits: int) -> np.ndarray:
    """Return a film without noise that uses the whole range of its bits."""
    y, x = np.mgrid[0:1:60j, 0:1:50j]
    level = np.exp(-3 * ((x - 0.4) ** 2 + (y - 0.6) ** 2))
    return np.rint((level - level.min()) / np.ptp(level) * ((1 << bits) - 1)).astype(np.uint16)


def corrections(file: Path) -> list[str]:
    return [step.removeprefix("corrected:") for step in read_image(file).path if step.startswith("corrected:")]


def refusal(file: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_image(file)
    with pytest.raises(DataError):
        read_mask(file)
    message = str(caught.value)
    assert message.startswith(f"{file.name}: ")
    assert "Secret" not in message
    return message


# -- BitsStored, HighBit, PixelRepresentation


@pytest.mark.parametrize("claimed, real", [(10, 12), (11, 12), (8, 12), (12, 14), (12, 16), (15, 16)])
@pytest.mark.parametrize("picture", [film, lambda bits: smooth(bits)])
def test_values_above_bits_stored_that_continue_the_image_are_kept(tmp_path, claimed, real, picture):
    values = picture(bits=real).astype(np.uint16)
    wrong = write_dicom(tmp_path / "wrong.dcm", values, bits=claimed)
    right = write_dicom(tmp_path / "right.dcm", values, bits=real)
    assert corrections(wrong) == ["BitsStored"]
    assert np.array_equal(read_image(wrong).pixels, read_image(right).pixels)
    assert read_image(wrong).bits == real
    assert np.array_equal(read_mask(wrong), values)


@pytest.mark.parametrize("plane", [12, 13, 15])
@pytest.mark.parametrize("declared", [False, True])
def test_overlays_in_any_unused_bit_are_cleared(file, plane, declared):
    values = smooth(12)
    drawn = values | (np.indices(values.shape).sum(axis=0) // 7 % 2 << plane).astype(np.uint16)
    write_dicom(file, drawn, bits=12)
    if declared:
        header = dcmread(file)
        header.add_new(0x60000102, "US", plane)
        header.save_as(file)
    assert np.array_equal(read_mask(file), values)
    assert corrections(file) == []


def test_values_that_fit_neither_reading_are_refused(file):
    steps = np.where(np.arange(50) % 2, 5048, 3000) + np.arange(60)[:, None]  # of 2048 in both readings
    values = steps.astype(np.uint16)
    assert "BitsStored is 12, but the values need 13 bits" in refusal(
        write_dicom(file, values.astype(np.uint16), bits=12)
    )


def test_a_high_bit_without_values_there_is_ignored(tmp_path):
    wrong = write_dicom(tmp_path / "wrong.dcm", GREY, bits=10, HighBit=15)
    assert np.array_equal(read_mask(wrong), GREY)


def test_unsigned_values_that_are_called_signed_are_read_as_unsigned(tmp_path):
    for bits in (12, 16):
        values = smooth(bits)
        wrong = write_dicom(tmp_path / "wrong.dcm", values, bits=bits, PixelRepresentation=1)
        right = write_dicom(tmp_path / "right.dcm", values, bits=bits)
        assert corrections(wrong) == ["PixelRepresentation"]
        assert np.array_equal(read_image(wrong).pixels, read_image(right).pixels)


def test_negative_values_that_are_called_unsigned_are_read_as_signed(tmp_path):
    values = smooth(12).astype(np.int16) - 2048
    wrong = write_dicom(tmp_path / "wrong.dcm", values, bits=12, PixelRepresentation=0)
    right = write_dicom(tmp_path / "right.dcm", values, bits=12)
    assert corrections(wrong) == ["PixelRepresentation"]
    assert np.array_equal(read_image(wrong).pixels, read_image(right).pixels)


def test_signed_values_across_zero_stay_signed(file):
    values = film(bits=16, signed=True) // 8
    write_dicom(file, values)
    assert np.array_equal(read_mask(file), values)
    assert corrections(file) == []


# -- padding


@pytest.mark.parametrize("bits, padding", [(16, 65535), (12, 65535), (12, 63536)])
def test_padding_does_not_decide_the_display_range(tmp_path, bits, padding):
    values = film(bits=12) // 2
    padded = values.copy()
    padded[:, :5] = padding
    file = write_dicom(tmp_path / "a.dcm", padded, bits=bits, Modality="MG", PixelPaddingValue=padding)
    read = read_image(file)
    assert read.path[-1] == "padding"
    assert not read.pixels[:, :5].any()
    inside = values[:, 5:].astype(float)
    expected = inside / 4095 if "range:stored" in read.path else (inside - inside.min()) / np.ptp(inside)
    assert read.pixels[:, 5:] == pytest.approx(expected, abs=1e-6)


def test_negative_padding_of_unsigned_values_is_found(file):
    values = film(bits=12)
    values[:5] = 65536 - 2000
    write_dicom(file, values, bits=12, PixelPaddingValue=63536)
    header = dcmread(file)
    header.add_new("PixelPaddingValue", "SS", -2000)
    header.save_as(file)
    read = read_image(file)
    assert not read.pixels[:5].any()
    assert read.pixels[5:] == pytest.approx(values[5:] / 4095, abs=1e-6)


def test_padding_cannot_be_the_whole_image(file):
    write_dicom(file, GREY, bits=12, PixelPaddingValue=0, PixelPaddingRangeLimit=4095)
    assert "padding:broken" in read_image(file).path
    assert read_image(file).pixels == pytest.approx(GREY / 4095)


def test_a_window_that_only_padding_reaches_is_not_used(file):
    values = GREY.copy()
    values[:5] = 4095
    values[5:] //= 4
    write_dicom(file, values, bits=12, WindowCenter=4000, WindowWidth=100, PixelPaddingValue=4095)
    assert "window:0:outside" in read_image(file).path


# -- sizes


@pytest.mark.parametrize(
    "attributes",
    [
        {"Rows": 20},
        {"Rows": 39},
        {"Rows": 41},
        {"Columns": 31},
        {"Columns": 33},
        {"Columns": 21},
        {"Rows": 32, "Columns": 32},
        {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7},
        {"BitsAllocated": 32, "BitsStored": 32, "HighBit": 31},
    ],
)
def test_a_size_that_does_not_fit_the_pixel_data_is_refused(file, attributes):
    assert "but Rows x Columns" in refusal(write_dicom(file, GREY, **attributes))


@pytest.mark.parametrize("name", ["Rows", "Columns"])
def test_black_borders_do_not_hide_a_wrong_size(file, name):
    values = GREY.copy()
    values[-12:] = values[:, -6:] = 0
    write_dicom(file, values, bits=12, **{name: values.shape[name == "Columns"] - 4})
    assert "cut or sheared" in refusal(file)


@pytest.mark.parametrize("zeros", [0, 2, 10, 64, 130])
def test_zeros_after_the_image_are_padding(file, zeros):
    content = GREY.tobytes() + bytes(zeros)
    write_dicom(file, GREY, bits=12, PixelData=content)
    assert np.array_equal(read_mask(file), GREY)


def test_other_bytes_after_the_image_are_not(file):
    assert "cut or sheared" in refusal(write_dicom(file, GREY, bits=12, PixelData=GREY.tobytes() + b"abcdefgh"))


def test_one_frame_that_is_called_many_is_read(tmp_path):
    for syntax in (ExplicitVRLittleEndian, RLELossless, JPEG2000Lossless):
        file = write_dicom(tmp_path / "a.dcm", GREY, syntax, bits=12)
        header = dcmread(file)
        header.NumberOfFrames = 7
        header.save_as(file)
        assert corrections(file) == ["NumberOfFrames"]
        assert np.array_equal(read_mask(file), GREY)


def test_many_frames_that_are_called_one_are_refused(tmp_path):
    plain = write_dicom(tmp_path / "a.dcm", np.vstack([GREY] * 3), bits=12, Rows=GREY.shape[0])
    assert "cut or sheared" in refusal(plain)
    stream = dcmread(write_dicom(tmp_path / "b.dcm", GREY, JPEG2000Lossless, bits=12)).PixelData
    frame = next(generate_frames(stream, number_of_frames=1))
    both = write_stream(tmp_path / "c.dcm", [b"", frame, frame], *GREY.shape, JPEG2000Lossless, bits=12)
    assert "2 compressed frames, but NumberOfFrames is 1" in refusal(both)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, JPEG2000Lossless])
def test_samples_that_contradict_the_pixels_are_corrected(file, syntax):
    write_dicom(file, GREY, syntax, bits=12)
    header = dcmread(file)
    header.SamplesPerPixel = 3
    header.save_as(file)
    assert corrections(file) == ["SamplesPerPixel"]
    assert np.array_equal(read_mask(file), GREY)


def test_samples_that_the_pixels_do_not_decide_are_refused(tmp_path):
    one = write_dicom(tmp_path / "1.dcm", GREY, bits=12, SamplesPerPixel=1000)
    assert "SamplesPerPixel is 1000" in refusal(one)
    three = write_dicom(tmp_path / "3.dcm", GREY, bits=12, PhotometricInterpretation="RGB")
    assert "SamplesPerPixel is 1, but the image is RGB" in refusal(three)


# -- functional groups


def grouped(**macros: dict[str, object]) -> list[Dataset]:
    group = Dataset()
    for sequence, attributes in macros.items():
        macro = Dataset()
        for key, value in attributes.items():
            setattr(macro, key, value)
        setattr(group, sequence, [macro])
    return [group]


def test_functional_groups_have_window_rescale_spacing_and_side(tmp_path):
    shared = grouped(
        FrameVOILUTSequence={"WindowCenter": 900, "WindowWidth": 2000, "VOILUTFunction": "LINEAR_EXACT"},
        PixelMeasuresSequence={"PixelSpacing": [0.1, 0.2]},
        PixelValueTransformationSequence={"RescaleSlope": 2, "RescaleIntercept": -10},
        FrameAnatomySequence={"FrameLaterality": "R"},
    )
    enhanced = write_dicom(tmp_path / "e.dcm", GREY, bits=12, NumberOfFrames=1, SharedFunctionalGroupsSequence=shared)
    plain = write_dicom(
        tmp_path / "p.dcm", GREY, bits=12, WindowCenter=900, WindowWidth=2000, VOILUTFunction="LINEAR_EXACT",
        PixelSpacing=[0.1, 0.2], RescaleSlope=2, RescaleIntercept=-10, ImageLaterality="R",
    )  # fmt: skip
    read, expected = read_image(enhanced), read_image(plain)
    assert np.array_equal(read.pixels, expected.pixels)
    assert (read.path, read.spacing, read.laterality) == (expected.path, expected.spacing, expected.laterality)


def test_the_frames_own_group_goes_first(file):
    groups = {
        "SharedFunctionalGroupsSequence": grouped(
            FrameVOILUTSequence={"WindowCenter": 5, "WindowWidth": 9}, PixelMeasuresSequence={"PixelSpacing": [1, 1]}
        ),
        "PerFrameFunctionalGroupsSequence": grouped(FrameVOILUTSequence={"WindowCenter": 900, "WindowWidth": 2001}),
    }
    write_dicom(file, GREY, bits=12, WindowCenter=1, WindowWidth=2, **groups)
    assert read_image(file).pixels == pytest.approx(np.clip((GREY - 899.5) / 2000 + 0.5, 0, 1), abs=1e-6)
    assert read_image(file).spacing == (1, 1)


def test_a_frames_own_voi_lut_is_used(file):
    shared = grouped(FrameVOILUTSequence={"VOILUTSequence": [lut_item(0, np.arange(4096) * 16)]})
    write_dicom(file, GREY, bits=12, SharedFunctionalGroupsSequence=shared)
    assert "voi-lut:0" in read_image(file).path


def test_empty_groups_change_nothing(file):
    write_dicom(file, GREY, bits=12, SharedFunctionalGroupsSequence=[], PerFrameFunctionalGroupsSequence=[Dataset()])
    assert np.array_equal(read_image(file).pixels, (GREY / 4095).astype(np.float32))


# -- window, rescale, LUT, spacing


@pytest.mark.parametrize(
    "attributes, step",
    [
        ({"WindowCenter": [100, 900], "WindowWidth": [0, 2001]}, "window:1:LINEAR"),
        ({"WindowCenter": [1e6, 900], "WindowWidth": [10, 2001]}, "window:1:LINEAR"),
        ({"WindowCenter": "", "WindowWidth": ""}, "range:stored"),
        ({"WindowCenter": 100, "WindowWidth": ""}, "range:stored"),
        ({"RescaleSlope": 0, "RescaleIntercept": 5, "WindowCenter": 900, "WindowWidth": 2001}, "window:0:LINEAR"),
        ({"RescaleSlope": "", "RescaleIntercept": ""}, "range:stored"),
    ],
)
def test_unusable_window_and_rescale_are_passed_over(file, attributes, step):
    read = read_image(write_dicom(file, GREY, bits=12, **attributes))
    assert read.path[-1] == step
    windowed = np.clip((GREY - 899.5) / 2000 + 0.5, 0, 1)
    assert read.pixels == pytest.approx(windowed if "window" in step else GREY / 4095, abs=1e-6)


@pytest.mark.parametrize("count", [100, 5000])
def test_a_lut_of_another_length_than_its_descriptor_is_not_used(file, count):
    item = lut_item(0, np.arange(4096))
    item.LUTDescriptor = [count, 0, 12]
    read = read_image(write_dicom(file, GREY, bits=12, VOILUTSequence=[item]))
    assert read.path[1:] == ("voi-lut:0:broken", "range:stored")


@pytest.mark.parametrize("spacing", [[0, 0], [-0.1, 0.1], [0.1, 0], [1e-9, 1e-9], [5000, 5000], ["", ""]])
def test_an_impossible_spacing_is_unknown(file, spacing):
    assert read_image(write_dicom(file, GREY, bits=12, PixelSpacing=spacing)).spacing is None
    both = {"PixelSpacing": spacing, "ImagerPixelSpacing": [0.2, 0.3]}
    assert read_image(write_dicom(file, GREY, bits=12, **both)).spacing == (0.2, 0.3)


# -- damaged envelopes of complete images


def frame_of(file: Path) -> bytes:
    return next(generate_frames(dcmread(file).PixelData, number_of_frames=1))


SYNTAXES = [JPEG2000Lossless, RLELossless, JPEGLSLossless]


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("table", [b"", b"\x9f\x86\x01\0", bytes(range(40)), None])
def test_the_offset_table_of_a_single_frame_is_not_used(tmp_path, syntax, table):
    frame = frame_of(write_dicom(tmp_path / "a.dcm", GREY, syntax, bits=12))
    items = [frame] if table is None else [table, frame]
    file = write_stream(tmp_path / "b.dcm", items, *GREY.shape, syntax, bits=12)
    assert np.array_equal(read_mask(file), GREY)


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_fragments_of_any_length_are_joined(tmp_path, syntax):
    frame = frame_of(write_dicom(tmp_path / "a.dcm", GREY, syntax, bits=12))
    pieces = [b"", frame[:101], frame[101:300], frame[300:]]
    file = write_stream(tmp_path / "b.dcm", pieces, *GREY.shape, syntax, bits=12)
    assert np.array_equal(read_mask(file), GREY)


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("after", [bytes(100), b"\xff" * 31, b"garbage after the stream"])
def test_bytes_after_the_end_marker_are_not_part_of_the_image(tmp_path, syntax, after):
    frame = frame_of(write_dicom(tmp_path / "a.dcm", GREY, syntax, bits=12))
    file = write_stream(tmp_path / "b.dcm", [b"", frame + after], *GREY.shape, syntax, bits=12)
    assert np.array_equal(read_mask(file), GREY)


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_a_missing_delimiter_is_added(tmp_path, syntax):
    file = write_dicom(tmp_path / "a.dcm", GREY, syntax, bits=12)
    file.write_bytes(file.read_bytes().removesuffix(b"\xfe\xff\xdd\xe0\0\0\0\0"))
    assert corrections(file) == ["delimiter"]
    assert np.array_equal(read_mask(file), GREY)
    file.write_bytes(file.read_bytes()[:-200])
    assert "incomplete, its last fragment lacks" in refusal(file)


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLSLossless])
def test_a_stream_that_ends_early_is_refused(tmp_path, syntax):
    frame = frame_of(write_dicom(tmp_path / "a.dcm", GREY, syntax, bits=12))
    file = write_stream(tmp_path / "b.dcm", [b"", frame[: len(frame) // 2 * 2 - 200]], *GREY.shape, syntax, bits=12)
    assert "ends early" in refusal(file)


@pytest.mark.parametrize("group_length", ["right", "missing", "wrong"])
@pytest.mark.parametrize("wrapper", [-15, 15])
def test_deflated_files_are_read_whatever_their_group_length(tmp_path, group_length, wrapper):
    file = write_dicom(tmp_path / "a.dcm", GREY, DeflatedExplicitVRLittleEndian, bits=12)
    content = file.read_bytes()
    end = 144 + int.from_bytes(content[140:144], "little")
    plain = zlib.decompressobj(-15).decompress(content[end:])
    packer = zlib.compressobj(wbits=wrapper)
    packed = packer.compress(plain) + packer.flush()
    length = {"right": content[132:144], "missing": b"", "wrong": content[132:140] + b"\x07\0\0\0"}[group_length]
    file.write_bytes(content[:132] + length + content[144:end] + packed)
    assert np.array_equal(read_mask(file), GREY)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless, JPEG2000Lossless])
def test_bytes_after_the_pixel_data_are_not_parsed(tmp_path, syntax):
    file = write_dicom(tmp_path / "a.dcm", GREY, syntax, bits=12)
    for garbage in (
        bytes(64),
        b"\xff" * 50,
        b"trailing text of a copy program",
        b"\xe0\x7f\x10\0OW\0\0\xff\xff\xff\xff",
    ):
        other = tmp_path / "b.dcm"
        other.write_bytes(file.read_bytes() + garbage)
        assert np.array_equal(read_mask(other), GREY)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_files_without_preamble_or_meta_information_are_read(tmp_path, syntax):
    bare = write_dicom(tmp_path / "bare.dcm", GREY, syntax, bits=12, preamble=False)
    assert np.array_equal(read_mask(bare), GREY)
    cut = write_dicom(tmp_path / "cut.dcm", GREY, syntax, bits=12)
    cut.write_bytes(cut.read_bytes()[128:])
    assert np.array_equal(read_mask(cut), GREY)


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLSLossless])
def test_a_stream_states_its_own_syntax(tmp_path, syntax):
    file = write_dicom(tmp_path / "a.dcm", GREY, syntax, bits=12)
    content = file.read_bytes()
    bare = tmp_path / "bare.dcm"
    bare.write_bytes(content[144 + int.from_bytes(content[140:144], "little") :])
    assert np.array_equal(read_mask(bare), GREY)
    for other in (JPEGLosslessSV1, ExplicitVRLittleEndian):
        claim_syntax(file, other)
        assert corrections(file) == ["TransferSyntaxUID"]
        assert np.array_equal(read_mask(file), GREY)


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless, JPEGLosslessSV1])
def test_uncompressed_pixels_that_are_called_compressed_are_read(file, syntax):
    claim_syntax(write_dicom(file, GREY, bits=12), syntax)
    assert corrections(file) == ["TransferSyntaxUID"]
    assert np.array_equal(read_mask(file), GREY)


def test_explicit_and_implicit_may_be_mixed_up(tmp_path):
    both = (ImplicitVRLittleEndian, ExplicitVRLittleEndian)
    for written, claimed in (both, both[::-1]):
        file = claim_syntax(write_dicom(tmp_path / "a.dcm", GREY, written, bits=12), claimed)
        assert np.array_equal(read_mask(file), GREY)
