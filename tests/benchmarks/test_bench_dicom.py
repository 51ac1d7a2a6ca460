"""``read_image`` against pydicom and numpy by hand, doing the same steps on the same file in the same run."""

from __future__ import annotations

import statistics
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.uid import ExplicitVRLittleEndian, RLELossless

from datamodules.images.pixels import read_image
from tests.fixtures.dicom_files import film, write_dicom
from tests.fixtures.real_data import real

ROUNDS = 15


def by_hand(file: Path) -> np.ndarray:
    """Decode, window or stretch over the stored bits, invert: what a careful script would do."""
    header = dcmread(file)
    pixels = header.pixel_array.astype(np.float32)
    if "RescaleSlope" in header:
        pixels = pixels * np.float32(header.RescaleSlope) + np.float32(header.RescaleIntercept)
    if "WindowCenter" in header:
        centre, width = float(header.WindowCenter), float(header.WindowWidth)
        pixels = np.clip((pixels - (centre - 0.5)) / (width - 1) + 0.5, 0, 1)
    else:
        pixels = pixels / ((1 << header.BitsStored) - 1)
    return 1 - pixels if header.PhotometricInterpretation == "MONOCHROME1" else pixels


def peak(read, file: Path) -> float:
    """Return the most memory in use at once, in bytes per pixel of the image."""
    tracemalloc.start()
    shape = np.shape(getattr(read(file), "pixels", 0)) or by_hand(file).shape
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most / np.prod(shape)


def files(folder: Path) -> dict[str, Path]:
    """Return what can be read here: a large mammogram, a small one in RLE, and real files where there are any."""
    window = {"bits": 12, "WindowCenter": 2000, "WindowWidth": 3000, "PhotometricInterpretation": "MONOCHROME1"}
    found = {
        "plain 3328x2560": write_dicom(folder / "plain.dcm", film(3328, 2560), ExplicitVRLittleEndian, **window),
        "RLE 1664x1280": write_dicom(folder / "rle.dcm", film(1664, 1280), RLELossless, **window),
    }
    for name in ("RG1_UNCR.dcm", "MR2_UNCR.dcm"):
        if path := get_testdata_file(name, download=False):
            found[name] = Path(str(path))
    return found


@pytest.mark.parametrize("name", ["plain 3328x2560", "RLE 1664x1280", "RG1_UNCR.dcm", "MR2_UNCR.dcm"])
def test_reading_is_no_slower_than_by_hand(tmp_path, name, benchmark, capsys):
    available = files(tmp_path)
    if name not in available:
        pytest.skip(f"{name} not here: install pydicom-data")
    compare(available[name], name, benchmark, capsys)


def test_full_size_rle_mammogram_is_no_slower_than_by_hand(benchmark, capsys):
    compare(real("dicom_fixtures", "dicom_raw", "ddsm_P_00820_LCC.dcm"), "DDSM RLE 4736x2624", benchmark, capsys)


def compare(file: Path, name: str, benchmark, capsys) -> None:
    assert np.abs(read_image(file).pixels - by_hand(file)).max() < 1e-4
    ratios = []
    for _ in range(ROUNDS):  # in turn, in processor time: what else the machine does falls on neither
        start = time.process_time()
        read_image(file)
        middle = time.process_time()
        by_hand(file)
        ratios.append((middle - start) / (time.process_time() - middle))
    ratio, ours, theirs = statistics.median(ratios), peak(read_image, file), peak(by_hand, file)
    benchmark.extra_info.update(ratio=ratio, peak_bytes_a_pixel=ours, peak_by_hand=theirs)
    benchmark.pedantic(read_image, (file,), rounds=5)
    with capsys.disabled():
        print(f"\n{name}: {ratio:.2f} of by hand; peak {ours:.1f} against {theirs:.1f} bytes a pixel")
    assert ours < theirs * 1.05
