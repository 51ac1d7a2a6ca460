"""The display chain of highdicom gives the same pixels: rescale, window, VOI LUT, inversion, palette."""

from __future__ import annotations

import warnings

import highdicom as hd
import numpy as np
import pytest

from datamodules.images.pixels import read_image
from tests.datamodules.images.test_colour import palette
from tests.fixtures.dicom_files import film, lut_item, write_dicom

REFERENCES = {"StudyInstanceUID": "1.2.3", "SeriesInstanceUID": "1.2.3.4"}
WINDOW = {"WindowCenter": 1500, "WindowWidth": 1001}
CASES = {
    "window": WINDOW,
    "exact": {**WINDOW, "VOILUTFunction": "LINEAR_EXACT"},
    "sigmoid": {**WINDOW, "VOILUTFunction": "SIGMOID"},
    # highdicom divides the width by the slope, which is not exact for LINEAR: its range is the width less 1
    "rescale": {
        **WINDOW,
        "VOILUTFunction": "LINEAR_EXACT",
        "RescaleSlope": 2,
        "RescaleIntercept": -500,
        "RescaleType": "US",
    },
    "inverted": {**WINDOW, "PhotometricInterpretation": "MONOCHROME1"},
    "voi-lut": {"VOILUTSequence": [lut_item(0, np.arange(4096) * 65535 // 4095)]},
}


def theirs(file, **options) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return hd.imread(file).get_frames(dtype=np.float64, apply_icc_profile=False, **options)[0]


@pytest.mark.parametrize("name", CASES)
def test_grey_levels_are_those_of_highdicom(tmp_path, name):
    file = write_dicom(tmp_path / "a.dcm", film(bits=12), bits=12, **REFERENCES, **CASES[name])
    expected = theirs(file, apply_voi_transform=True, apply_presentation_lut=True)
    assert np.ptp(expected) > 0.5
    assert read_image(file).pixels == pytest.approx(expected, abs=1e-6)


def test_palette_colours_are_those_of_highdicom(tmp_path):
    attributes = {"PhotometricInterpretation": "PALETTE COLOR", **palette(16)}
    file = write_dicom(tmp_path / "a.dcm", film(bits=8), **REFERENCES, **attributes)
    expected = theirs(file, apply_palette_color_lut=True)
    assert read_image(file, colour=True).pixels == pytest.approx(expected / 65535, abs=1e-4)
