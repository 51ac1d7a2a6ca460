"""Presentation states and secondary captures: geometry, references, colours and pixels, read back from the files."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
from pydicom import dcmread

from callbacks.prediction.dicom.objects import DicomObjects
from callbacks.prediction.dicom.presentation_state import MOST_POINTS, outlines
from datamodules.images.pixels import read_image
from mtmedformer.batch import Task
from tests.callbacks.prediction.test_dicom import OBJECTS, REFERENCES, frames_of, result_of, saved, source
from tests.fixtures.dicom_files import film, write_dicom

TASKS = {
    "health": Task("health", "classification", ("normal", "an odd class with a long name")),
    "lesions": Task("lesions", "detection", ("nodule", "odd thing")),
    "lungs": Task("lungs", "segmentation", ("lung", "scar")),
}
VIEWERS: DicomObjects = replace(OBJECTS, tasks=TASKS, kinds=("gsps", "sc"))


def read(file, frame=None):
    return read_image(file, colour=True, frame=frame).pixels


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of highdicom on reading what it wrote
        yield


@pytest.mark.parametrize("photometric, shape", [("MONOCHROME2", "IDENTITY"), ("MONOCHROME1", "INVERSE")])
def test_a_presentation_state_has_boxes_outlines_and_the_display_of_the_image(tmp_path, photometric, shape):
    window = {"WindowCenter": 1000, "WindowWidth": 500, "PhotometricInterpretation": photometric}
    file = source(tmp_path, **window)
    header, made = dcmread(file), dcmread(saved(VIEWERS.build(file, result_of(file), None, read), tmp_path)["gsps"])
    assert (made.Modality, made.PresentationLUTShape) == ("PR", shape)
    assert (made.StudyInstanceUID, made.PatientID) == (header.StudyInstanceUID, header.PatientID)
    reference = made.ReferencedSeriesSequence[0]
    assert reference.SeriesInstanceUID == header.SeriesInstanceUID
    assert reference.ReferencedImageSequence[0].ReferencedSOPInstanceUID == header.SOPInstanceUID
    voi = made.SoftcopyVOILUTSequence[0]
    assert (voi.WindowCenter, voi.WindowWidth) == (1000, 500)
    layers = {layer.GraphicLayer: layer.get("GraphicLayerDescription") for layer in made.GraphicLayerSequence}
    box, lung, text = made.GraphicAnnotationSequence  # the low score and the empty mask are not drawn
    assert [layers[one.GraphicLayer] for one in (box, lung)] == ["lesions: nodule", "lungs: lung"]
    (rectangle,) = box.GraphicObjectSequence
    corners = np.array(rectangle.GraphicData).reshape(-1, 2)
    assert [*corners.min(axis=0), *corners.max(axis=0)] == pytest.approx([1.5, 2.5, 10, 20])
    assert rectangle.GraphicAnnotationUnits == "PIXEL"
    assert box.TextObjectSequence[0].UnformattedTextValue == "nodule 0.90"
    (outline,) = lung.GraphicObjectSequence
    points = np.array(outline.GraphicData).reshape(-1, 2)
    assert [*points.min(axis=0), *points.max(axis=0)] == pytest.approx([5, 10, 25, 30])
    assert "normal 0.30" in text.TextObjectSequence[0].UnformattedTextValue
    assert "esearch use only" in text.TextObjectSequence[0].UnformattedTextValue


def test_a_secondary_capture_shows_image_box_and_outline(tmp_path):
    file = source(tmp_path)
    header, made = dcmread(file), dcmread(saved(VIEWERS.build(file, result_of(file), None, read), tmp_path)["sc"])
    pixels, shown = made.pixel_array, np.rint(read(file) * 255)
    assert pixels.shape == (60, 48, 3)
    assert (made.BurnedInAnnotation, list(made.ImageType)[:2]) == ("YES", ["DERIVED", "SECONDARY"])
    assert made.StudyInstanceUID == header.StudyInstanceUID
    assert made.SeriesInstanceUID != header.SeriesInstanceUID
    assert made.SourceImageSequence[0].ReferencedSOPInstanceUID == header.SOPInstanceUID
    coloured = np.ptp(pixels.astype(int), axis=2) > 30
    assert coloured[29, 6:24].all()  # lower edge of the mask
    assert not coloured[32:, :].any()
    assert np.abs(pixels[32:].astype(float) - shown[32:, :, None]).max() <= 1


def test_colour_and_frames(tmp_path):
    photograph = write_dicom(tmp_path / "c.dcm", np.dstack([film(60, 48, bits=8)] * 2 + [film(60, 48, bits=8) // 3]),
                             **REFERENCES)  # fmt: skip
    made = saved(VIEWERS.build(photograph, result_of(photograph), None, read), tmp_path)
    assert dcmread(made["gsps"]).SOPClassUID.name == "Color Softcopy Presentation State Storage"
    assert dcmread(made["sc"]).pixel_array[50].tolist() == np.rint(read(photograph)[50] * 255).tolist()
    for kind in ("ultrasound", "enhanced"):
        cine = frames_of(tmp_path, kind)
        header, made = dcmread(cine), saved(VIEWERS.build(cine, result_of(cine), 2, read), tmp_path)
        state, capture = dcmread(made["gsps"]), dcmread(made["sc"])
        references = [one.ReferencedImageSequence[0] for one in state.GraphicAnnotationSequence]
        references += [capture.SourceImageSequence[0], state.ReferencedSeriesSequence[0].ReferencedImageSequence[0]]
        for one in references:
            assert (one.ReferencedSOPClassUID, one.ReferencedSOPInstanceUID) == (
                header.SOPClassUID, header.SOPInstanceUID,
            )  # fmt: skip
            assert one.ReferencedFrameNumber == 2
        assert np.abs(capture.pixel_array[50, :, 0] - read(cine, 2)[50] * 255).max() <= 1


def test_equal_predictions_have_equal_identifiers(tmp_path):
    file = source(tmp_path)
    once, twice = (VIEWERS.build(file, result_of(file), None, read) for _ in range(2))
    for kind in ("gsps", "sc"):
        assert once[kind].SOPInstanceUID == twice[kind].SOPInstanceUID


def test_outlines_follow_pixel_edges_and_have_a_limited_length():
    mask = np.zeros((40, 40), np.uint8)
    mask[10:30, 5:25] = 1
    mask[15:20, 10:15] = 0
    outer, hole = sorted(outlines(mask), key=len, reverse=True)
    assert [*outer.min(axis=0), *outer.max(axis=0)] == [5, 10, 25, 30]
    assert [*hole.min(axis=0), *hole.max(axis=0)] == [10, 15, 15, 20]
    noise = (np.random.default_rng(0).random((400, 400)) > 0.4).astype(np.uint8)
    assert all(len(line) <= MOST_POINTS and np.array_equal(line[0], line[-1]) for line in outlines(noise))
