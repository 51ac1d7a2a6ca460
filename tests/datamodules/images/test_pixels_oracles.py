"""What DCMTK, GDCM and other decoders make of the same files, real and synthetic."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.pixels import get_decoder
from torch.utils.data import DataLoader

from datamodules.images import decoding_process
from datamodules.images.dicom import read_stored
from datamodules.images.masks import read_mask
from datamodules.images.pixels import read_image
from mtmedformer.errors import DataError
from tests.fixtures.dicom_files import film, write_dicom
from tests.fixtures.real_data import real

SMALL = [f"ddsm_P_{n}_{v}" for n in ("00173", "00820") for v in ("LCC", "LMLO", "RCC", "RMLO")]
CHEST = ["cxr_1.2.276.0.7230010.3.1.4.8323329.6904.1517875201.850819", "cxr_Fake_MONOHR1"]


def known(name: str) -> Path:
    """Return a file of pydicom or of pydicom-data, or skip."""
    found = get_testdata_file(name, download=False)
    if found is None:
        pytest.skip(f"{name} not here: install pydicom-data")
    return Path(str(found))


def run(*command: str | Path) -> None:
    if shutil.which(str(command[0])) is None:
        pytest.skip(f"{command[0]} not installed (dcmtk, gdcm-tools)")
    subprocess.run([str(c) for c in command], check=True, capture_output=True)


def dcmtk(file: Path, folder: Path, *options: str, bits: int = 16) -> np.ndarray:
    """Return DCMTK's rendering in [0, 1]."""
    run("dcmj2pnm", *options, "+on2" if bits == 16 else "+on", file, folder / "dcmtk.png")
    return np.asarray(Image.open(folder / "dcmtk.png")).astype(np.float64) / ((1 << bits) - 1)


@pytest.mark.parametrize("name", ["RG1_UNCR.dcm", "RG3_UNCR.dcm", "693_UNCI.dcm", "693_UNCR.dcm", "MR_small.dcm"])
def test_window_and_inversion_agree_with_dcmtk_to_one_part_in_65535(tmp_path, name):
    ours = read_image(known(name))
    assert "window:0:LINEAR" in ours.path
    assert np.abs(ours.pixels - dcmtk(known(name), tmp_path, "+Wi", "1")).max() < 1.01 / 65535


def test_rescaled_mr_agrees_with_dcmtk_to_its_rounding_and_with_the_formula_exactly(tmp_path):
    """DCMTK truncates rescaled values (slope 3.77) to integers before a window of 2000: 1 / 1999 at most."""
    ours = read_image(known("MR2_UNCR.dcm")).pixels
    assert np.abs(ours - dcmtk(known("MR2_UNCR.dcm"), tmp_path, "+Wi", "1")).max() < 1.03 / 1999
    header = dcmread(known("MR2_UNCR.dcm"))
    x = header.pixel_array * float(header.RescaleSlope) + float(header.RescaleIntercept)
    centre, width = float(header.WindowCenter), float(header.WindowWidth)
    assert np.abs(ours - np.clip((x - (centre - 0.5)) / (width - 1) + 0.5, 0, 1)).max() < 1e-6


@pytest.mark.parametrize(
    "name, option, step", [("vlut_04.dcm", "+Wl 1", "voi-lut:0"), ("mlut_18.dcm", "-W", "modality-lut")]
)
def test_luts_agree_with_dcmtk(tmp_path, name, option, step):
    ours = read_image(known(name))
    assert step in ours.path
    theirs = dcmtk(known(name), tmp_path, *option.split())
    assert np.abs(ours.pixels - theirs).max() < 1.01 / 65535
    assert np.corrcoef(ours.pixels.ravel(), theirs.ravel())[0, 1] > 0.99999


@pytest.mark.parametrize("name", SMALL)
def test_mammograms_agree_with_dcmtk(tmp_path, name):
    file = real("dicom_fixtures", "dicom_small", f"{name}.dcm")
    ours = read_image(file)
    assert (ours.bits, ours.view, ours.laterality) == (16, name.split("_")[-1][1:], name.split("_")[-1][0])
    assert np.abs(ours.pixels - dcmtk(file, tmp_path, "-W")).max() < 1.01 / 65535


def test_full_size_rle_mammogram_agrees_with_dcmtk(tmp_path):
    file = real("dicom_fixtures", "dicom_raw", "ddsm_P_00820_LCC.dcm")
    ours = read_image(file)
    assert ours.path == ("decode:RLELossless", "range:stored")
    assert ours.pixels.shape == (4736, 2624)
    assert np.abs(ours.pixels - dcmtk(file, tmp_path, "-W")).max() < 1.01 / 65535


@pytest.mark.parametrize("name", CHEST)
def test_8_bit_jpeg_chest_films_agree_with_dcmtk(tmp_path, name):
    """Its decoder agrees exactly; its rendering to one of 255 levels, since it stretches 8-bit images by 256."""
    file = real("dicom_fixtures", "dicom_raw", f"{name}.dcm")
    ours = read_image(file)
    assert (ours.bits, ours.view, ours.spacing) == (8, "PA", (0.168, 0.168))
    assert ("invert:MONOCHROME1" in ours.path) == ("MONOHR1" in name)
    run("dcmdjpeg", file, tmp_path / "raw.dcm")
    stored = dcmread(tmp_path / "raw.dcm").pixel_array
    level = stored / 255 if "MONOHR1" not in name else 1 - stored / 255
    assert np.abs(ours.pixels - level).max() < 1e-6
    assert np.abs(ours.pixels - dcmtk(file, tmp_path, "-W", bits=8)).max() < 1.01 / 255


def test_the_two_chest_fixtures_are_each_others_negative():
    first, second = (read_image(real("dicom_fixtures", "dicom_raw", f"{n}.dcm")).pixels for n in CHEST)
    assert first + second == pytest.approx(np.ones_like(first), abs=1e-6)


@pytest.mark.parametrize("name", ["RG1", "RG3", "MR2", "693"])
@pytest.mark.parametrize("lossy", [False, True])
def test_jpeg_2000_twin_is_the_uncompressed_image(name, lossy):
    plain, coded = known(f"{name}_UNCR.dcm"), known(f"{name}_J2K{'I' if lossy else 'R'}.dcm")
    if lossy:
        first, second = read_image(plain).pixels.ravel(), read_image(coded).pixels.ravel()
        assert np.corrcoef(first, second)[0, 1] > 0.85  # 693 is compressed hard and shown in a window of 100 HU
    else:
        assert np.array_equal(read_mask(plain), read_mask(coded))
        assert np.array_equal(read_image(plain).pixels, read_image(coded).pixels)


@pytest.mark.parametrize("name", ["MR2_J2KR.dcm", "RG3_J2KR.dcm", "MR_small_jpeg_ls_lossless.dcm", "MR_small_RLE.dcm"])
def test_every_installed_decoder_agrees(name):
    header = dcmread(known(name))
    decoder = get_decoder(header.file_meta.TransferSyntaxUID)
    assert decoder.available_plugins
    for plugin in decoder.available_plugins:
        assert np.array_equal(decoder.as_array(header, index=0, decoding_plugin=plugin)[0], read_mask(known(name))), (
            plugin
        )


ENCODERS = {
    "JPEGLosslessSV1": ("dcmcjpeg", "+e1"),
    "JPEGLossless": ("dcmcjpeg", "+el"),
    "JPEG2000Lossless": ("gdcmconv", "--j2k"),
    "JPEGLSLossless": ("gdcmconv", "--jpegls"),
    "RLELossless": ("dcmcrle",),
}


@pytest.mark.parametrize("syntax", ENCODERS)
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [12, 16])
def test_files_encoded_by_others_decode_bit_for_bit(tmp_path, syntax, signed, bits):
    if syntax.startswith("JPEGLossless") and signed:
        pytest.skip("dcmcjpeg makes signed pixels unsigned")
    stored = film(70, 50, bits=bits, signed=signed)
    source = write_dicom(
        tmp_path / "plain.dcm", stored, bits=bits, Modality="MG", PhotometricInterpretation="MONOCHROME1"
    )
    run(*ENCODERS[syntax], source, tmp_path / "coded.dcm")
    assert read_image(tmp_path / "coded.dcm").path[0] == f"decode:{syntax}"
    assert np.array_equal(read_mask(tmp_path / "coded.dcm"), stored)
    assert np.array_equal(read_image(tmp_path / "coded.dcm").pixels, read_image(source).pixels)


def test_jpeg_baseline_agrees_with_dcmtk(tmp_path):
    source = write_dicom(tmp_path / "plain.dcm", film(64, 64, bits=8))
    run("dcmcjpeg", "+eb", source, tmp_path / "coded.dcm")
    run("dcmdjpeg", tmp_path / "coded.dcm", tmp_path / "again.dcm")
    stored, lossy = read_stored(tmp_path / "coded.dcm")
    assert lossy
    assert np.array_equal(stored, dcmread(tmp_path / "again.dcm").pixel_array)


def test_12_bit_lossy_jpeg_error_names_the_fix(tmp_path):
    source = write_dicom(tmp_path / "plain.dcm", film(64, 64, bits=12), bits=12)
    run("dcmcjpeg", "+ee", source, tmp_path / "coded.dcm")
    with pytest.raises(DataError, match=r"coded\.dcm: TransferSyntaxUID JPEG Extended .*dcmdjpeg"):
        read_image(tmp_path / "coded.dcm")
    run("dcmdjpeg", tmp_path / "coded.dcm", tmp_path / "again.dcm")
    assert read_image(tmp_path / "again.dcm").bits == 12


def test_damaged_lossless_jpeg_crashes_gdcm_but_not_this_process(tmp_path):
    """Bytes of the JPEG header at random: in the same process GDCM would abort or segfault on some of these."""
    stored = film(64, 64, bits=12)
    source = write_dicom(tmp_path / "plain.dcm", stored, bits=12)
    run("dcmcjpeg", "+e1", source, tmp_path / "good.dcm")
    good = (tmp_path / "good.dcm").read_bytes()
    start, random = good.index(b"\xff\xd8\xff"), np.random.default_rng(0)
    file, refused = tmp_path / "bad.dcm", 0
    for _ in range(30):
        content = bytearray(good)
        for at in random.integers(start + 2, start + 80, 3):
            content[at] = random.integers(256)
        file.write_bytes(content)
        try:
            read_image(file)
        except DataError as error:
            refused += "bad.dcm" in str(error)
    assert refused > 5
    assert np.array_equal(read_mask(tmp_path / "good.dcm"), stored)  # and the next file reads


def test_forked_workers_each_have_their_own_gdcm(tmp_path):
    """As data loader workers do; sharing the parent's pipes would mix the answers up."""
    stored = [film(64, 48, bits=12, seed=i) for i in range(6)]
    for i, pixels in enumerate(stored):
        run("dcmcjpeg", "+e1", write_dicom(tmp_path / "plain.dcm", pixels, bits=12), tmp_path / f"{i}.dcm")
    files = [tmp_path / f"{i}.dcm" for i in range(6)]
    assert np.array_equal(read_mask(files[0]), stored[0])  # the parent's is running
    loader = DataLoader(files, batch_size=None, num_workers=2, multiprocessing_context="fork", collate_fn=read_mask)
    for read, expected in zip(loader, stored, strict=True):
        assert np.array_equal(read, expected)


def test_gdcm_is_stopped_at_the_time_limit(tmp_path, monkeypatch):
    source = write_dicom(tmp_path / "plain.dcm", film(64, 64, bits=12), bits=12)
    run("dcmcjpeg", "+e1", source, tmp_path / "good.dcm")
    decoding_process._stop()  # a fresh process takes longer than no time to start
    monkeypatch.setattr(decoding_process, "SECONDS", 0.0)
    with pytest.raises(DataError, match="did not finish"):
        read_image(tmp_path / "good.dcm")
    monkeypatch.undo()
    assert read_image(tmp_path / "good.dcm").bits == 12


COLOUR = ("SC_rgb_rle", "examples_palette", "SC_rgb_jpeg_dcmtk", "examples_jpeg2k", "SC_rgb_gdcm_KY")
NO_SINGLE_IMAGE = ("rtdose", "test-SR", "MR_truncated", "rtplan", "examples_ybr_color")
DAMAGED = ("JPEG2000-embedded-sequence-delimiter",)  # in the middle of the size of its image
ODD = ("image_dfl", "MR_small_bigendian", "MR_small_implicit", "MR_small_padded", "liver_1frame", "liver_expb_1frame")
ODDER = ("rtdose_expb_1frame", "J2K_pixelrep_mismatch", "JPEGLSNearLossless_16", "JPEG2000")


@pytest.mark.parametrize("name", COLOUR)
def test_real_colour_is_refused(name):
    with pytest.raises(DataError, match=rf"^{name}\.dcm: .*colour image"):
        read_image(known(f"{name}.dcm"))


@pytest.mark.parametrize("name", NO_SINGLE_IMAGE + DAMAGED)
def test_several_images_in_a_file_are_refused(name):
    with pytest.raises(DataError, match=rf"^{name}\.dcm: "):
        read_image(known(f"{name}.dcm"))


@pytest.mark.parametrize("name", ODD + ODDER)
def test_unusual_valid_files_are_read(name):
    ours = read_image(known(f"{name}.dcm")).pixels
    assert ours.min() >= 0
    assert ours.max() <= 1
    assert ours.min() < ours.max()


def test_masks_of_segmentations_are_zero_and_one():
    assert np.unique(read_mask(known("liver_1frame.dcm"))).tolist() == [0, 1]
    assert np.array_equal(read_mask(known("liver_1frame.dcm")), read_mask(known("liver_expb_1frame.dcm")))
