"""Mutated DICOM and image files: each is read, or refused with its name, soon and in little memory.

The long form, about four minutes: ``MTMEDFORMER_FUZZ=700 pytest tests/fuzz/test_images.py``.
"""

from __future__ import annotations

import io
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.dataelem import RawDataElement
from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut
from pydicom.tag import Tag
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from datamodules.images import decoding_process
from datamodules.images.masks import read_mask
from datamodules.images.pixels import read_image
from mtmedformer.errors import DataError
from tests.fixtures.dicom_files import film, lut_item, write_dicom
from tests.fuzz.mutations import mutate_bytes, seeds

T = TypeVar("T")

SECONDS, MEMORY = 20.0, 300 << 20
"""Largest time in seconds, and growth of memory in bytes, of one small file; real ones take milliseconds."""

SYNTAXES = (
    *(ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian),
    *(RLELossless, JPEG2000Lossless, JPEGLSLossless),
)
REAL = ("CT_small.dcm", "MR_small.dcm", "MR_small_RLE.dcm", "JPEG-LL.dcm", "JPGLosslessP14SV1_1s_1f_8b.dcm")
FORMATS = ("PNG", "TIFF", "TIFF-lzw", "JPEG", "JPEG-progressive", "PPM", "BMP", "GIF", "WEBP", "JPEG2000")


@pytest.fixture(scope="module")
def dicom_files(tmp_path_factory) -> list[bytes]:
    folder, found = tmp_path_factory.mktemp("seeds"), []
    facts = {"WindowCenter": 900, "WindowWidth": 2000, "PixelPaddingValue": 5, "PixelSpacing": [0.1, 0.1]}
    for syntax in SYNTAXES:
        lut = [lut_item(0, np.arange(100))]
        write_dicom(folder / "a.dcm", film(34, 36), syntax, bits=12, VOILUTSequence=lut, **facts)
        found.append((folder / "a.dcm").read_bytes())
    for name in REAL:
        if path := get_testdata_file(name, download=False):
            found.append(Path(str(path)).read_bytes())
    return found


@pytest.fixture(scope="module")
def image_files() -> list[bytes]:
    found = []
    for name in FORMATS:
        kind, _, option = name.partition("-")
        deep = kind in ("PNG", "TIFF", "PPM")
        options = {"lzw": {"compression": "tiff_lzw"}, "progressive": {"progressive": True}}.get(option, {})
        content = io.BytesIO()
        Image.fromarray(film(34, 36, bits=16 if deep else 8)).save(content, kind, **options)
        found.append(content.getvalue())
    found.append(b"P2 4 4 4095\n" + b" ".join(b"%d" % v for v in range(0, 4096, 256)))
    return found


def resident() -> int:
    """Return the resident memory of this process and of its decoding process in bytes."""
    running = decoding_process._running
    processes = ["self", *([running[1].pid] if running and running[1].poll() is None else [])]
    return sum(int(Path(f"/proc/{one}/statm").read_text().split()[1]) * 4096 for one in processes)


def outcome(read: Callable[[Path], T], file: Path) -> T | None:
    """Return what is read from a file; ``None`` where it is refused with its name."""
    try:
        return read(file)
    except DataError as error:
        message = str(error)
    assert message.startswith(f"{file.name}: ")
    return None


def check(file: Path) -> None:
    """Read a file as image and as mask."""
    before, start = resident(), time.monotonic()
    if (image := outcome(read_image, file)) is not None:
        assert image.pixels.dtype == np.float32
        assert image.pixels.ndim == 2
        assert 0 <= image.pixels.min() <= image.pixels.max() <= 1
    if (levels := outcome(read_mask, file)) is not None:
        assert levels.dtype.kind in "iu"
        assert levels.ndim == 2
    assert time.monotonic() - start < SECONDS
    assert resident() - before < MEMORY


@pytest.mark.parametrize("seed", list(seeds(60)))
def test_mutated_dicom_files(tmp_path, dicom_files, seed):
    rng = random.Random(seed)
    (tmp_path / "a.dcm").write_bytes(mutate_bytes(rng.choice(dicom_files), rng))
    check(tmp_path / "a.dcm")


@pytest.mark.parametrize("seed", list(seeds(60)))
def test_mutated_image_files(tmp_path, image_files, seed):
    rng = random.Random(seed)
    (tmp_path / "a.png").write_bytes(mutate_bytes(rng.choice(image_files), rng))
    check(tmp_path / "a.png")


NUMBERS = (0, 1, 2, 3, 7, 8, 10, 12, 15, 16, 17, 31, 32, 33, 34, 36, 63, 64, 255, 4095, 32768, 65535)
FACTS = (
    *("Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
    *("PlanarConfiguration", "PixelPaddingValue", "PixelPaddingRangeLimit"),
)
TEXTS = {
    "NumberOfFrames": ("IS", "", "0", "1", "2", "99999"),
    "PhotometricInterpretation": ("CS", "", "MONOCHROME1", "MONOCHROME2", "RGB", "YBR_FULL", "PALETTE COLOR", "X"),
    "WindowCenter": ("DS", "", "0", "-1e30", "1e30", "100\\200"),
    "WindowWidth": ("DS", "", "0", "-5", "1e-30", "1e30", "10\\20"),
    "RescaleSlope": ("DS", "", "0", "-1", "1e30", "1e-30"),
    "RescaleIntercept": ("DS", "", "-1024", "1e30"),
    "VOILUTFunction": ("LO", "", "SIGMOID", "LINEAR_EXACT", "X"),
    "PixelSpacing": ("DS", "", "0\\0", "-1\\1", "1e9\\1e9", "0.1"),
}


@pytest.mark.parametrize("seed", list(seeds(60)))
def test_contradicting_attributes(tmp_path, seed):
    rng, file = random.Random(seed), tmp_path / "a.dcm"
    syntax = rng.choice((ExplicitVRLittleEndian, RLELossless, JPEG2000Lossless, JPEGLSLossless))
    header = dcmread(write_dicom(file, film(34, 36), syntax, bits=12))
    for _ in range(rng.randint(1, 3)):
        if rng.random() < 0.6:
            name = rng.choice(FACTS)
            kind, value = "US", rng.choice(NUMBERS).to_bytes(2, "little")
        else:
            name = rng.choice(sorted(TEXTS))
            kind, text = TEXTS[name][0], rng.choice(TEXTS[name][1:])
            value = text.encode().ljust(len(text) + len(text) % 2)
        tag = Tag(name)
        header[tag] = RawDataElement(tag, kind, len(value), value, 0, False, True)  # written as it is
    header.save_as(file)
    check(file)


@pytest.mark.parametrize("seed", list(seeds(40)))
def test_the_display_is_that_of_pydicom(tmp_path, seed):
    """Right headers of all kinds: rescale, modality LUT, windows of every function, VOI LUT."""
    rng, file = random.Random(seed), tmp_path / "a.dcm"
    signed = rng.random() < 0.5
    facts: dict[str, object] = {}
    if rng.random() < 0.5:
        facts |= {"RescaleSlope": rng.choice((0.5, 1, 2, -1)), "RescaleIntercept": rng.choice((-1024, 0, 100))}
    elif rng.random() < 0.5:
        facts["ModalityLUTSequence"] = [lut_item(-2048 if signed else 0, (np.arange(4096) * 3) % 65536)]
        facts["ModalityLUTSequence"][0].ModalityLUTType = "US"
    if rng.random() < 0.7 or "ModalityLUTSequence" in facts:
        function = rng.choice(("LINEAR", "LINEAR_EXACT", "SIGMOID"))
        facts |= {"WindowCenter": rng.randint(-500, 2500), "WindowWidth": rng.randint(200, 4000)}
        facts["VOILUTFunction"] = function
    else:
        facts["VOILUTSequence"] = [lut_item(0, np.arange(2000) * 30)]
    write_dicom(file, film(bits=12, signed=signed), rng.choice(SYNTAXES), bits=12, **facts)
    header = dcmread(file)
    values = apply_modality_lut(header.pixel_array, header)
    if "VOILUTSequence" in facts:
        if values.dtype.kind == "f":
            values = np.rint(values).astype(np.int64)
        expected = apply_voi_lut(values, header) / 65535
    else:
        with np.errstate(over="ignore"):
            shown = apply_voi_lut(values.astype(np.float64), header)
            low, high = (apply_voi_lut(np.array([end]), header)[0] for end in (-1e9, 1e9))
        expected = (shown - low) / (high - low)
    read = read_image(file)
    if not any(step.endswith(("outside", "broken")) for step in read.path):
        assert read.pixels == pytest.approx(expected, abs=1e-4)
