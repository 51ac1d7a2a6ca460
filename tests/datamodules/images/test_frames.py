"""Frames of multi-frame DICOM files: pixels, functional groups, names in tables and in ``predict``, 12-bit JPEG."""

from __future__ import annotations

import base64
import csv
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.uid import (
    EnhancedMRImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGExtended12Bit,
    RLELossless,
    UltrasoundMultiFrameImageStorage,
)

from datamodules import ImageFolderDataModule, LabelsCSVDataModule
from datamodules.cache.preprocessing import Preprocessing
from datamodules.images.frames import frame_count, named_frame
from datamodules.images.pixels import read_image
from datamodules.images.presets import PlainPreset
from datamodules.labels_csv.columns import ClassColumns
from datamodules.loading.find_images import find_images
from datamodules.records import Record
from mtmedformer.errors import DataError
from tests.fixtures.dicom_files import film, write_dicom, write_frames, write_stream

CINE = np.stack([film(40, 32, bits=12, seed=k) // (k + 1) for k in range(3)])
COLOURS = np.stack([np.dstack([film(40, 32, bits=8, seed=k), film(40, 32, bits=8), 0 * film(40, 32, bits=8)])
                    for k in range(3)])  # fmt: skip


def groups(**macros: dict[str, object]) -> Dataset:
    item = Dataset()
    for name, attributes in macros.items():
        inner = Dataset()
        for key, value in attributes.items():
            setattr(inner, key, value)
        setattr(item, name, [inner])
    return item


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ExplicitVRBigEndian, JPEG2000Lossless, RLELossless])
@pytest.mark.parametrize("values", [CINE, COLOURS], ids=["grey", "colour"])
def test_each_frame_is_an_image_of_its_own(tmp_path, values, syntax):
    bits = 12 if values.ndim == 3 else 8
    file = write_frames(tmp_path / "a.dcm", values, syntax, bits=bits)
    assert frame_count(file) == 3
    for number, expected in enumerate(values, start=1):
        read = read_image(file, colour=True, frame=number)
        if values.ndim == 3:  # no window: the range of a frame is its own
            high = 4095 if expected.max() > 2047 else expected.max()
            low = 0 if expected.max() > 2047 else expected.min()
            assert read.pixels == pytest.approx((expected - float(low)) / (high - float(low)), abs=1e-6)
        else:
            assert np.array_equal(read.pixels, (expected / 255).astype(np.float32))


def test_a_file_of_frames_needs_a_number_and_an_image_none(tmp_path):
    file = write_frames(tmp_path / "a.dcm", CINE, bits=12)
    with pytest.raises(DataError, match=r"^a\.dcm: NumberOfFrames is 3; name one frame, as in image\.dcm#1"):
        read_image(file)
    for wrong in (0, 4):
        with pytest.raises(DataError, match=rf"^a\.dcm: has no frame {wrong}; its frames are #1 to #3\.$"):
            read_image(file, frame=wrong)
    single = write_dicom(tmp_path / "b.dcm", CINE[0], bits=12)
    assert np.array_equal(read_image(single, frame=1).pixels, read_image(single).pixels)
    assert frame_count(single) == 1
    with pytest.raises(DataError, match=r"^b\.dcm: has no frame 2; it is one image\.$"):
        read_image(single, frame=2)
    picture = tmp_path / "c.pgm"
    picture.write_bytes(b"P5 8 8 255\n" + bytes(64))
    assert frame_count(picture) == 1
    with pytest.raises(DataError, match=r"^c\.pgm: has no frame 1; only DICOM files have frames"):
        read_image(picture, frame=1)


def test_frames_whose_number_contradicts_the_pixel_data(tmp_path):
    """One frame that is called seven is one image; frames that are cut are an error, and none is made up."""
    called = write_dicom(tmp_path / "a.dcm", CINE[0], bits=12, NumberOfFrames=7)
    assert frame_count(called) == 1
    cut = write_frames(tmp_path / "b.dcm", CINE, bits=12)
    header = dcmread(cut)
    header.PixelData = header.PixelData[:-100]
    header.save_as(cut)
    assert frame_count(cut) == 1
    for frame in (1, 3):
        with pytest.raises(DataError, match=r"^b\.dcm: the pixel data are 7580 bytes, but 3 frames of 2560 bytes"):
            read_image(cut, frame=frame)
    coded = write_frames(tmp_path / "c.dcm", CINE, JPEG2000Lossless, bits=12)
    header = dcmread(coded)
    header.NumberOfFrames = 5
    header.save_as(coded)
    with pytest.raises(DataError, match=r"^c\.dcm: NumberOfFrames is 5, but the pixel data hold 3 compressed frames"):
        read_image(coded, frame=2)


def test_frames_of_several_fragments(tmp_path):
    streams = []
    for number in (1, 2, 3):
        one = write_frames(tmp_path / "one.dcm", CINE[number - 1 : number], JPEG2000Lossless, bits=12)
        content = dcmread(one).PixelData
        start = content.index(b"\xff\x4f\xff\x51")
        stream = content[start : content.rindex(b"\xff\xd9") + 2]
        streams += [stream[:100], stream[100:] + b"\0" * (len(stream) % 2)]
    file = write_stream(tmp_path / "a.dcm", [b"", *streams], 40, 32, JPEG2000Lossless, bits=16, NumberOfFrames=3)
    assert frame_count(file) == 3
    plain = write_frames(tmp_path / "p.dcm", CINE, bits=16)
    for number in (1, 2, 3):
        assert np.array_equal(read_image(file, frame=number).pixels, read_image(plain, frame=number).pixels)


def test_window_rescale_and_spacing_are_those_of_the_frame(tmp_path):
    own = [
        groups(
            FrameVOILUTSequence={"WindowCenter": 500 + 100 * k, "WindowWidth": 801, "VOILUTFunction": "LINEAR"},
            PixelValueTransformationSequence={"RescaleSlope": 1 + k, "RescaleIntercept": -10 * k},
        )
        for k in range(2)
    ]
    shared = groups(
        PixelMeasuresSequence={"PixelSpacing": [0.5, 0.25]}, FrameAnatomySequence={"FrameLaterality": "L"},
        FrameVOILUTSequence={"WindowCenter": 90, "WindowWidth": 21, "VOILUTFunction": "LINEAR_EXACT"},
    )  # fmt: skip
    file = write_frames(
        tmp_path / "a.dcm", CINE, bits=12, SOPClassUID=EnhancedMRImageStorage, Modality="MR",
        SharedFunctionalGroupsSequence=[shared], PerFrameFunctionalGroupsSequence=own,
    )  # fmt: skip
    for k in range(2):
        read = read_image(file, frame=k + 1)
        rescaled = CINE[k] * (1.0 + k) - 10 * k
        assert read.pixels == pytest.approx(np.clip((rescaled - (500 + 100 * k - 0.5)) / 800 + 0.5, 0, 1), abs=1e-6)
        assert (read.spacing, read.laterality) == ((0.5, 0.25), "L")
    third = read_image(file, frame=3)  # it has no groups of its own
    assert third.pixels == pytest.approx(np.clip((CINE[2] - 90.0) / 21 + 0.5, 0, 1), abs=1e-6)


@pytest.mark.parametrize("name", ["emri_small", "emri_small_RLE", "emri_small_jpeg_2k_lossless",
                                  "emri_small_jpeg_ls_lossless", "emri_small_big_endian", "SC_rgb_rle_2frame",
                                  "OBXXXX1A_rle_2frame", "OBXXXX1A_expb_2frame", "color3d_jpeg_baseline",
                                  "examples_ybr_color", "eCT_Supplemental"])  # fmt: skip
def test_frames_of_known_files_are_those_of_pydicom(name):
    if (found := get_testdata_file(f"{name}.dcm", download=False)) is None:
        pytest.skip(f"{name} not here: install pydicom-data")
    file, header = Path(str(found)), dcmread(str(found))
    count = int(header.NumberOfFrames)
    assert frame_count(file) == count
    first, last = (read_image(file, colour=True, frame=k) for k in (1, count))
    assert first.pixels.shape[:2] == last.pixels.shape[:2] == (header.Rows, header.Columns)
    if header.SamplesPerPixel == 3:
        assert last.pixels == pytest.approx(header.pixel_array[-1] / 255, abs=1e-6)
    if name.startswith("emri"):
        values = header.pixel_array[-1].astype(float)
        assert np.corrcoef(values.ravel(), last.pixels.ravel())[0, 1] > 0.9


# --- names


def test_named_frames(tmp_path):
    (tmp_path / "odd#2").write_bytes(b"x")
    assert named_frame(tmp_path / "a.dcm") == (tmp_path / "a.dcm", None)
    assert named_frame(tmp_path / "a.dcm#12") == (tmp_path / "a.dcm", 12)
    assert named_frame(tmp_path / "odd#2") == (tmp_path / "odd#2", None)
    assert named_frame(tmp_path / "x#y") == (tmp_path / "x#y", None)


def test_a_frame_has_its_own_cache_entry(tmp_path):
    file = write_frames(tmp_path / "a.dcm", CINE, bits=12)
    prepared = Preprocessing(PlainPreset(), (40, 32))
    records = [Record(f"a#{k}", file, "p", frame=k) for k in (1, 2, 3)]
    assert len(set(prepared.keys(records))) == 3
    images = [prepared.apply(record).image for record in records]
    assert not np.array_equal(images[0], images[1])


def test_a_table_names_frames(tmp_path):
    write_frames(tmp_path / "cine.dcm", CINE, bits=12, SOPClassUID=UltrasoundMultiFrameImageStorage)
    write_dicom(tmp_path / "one.dcm", film(40, 32, bits=12, seed=9), bits=12)
    rows = [("cine.dcm#1", "a", "well"), ("cine.dcm#3", "a", "sick"), ("one.dcm", "b", "well"),
            ("cine.dcm#4", "a", "well"), ("cine.dcm#3", "a", "sick")]  # fmt: skip
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "patient", "label"), *rows])
    data = LabelsCSVDataModule(
        tmp_path, classification={"health": ClassColumns(column="label")}, image_size=16, num_workers=0, cache_dir=None,
        batch_size=1, max_quarantine_share=0.5, test_split="all",
    )  # fmt: skip
    data.setup("test")
    assert sorted(record.id for record in data.records) == ["cine#1", "cine#3", "one"]
    assert data.frames == {"cine#1": 1, "cine#3": 3}
    assert [(issue.id, issue.file) for issue in data.quarantine.issues] == [("cine#4", "cine.dcm")]
    assert "has no frame 4; its frames are #1 to #3" in data.quarantine.issues[0].detail
    shown = {batch.meta[0].id: batch.image for batch in data.test_dataloader()}
    assert not np.array_equal(shown["cine#1"], shown["cine#3"])
    assert data.original(data.files["cine#3"], data.frames["cine#3"]).shape == (40, 32)


def test_predict_takes_every_frame_or_one(tmp_path):
    folder = tmp_path / "films"
    folder.mkdir()
    cine = write_frames(folder / "cine.dcm", CINE, bits=12)
    write_dicom(folder / "one.dcm", CINE[0], bits=12)
    assert list(find_images([folder]).images) == ["cine.dcm#1", "cine.dcm#2", "cine.dcm#3", "one.dcm"]
    assert find_images([cine.with_name("cine.dcm#2")]).images == {"cine.dcm#2": (cine, 2)}
    assert len(find_images([cine.with_name("cine.dcm#2"), folder]).images) == 4
    with pytest.raises(DataError, match=r"none\.dcm#2: no such file or folder"):
        find_images([folder / "none.dcm#2"])
    data = ImageFolderDataModule([folder, folder / "cine.dcm#9"], image_size=16, num_workers=0)
    data.setup("predict")
    batches = [batch.meta[0].id for batch in data.predict_dataloader()]
    assert batches == ["films/cine.dcm#1", "films/cine.dcm#2", "films/cine.dcm#3", "films/one.dcm"]
    assert [(issue.id, issue.reason) for issue in data.failures] == [("cine.dcm#9", "image unreadable")]


# --- 12-bit JPEG

STREAM = base64.b64decode(  # of libjpeg-turbo, quality 90: 200 x + 70 y
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAMCAgMCAgMDAwMEAwMEBQgFBQQEBQoHBwYIDAoMDAsKCwsNDhIQDQ4RDgsLEBYQERMUFRUVDA8XGBYU"
    "GBIUFRT/wQALDAAQABABAREA/8QAFQABAQAAAAAAAAAAAAAAAAAADA3/xAAcEAAABgMAAAAAAAAAAAAAAAAACgsmN0RUYXL/2gAIAQEAAD8AJBIc"
    "JYGAGng1+dChVIcJYGAGng1+dApUhwlgYAaeDX50KFWhwlgYAaeDX50P/9k="
)


def test_12_bit_jpeg_extended_is_read(tmp_path):
    y, x = np.mgrid[0:16, 0:16]
    attributes = {"bits": 12, "WindowCenter": 2047.5, "WindowWidth": 4095, "VOILUTFunction": "LINEAR_EXACT"}
    file = write_stream(tmp_path / "a.dcm", [b"", STREAM], 16, 16, JPEGExtended12Bit, **attributes)
    read = read_image(file)
    assert read.path[0] == "decode:JPEGExtended12Bit"
    assert np.abs(read.pixels * 4095 - (200 * x + 70 * y)).max() < 3
    twice = write_stream(
        tmp_path / "b.dcm", [b"", STREAM, STREAM], 16, 16, JPEGExtended12Bit, NumberOfFrames=2, **attributes
    )
    assert np.array_equal(read_image(twice, frame=2).pixels, read.pixels)


def test_a_known_12_bit_file_has_the_values_of_other_decoders():
    """The values at two places are those of pydicom's own tests, with another decoder."""
    if (found := get_testdata_file("JPGExtended.dcm", download=False)) is None:
        pytest.skip("JPGExtended not here: install pydicom-data")
    from datamodules.images.dicom import read_stored

    values, lossy = read_stored(Path(str(found)))
    assert (values[420, 140], values[230, 120], lossy) == (244, 95, True)


def test_a_lossy_jpeg_of_16_bits_is_refused(tmp_path):
    wrong = bytearray(STREAM)
    wrong[wrong.index(b"\xff\xc1") + 4] = 16
    file = write_stream(tmp_path / "a.dcm", [b"", bytes(wrong)], 16, 16, JPEGExtended12Bit, bits=12)
    with pytest.raises(DataError, match=r"^a\.dcm: its lossy JPEG stream has 16 bits per sample"):
        read_image(file)
