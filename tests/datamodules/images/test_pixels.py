"""Image and mask files of all formats but DICOM, and random damage to files of every format."""

from __future__ import annotations

import io
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
)

from datamodules.images import pixels
from datamodules.images.masks import read_mask
from datamodules.images.pixels import read_image
from mtmedformer.errors import DataError
from tests.fixtures.dicom_files import film, lut_item, write_dicom

LZW = {"compression": "tiff_lzw"}


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
    with pytest.raises(DataError, match=r"a\.png: 200000 x 200000 pixels, over"):
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


# -- random damage: a file is read, or its error names it

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
