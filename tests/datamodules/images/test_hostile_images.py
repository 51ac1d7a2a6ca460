"""Small files that would make a decoder allocate gigabytes or compute for minutes: refused in words and soon."""

from __future__ import annotations

import io
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread
from pydicom.encaps import generate_frames
from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit, JPEGLSLossless, RLELossless

from datamodules.images import decoding_process
from datamodules.images.masks import read_mask
from datamodules.images.pixels import read_image
from mtmedformer.errors import DataError
from tests.fixtures.dicom_files import film, write_dicom, write_stream

GREY = film(bits=8)
ROWS, COLUMNS = GREY.shape


def memory() -> int:
    """Return the resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def refused(file: Path, seconds: float = 5.0, mebibytes: int = 100) -> str:
    """Read a file as image and as mask; both must be refused soon and in little memory."""
    before, start = memory(), time.monotonic()
    for read in (read_image, read_mask):
        with pytest.raises(DataError) as caught:
            read(file)
        assert str(caught.value).startswith(f"{file.name}: ")
    assert time.monotonic() - start < seconds
    assert memory() - before < mebibytes << 20
    return str(caught.value)


def stream(folder: Path, syntax: str) -> bytearray:
    file = write_dicom(folder / "seed.dcm", GREY, syntax)
    return bytearray(next(generate_frames(dcmread(file).PixelData, number_of_frames=1)))


def box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", 8 + len(content)) + kind + content


def as_dicom(folder: Path, content: bytes, syntax: str = JPEG2000Lossless) -> Path:
    return write_stream(folder / "a.dcm", [b"", bytes(content)], ROWS, COLUMNS, syntax)


SIGNATURE = b"\0\0\0\x0cjP  \r\n\x87\n"


# -- JPEG 2000


def siz(content: bytearray, field: int, value: int) -> bytearray:
    """Set a 32-bit field of the SIZ segment: 0 Xsiz, 1 Ysiz, 2 XOsiz, 3 YOsiz, 4 XTsiz, 5 YTsiz."""
    at = content.index(b"\xff\x51") + 6 + 4 * field
    content[at : at + 4] = struct.pack(">I", value)
    return content


@pytest.mark.parametrize("before", [b"", b"free", b"junk"])
def test_the_size_of_a_stream_behind_a_box_counts(tmp_path, before):
    big = stream(tmp_path, JPEG2000Lossless)
    for field in (0, 1, 4, 5):
        siz(big, field, 60000)
    skipped = box(before, bytes(5000)) if before else b""
    hidden = SIGNATURE + skipped + box(b"jp2c", big)
    assert "60000 x 60000" in refused(as_dicom(tmp_path, hidden))
    assert "60000 x 60000" in refused(as_dicom(tmp_path, big))
    (tmp_path / "a.jp2").write_bytes(hidden)
    assert "60000 x 60000 pixels, over" in refused(tmp_path / "a.jp2")
    assert "compressed image" in refused(as_dicom(tmp_path, bytes(5000) + big))


def test_a_right_stream_behind_boxes_is_read(tmp_path):
    plain = stream(tmp_path, JPEG2000Lossless)
    assert np.array_equal(read_mask(as_dicom(tmp_path, SIGNATURE + box(b"free", bytes(9)) + box(b"jp2c", plain))), GREY)


def test_two_sizes_in_a_stream_are_refused(tmp_path):
    plain = stream(tmp_path, JPEG2000Lossless)
    at = plain.index(b"\xff\x51")
    size = plain[at : at + 2 + int.from_bytes(plain[at + 2 : at + 4], "big")]
    assert "several headers" in refused(as_dicom(tmp_path, plain[:at] + size + plain[at:]))
    two = SIGNATURE + box(b"jp2c", plain) + box(b"jp2c", plain)
    assert "several JPEG 2000 streams" in refused(as_dicom(tmp_path, two))


def test_components_and_tiles_are_bounded(tmp_path):
    plain = stream(tmp_path, JPEG2000Lossless)
    at = plain.index(b"\xff\x51")
    many = bytearray(plain)
    many[at + 38 : at + 40] = (1000).to_bytes(2, "big")
    many[at + 2 : at + 4] = (38 + 3000).to_bytes(2, "big")
    many[at + 40 : at + 43] = b"\x07\x01\x01" * 1000
    assert "1000 components" in refused(as_dicom(tmp_path, many))
    tiny = siz(siz(bytearray(plain), 4, 1), 5, 1)
    big = siz(siz(bytearray(tiny), 0, 5000), 1, 5000)
    (tmp_path / "a.jp2").write_bytes(big)
    assert "tiles, more than" in refused(tmp_path / "a.jp2")


# -- JPEG and JPEG-LS


def sof(rows: int, columns: int, components: int = 1, marker: int = 0xC0) -> bytes:
    body = struct.pack(">BHHB", 8, rows, columns, components) + b"\1\x11\0" * components
    return bytes([0xFF, marker]) + struct.pack(">H", 2 + len(body)) + body


def jpeg(*extra: bytes, scans: int = 1) -> bytes:
    content = io.BytesIO()
    Image.fromarray(GREY).save(content, "JPEG", quality=95, progressive=scans > 1)
    data = content.getvalue()
    at = data.index(b"\xff\xc2" if scans > 1 else b"\xff\xc0")
    return data[:at] + b"".join(extra) + data[at:]


def test_several_headers_in_a_jpeg_are_refused(tmp_path):
    for content in (jpeg(sof(60000, 60000)), jpeg(sof(ROWS, COLUMNS))):
        assert "several headers" in refused(as_dicom(tmp_path, content, JPEGBaseline8Bit))
        (tmp_path / "a.jpg").write_bytes(content)
        assert "several headers" in refused(tmp_path / "a.jpg")


def test_a_size_in_a_thumbnail_is_no_size_of_the_image(tmp_path):
    hidden = b"\xff\xe2" + struct.pack(">H", 2 + 19) + sof(60000, 60000) + bytes(6)
    (tmp_path / "a.jpg").write_bytes(jpeg(hidden))
    assert read_image(tmp_path / "a.jpg").pixels.shape == GREY.shape


def test_many_scans_are_refused(tmp_path):
    data = jpeg(scans=9)
    at = data.index(b"\xff\xda")
    end = data.index(b"\xff", at + 2 + int.from_bytes(data[at + 2 : at + 4], "big"))
    (tmp_path / "a.jpg").write_bytes(data[:end] + data[at:end] * 5000 + data[end:])
    assert "more than 100 scans" in refused(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes(data)
    assert read_image(tmp_path / "a.jpg").pixels == pytest.approx(GREY / 255, abs=0.1)


def test_size_and_components_of_jpeg_ls_count(tmp_path):
    plain = stream(tmp_path, JPEGLSLossless)
    at = plain.index(b"\xff\xf7")
    for start, value in ((at + 5, 60000), (at + 7, 60000)):
        other = bytearray(plain)
        other[start : start + 2] = value.to_bytes(2, "big")
        assert "compressed image is" in refused(as_dicom(tmp_path, other, JPEGLSLossless))
    other = plain[:at] + sof(ROWS, COLUMNS, 200, 0xF7) + plain[at + 13 :]
    assert "200 components" in refused(as_dicom(tmp_path, other, JPEGLSLossless))


# -- RLE, palettes


def test_a_long_rle_segment_fills_the_image_only(tmp_path):
    header = struct.pack("<16I", 1, 64, *[0] * 14)
    file = write_stream(tmp_path / "a.dcm", [b"", header + b"\x81\x07" * 4_000_000], ROWS, COLUMNS, RLELossless)
    before = memory()
    assert (read_mask(file) == 7).all()
    assert memory() - before < 100 << 20


def test_a_segmented_palette_is_bounded(tmp_path):
    segments = np.array([0, 1, 5] + [1, 65535, 9] * 20_000, "<u2").tobytes()
    colours = {f"{c}PaletteColorLookupTableDescriptor": [256, 0, 16] for c in ("Red", "Green", "Blue")}
    colours |= {f"Segmented{c}PaletteColorLookupTableData": segments for c in ("Red", "Green", "Blue")}
    write_dicom(tmp_path / "a.dcm", GREY, PhotometricInterpretation="PALETTE COLOR", **colours)
    assert "palette is longer" in refused(tmp_path / "a.dcm")


# -- TIFF and EXIF


def tiff(entries: list[tuple[int, int, int, bytes]], tail: bytes = b"", following: int = 0, count: int = 0) -> bytes:
    fields = b"".join(struct.pack("<HHI", tag, kind, number) + value for tag, kind, number, value in entries)
    head = b"II*\0" + struct.pack("<IH", 8, count or len(entries))
    return head + fields + struct.pack("<I", following) + tail


def number(value: int) -> bytes:
    return struct.pack("<I", value)


def grey_tiff(*extra: tuple[int, int, int, bytes], size: int = 8, following: int = 0) -> bytes:
    entries = [
        (256, 3, 1, number(size)), (257, 3, 1, number(size)), (258, 3, 1, number(8)), (259, 3, 1, number(1)),
        (262, 3, 1, number(1)), (273, 4, 1, number(1000)), (277, 3, 1, number(1)), (278, 3, 1, number(size)),
        (279, 4, 1, number(size * size)),
    ]  # fmt: skip
    given = {entry[0]: entry for entry in [*entries, *extra]}
    content = tiff(sorted(given.values()), following=following)
    return content + bytes(1000 - len(content)) + bytes(range(size * size))


@pytest.mark.parametrize(
    "content, message",
    [
        (grey_tiff(following=8), "several pages"),
        (tiff([(256, 3, 1, number(8))] * 10, following=200, tail=bytes(500)), "several pages"),
        (tiff([(256, 3, 1, number(8))], count=60000), "too many entries"),
        (grey_tiff(*((t, 7, 900, number(10)) for t in range(40000, 40050))), "more values than the file has"),
        (grey_tiff((40000, 7, 1 << 31, number(10))), "more values than the file has"),
        (grey_tiff((34665, 4, 1, number(8))), "point to each other"),
        (grey_tiff((273, 4, 200, number(10))), "strips or tiles"),
        (grey_tiff((256, 4, 1, number(1 << 30))), "pixels, over"),
        (grey_tiff((259, 3, 1, number(5)), (256, 4, 1, number(60000)), (257, 4, 1, number(60000))), "pixels, over"),
    ],
)
def test_tiff_directories_are_bounded(tmp_path, content, message):
    (tmp_path / "a.tif").write_bytes(content)
    assert message in refused(tmp_path / "a.tif")


def test_right_tiffs_are_read(tmp_path):
    (tmp_path / "a.tif").write_bytes(grey_tiff())
    assert np.array_equal(read_mask(tmp_path / "a.tif").ravel(), np.arange(64))
    for compression in (None, "tiff_lzw", "tiff_adobe_deflate", "packbits"):
        for order in ("", ">"):
            big = film(300, 200, bits=16)
            Image.fromarray(big.astype(f"{order}u2")).save(tmp_path / "b.tif", compression=compression)
            assert np.array_equal(read_mask(tmp_path / "b.tif"), big)


def test_exif_directories_are_bounded(tmp_path):
    block = tiff([(t, 7, 30000, number(10)) for t in range(40000, 40500)], tail=bytes(40000))
    Image.fromarray(GREY).save(tmp_path / "a.png", exif=b"Exif\0\0" + block)
    assert "more values than the file has" in refused(tmp_path / "a.png")


# -- PNG, PGM, GIF, WebP, BMP


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunk(*one) for one in chunks) + chunk(b"IEND", b"")


ZEROS = zlib.compress(bytes(50_000_000), 9)


@pytest.mark.parametrize(
    "content, message",
    [
        (png(60000, 60000, (b"IDAT", ZEROS)), "60000 x 60000 pixels, over"),
        (png(8, 8, (b"zTXt", b"a\0\0" + ZEROS), (b"IDAT", zlib.compress(bytes(72)))), "cannot be read"),
        (b"P2 8 8 255\n" + b"1" * 2_000_000 + b" 1" * 63, "above the maximum"),
        (b"P2 60000 60000 255\n1 2 3", "is not read"),
        (b"P3 60000 60000 255\n1 2 3", "cannot be read"),
        (b"GIF89a" + struct.pack("<HH", 65535, 65535) + bytes(3) + b";", ""),
        (b"RIFF" + number(30) + b"WEBPVP8X" + number(10) + bytes(4) + b"\xff\xff\xff\xff\xff\xff", "pixels, over"),
        (b"BM" + struct.pack("<IIIIiiHHI", 60, 0, 54, 40, 60000, 60000, 1, 8, 0) + bytes(20), ""),
    ],
)
def test_other_bombs_are_refused(tmp_path, content, message):
    (tmp_path / "a.png").write_bytes(content)
    assert message in refused(tmp_path / "a.png")


def test_a_long_plain_pgm_is_read_up_to_its_size(tmp_path):
    (tmp_path / "a.pgm").write_bytes(b"P2 2 2 9\n1 2 3 4 # four\n" + b"5 " * 5_000_000)
    assert read_mask(tmp_path / "a.pgm").tolist() == [[1, 2], [3, 4]]


# -- the process


def test_memory_of_the_process_is_limited(tmp_path, monkeypatch):
    file = write_dicom(tmp_path / "a.dcm", film(1200, 1000, bits=12), JPEG2000Lossless, bits=12)
    assert read_image(file).bits == 12
    decoding_process._stop()  # a process that has decoded larger images has the memory already
    monkeypatch.setattr(decoding_process, "MEMORY", 0)
    monkeypatch.setattr(decoding_process, "MEMORY_PER_SAMPLE", 1)
    assert "cannot be decoded" in refused(file)
    monkeypatch.undo()
    assert read_image(file).bits == 12  # and the next image is read


def test_a_process_that_hangs_is_stopped(tmp_path, monkeypatch):
    Image.fromarray(GREY).save(tmp_path / "a.webp", lossless=True)
    decoding_process._stop()  # a fresh process takes longer than no time to start
    monkeypatch.setattr(decoding_process, "SECONDS", 0.0)
    with pytest.raises(DataError, match=r"a\.webp: .*did not finish"):
        read_image(tmp_path / "a.webp")
    monkeypatch.undo()
    assert np.array_equal(read_mask(tmp_path / "a.webp"), GREY)
