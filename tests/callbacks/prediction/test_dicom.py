"""DICOM segmentations and reports: valid, readable, linked to their source, coded and reproducible."""

import shutil
import subprocess
import warnings
from pathlib import Path

import highdicom as hd
import numpy as np
import pytest
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import (
    DigitalMammographyXRayImageStorageForPresentation,
    DigitalXRayImageStorageForPresentation,
    EnhancedMRImageStorage,
    UltrasoundMultiFrameImageStorage,
)

from callbacks.prediction.dicom.codes import PRIVATE, category, concept
from callbacks.prediction.dicom.model_identity import ModelIdentity
from callbacks.prediction.dicom.objects import DicomObjects
from mtmedformer.batch import Meta
from mtmedformer.errors import DataError
from mtmedformer.inference.results import FoundBox, FoundValue, ImageResult
from tests.fixtures.dicom_files import film, write_dicom, write_frames
from tests.fixtures.real_data import real

OBJECTS = DicomObjects(ModelIdentity("0123456789abcdef"), {("lesions", "nodule"): 0.4, ("lesions", "odd thing"): 0.4})
REFERENCES = {"StudyInstanceUID": "1.2.3.4", "SeriesInstanceUID": "1.2.3.4.5", "InstanceNumber": "7"}
KINDS = {
    "CR": {},
    "DX": {"SOPClassUID": DigitalXRayImageStorageForPresentation, "Modality": "DX", "PatientOrientation": ["L", "F"]},
    "MG": {
        "SOPClassUID": DigitalMammographyXRayImageStorageForPresentation,
        "Modality": "MG",
        "ImageLaterality": "R",
        "ImagerPixelSpacing": [0.07, 0.07],
    },
}


def source(folder: Path, **attributes) -> Path:
    return write_dicom(folder / "film.dcm", film(60, 48), bits=12, **REFERENCES, **attributes)


def result_of(file: Path, spacing=(0.2, 0.1)) -> ImageResult:
    """Return a result with a mask, an empty mask, and boxes of a high and a low score."""
    header = dcmread(file, stop_before_pixels=True)
    mask = np.zeros((header.Rows, header.Columns), np.uint8)
    mask[10:30, 5:25] = 1
    return ImageResult(
        Meta("film.dcm", "p", original_size=mask.shape, spacing=spacing),
        classes={"health": {"normal": 0.3, "an odd class with a long name": 0.7}},
        boxes={"lesions": [FoundBox("nodule", 0.9, (1.5, 2.5, 10, 20)), FoundBox("odd thing", 0.2, (1, 2, 8, 9))]},
        masks={"lungs": {"lung": mask, "scar": np.zeros_like(mask)}},
    )


def saved(made, folder: Path) -> dict[str, Path]:
    for kind, one in made.items():
        one.save_as(folder / f"made.{kind}.dcm")
    return {kind: folder / f"made.{kind}.dcm" for kind in made}


def errors_of(file: Path) -> set[str]:
    if shutil.which("dciodvfy") is None:
        pytest.skip("dciodvfy (package dicom3tools) is not installed")
    output = subprocess.run(["dciodvfy", str(file)], capture_output=True, text=True, check=False).stderr
    assert output.strip(), "dciodvfy prints at least the kind of the object"
    return {line for line in output.splitlines() if line.startswith("Error")}


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of highdicom on reading what it wrote
        yield


@pytest.mark.parametrize("spacing", [(0.2, 0.1), None], ids=["spacing", "no-spacing"])
@pytest.mark.parametrize("kind", KINDS)
def test_objects_are_valid(kind, spacing, tmp_path):
    file = source(tmp_path, **KINDS[kind])
    for made in saved(OBJECTS.build(file, result_of(file, spacing)), tmp_path).values():
        assert errors_of(made) == set()


def test_masks_and_references_are_read_back(tmp_path):
    file = source(tmp_path)
    result, header = result_of(file), dcmread(file)
    made = hd.seg.segread(saved(OBJECTS.build(file, result), tmp_path)["seg"])
    pixels = made.get_pixels_by_source_instance([header.SOPInstanceUID])
    np.testing.assert_array_equal(pixels[0], np.stack(list(result.masks["lungs"].values()), axis=-1))
    for attribute in ("StudyInstanceUID", "PatientID", "PatientName"):
        assert made[attribute].value == header[attribute].value
    assert made.SeriesInstanceUID != header.SeriesInstanceUID
    assert made.get_segment_description(1).segmented_property_type == codes.SCT.Lung
    assert made.get_segment_description(2).segmented_property_type.scheme_designator == PRIVATE
    assert "esearch use only" in made.SeriesDescription
    assert "esearch use only" in made.ContentDescription


def test_report_has_every_prediction_with_a_coded_name(tmp_path):
    file = source(tmp_path)
    result, header = result_of(file), dcmread(file)
    made = saved(OBJECTS.build(file, result), tmp_path)
    report, masks = hd.sr.srread(made["sr"]), dcmread(made["seg"])
    assert report.ContentTemplateSequence[0].TemplateIdentifier == "1500"
    classes = report.content.get_image_measurement_groups()
    assert [g.get_measurements()[0].value for g in classes] == [0.3, 0.7]
    assert classes[0].finding_type == codes.SCT.Normal
    assert classes[0].source_images[0].referenced_sop_instance_uid == header.SOPInstanceUID
    box, lung, scar = report.content.get_planar_roi_measurement_groups()
    assert box.finding_type == codes.SCT.Nodule
    assert box.get_measurements(name=codes.DCM.CertaintyOfFinding)[0].value == 90
    corners = box.roi.value
    np.testing.assert_allclose([*corners.min(axis=0), *corners.max(axis=0)], [1.5, 2.5, 10, 20])
    for group, area in ((lung, 20 * 20 * 0.02), (scar, 0)):
        measured = group.get_measurements(name=codes.SCT.Area)[0]
        assert (measured.value, measured.unit) == (pytest.approx(area), codes.UCUM.SquareMillimeter)
    assert lung.referenced_segmentation_frame.referenced_sop_instance_uid == masks.SOPInstanceUID
    evidence = {
        item.ReferencedSOPInstanceUID
        for study in report.CurrentRequestedProcedureEvidenceSequence
        for series in study.ReferencedSeriesSequence
        for item in series.ReferencedSOPSequence
    }
    assert evidence == {header.SOPInstanceUID, masks.SOPInstanceUID}
    assert "research use only" in made["sr"].read_bytes().decode("utf-8", "ignore")


def test_areas_are_in_pixels_where_the_spacing_is_unknown(tmp_path):
    file = source(tmp_path)
    report = hd.sr.srread(saved(OBJECTS.build(file, result_of(file, None)), tmp_path)["sr"])
    lung = report.content.get_planar_roi_measurement_groups()[1].get_measurements()[0]
    assert (lung.value, lung.unit.value) == (400, "{pixels}")


def test_model_without_masks_gives_only_a_report(tmp_path):
    file = source(tmp_path)
    result = result_of(file)
    made = OBJECTS.build(file, ImageResult(result.meta, result.classes, result.boxes))
    assert list(made) == ["sr"]
    assert errors_of(saved(made, tmp_path)["sr"]) == set()


def test_identifiers_are_equal_exactly_for_equal_predictions(tmp_path):
    file = source(tmp_path)
    once, twice = (OBJECTS.build(file, result_of(file)) for _ in range(2))
    changed = result_of(file)
    changed.masks["lungs"]["lung"][0, 0] = 1
    other = OBJECTS.build(file, changed)
    for kind in ("seg", "sr"):
        assert once[kind].SOPInstanceUID == twice[kind].SOPInstanceUID
        assert once[kind].SOPInstanceUID != other[kind].SOPInstanceUID
        assert once[kind].SeriesInstanceUID == other[kind].SeriesInstanceUID


NAMES = [("ISO_IR 100", "Müller^Jörg"), (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎"), ("ISO_IR 192", "Ελένη^Α")]


@pytest.mark.parametrize(("charset", "name"), NAMES)
def test_names_in_any_script_are_kept(charset, name, tmp_path):
    file = source(tmp_path, SpecificCharacterSet=charset, PatientName=name)
    for made in saved(OBJECTS.build(file, result_of(file)), tmp_path).values():
        assert str(dcmread(made).PatientName) == name


def test_source_without_identifiers_is_refused_with_a_clear_message(tmp_path):
    file = write_dicom(tmp_path / "film.dcm", film(60, 48), StudyInstanceUID="1.2")
    with pytest.raises(DataError, match=r"film\.dcm: lacks SeriesInstanceUID"):
        OBJECTS.build(file, result_of(file))


def test_errors_and_warnings_contain_no_patient_data(tmp_path, recwarn):
    file = source(tmp_path, PatientName="Secret")  # highdicom would warn of a name of one part, and quote it
    warnings.simplefilter("always")
    OBJECTS.build(file, result_of(file))
    assert not any("Secret" in str(w.message) for w in recwarn)


def test_codes_match_any_spelling_and_user_codes_take_precedence():
    assert concept("Lungs", {}) == concept("lung", {}) == codes.SCT.Lung
    assert concept("ground-glass_opacity", {}) == codes.DCM.GroundGlassOpacity
    own = concept("nodule", {"nodule": ("1", "99ABC", "a nodule of ours")})
    assert (own.value, own.scheme_designator, own.meaning) == ("1", "99ABC", "a nodule of ours")
    fallback = concept("ein sehr ungewöhnlicher Befund " * 4, {})
    assert fallback.scheme_designator == PRIVATE
    assert len(fallback.value) <= 16
    assert len(fallback.meaning) <= 64
    kinds = [category(name) for name in ("lung", "nodules", "whatever")]
    assert kinds == [codes.SCT.AnatomicalStructure, codes.SCT.MorphologicallyAbnormalStructure, codes.SCT.BodyStructure]


@pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small.dcm", "RG1_UNCR.dcm", "JPGLosslessP14SV1_1s_1f_8b.dcm"])
def test_real_headers_of_pydicom(name, tmp_path):
    file = get_testdata_file(name, download=False)
    if file is None:
        pytest.skip(f"{name} is not in this installation of pydicom-data")
    check_real(Path(file), tmp_path)


@pytest.mark.parametrize("name", ["dicom_raw/cxr_Fake_MONOHR1.dcm", "dicom_small/ddsm_P_00173_RMLO.dcm"])
def test_real_headers_of_archives(name, tmp_path):
    check_real(real("dicom_fixtures", *name.split("/")), tmp_path)


def check_real(file: Path, folder: Path) -> None:
    """Check that objects have no errors of their own, only those of values they take over, and read back."""
    result, inherited = result_of(file, None), errors_of(file)
    made = saved(OBJECTS.build(file, result), folder)
    for one in made.values():
        assert errors_of(one) <= inherited
    uid = dcmread(file, stop_before_pixels=True).SOPInstanceUID
    pixels = hd.seg.segread(made["seg"]).get_pixels_by_source_instance([uid])
    np.testing.assert_array_equal(pixels[0, ..., 0], result.masks["lungs"]["lung"])
    assert len(hd.sr.srread(made["sr"]).content.get_planar_roi_measurement_groups()) == 3


def test_numbers_and_grades_are_measurements_with_units_and_coded_evaluations(tmp_path):
    file = source(tmp_path)
    result = ImageResult(
        Meta("film.dcm", "p", original_size=(60, 48)),
        classes={"density": {"A": 0.1, "B": 0.9}},
        values={
            "age": FoundValue(63.25, "years", 55.25, 70.0),
            "score": FoundValue(3.0, "points"),
            "density": FoundValue(1.0, grade="B"),
        },
    )
    made = saved(OBJECTS.build(file, result), tmp_path)
    assert errors_of(made["sr"]) == set()
    groups = hd.sr.srread(made["sr"]).content.get_image_measurement_groups()
    age, score = (group.get_measurements()[0] for group in groups[:2])
    assert (age.value, age.unit.value, age.unit.scheme_designator) == (63.25, "a", "UCUM")
    uncertainty = {
        item.name.meaning.split(",")[0]: item.value for item in age[0].ContentSequence if item.ValueType == "NUM"
    }
    assert uncertainty == {"+": 6.75, "-": 8.0}
    assert (score.value, score.unit.value) == (3.0, "{points}")
    grade = groups[2].get_qualitative_evaluations()[0]
    assert (grade.name.meaning, grade.value.meaning) == ("density", "B")


def test_the_report_of_a_case_refers_to_all_its_images(tmp_path):
    files = []
    for number, view in enumerate(("CC", "MLO")):
        attributes = {**REFERENCES, **KINDS["MG"], "InstanceNumber": str(number + 1), "ViewPosition": view}
        files.append(write_dicom(tmp_path / f"{view}.dcm", film(60, 48, seed=number), bits=12, **attributes))
    scores = {"health": {"normal": 0.25, "nodule": 0.75}, "density": {"": 31.5}}
    objects = DicomObjects(ModelIdentity("0123456789abcdef"), {}, {"density": "percent"})
    made = objects.build_case(files, scores)
    made.save_as(tmp_path / "made.dcm")
    report = hd.sr.srread(tmp_path / "made.dcm")
    groups = report.content.get_image_measurement_groups()
    assert [float(group.get_measurements()[0].value) for group in groups] == [0.25, 0.75, 31.5]
    instances = {dcmread(file).SOPInstanceUID for file in files}
    for group in groups:
        assert {one.referenced_sop_instance_uid for one in group.source_images} == instances
    evidence = made.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence
    assert {one.ReferencedSOPInstanceUID for series in evidence for one in series.ReferencedSOPSequence} == instances
    assert objects.build_case(files, scores).SOPInstanceUID == made.SOPInstanceUID
    other = write_dicom(tmp_path / "other.dcm", film(60, 48), bits=12, **{**REFERENCES, "StudyInstanceUID": "1.2.9"})
    with pytest.raises(DataError, match="several studies"):
        objects.build_case([files[0], other], scores)


MULTI_FRAME = {
    "ultrasound": {"SOPClassUID": UltrasoundMultiFrameImageStorage, "Modality": "US"},
    "enhanced": {"SOPClassUID": EnhancedMRImageStorage, "Modality": "MR", "FrameOfReferenceUID": "1.2.3.9"},
    "radiography": {},  # a class that should have no frames
}


def frames_of(folder: Path, kind: str) -> Path:
    """Write three frames; the enhanced ones lie 5 mm apart."""
    frames = np.stack([film(60, 48, bits=12, seed=k) for k in range(3)])
    attributes = dict(MULTI_FRAME[kind])
    if kind == "enhanced":
        shared, own = Dataset(), [Dataset() for _ in frames]
        shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [Dataset()], [Dataset()]
        shared.PixelMeasuresSequence[0].PixelSpacing = [0.2, 0.1]
        shared.PixelMeasuresSequence[0].SliceThickness = 1
        shared.PlaneOrientationSequence[0].ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        for k, item in enumerate(own):
            item.PlanePositionSequence = [Dataset()]
            item.PlanePositionSequence[0].ImagePositionPatient = [0, 0, 5 * k]
        attributes |= {"SharedFunctionalGroupsSequence": [shared], "PerFrameFunctionalGroupsSequence": own}
    return write_frames(folder / "cine.dcm", frames, bits=12, **REFERENCES, **attributes)


@pytest.mark.parametrize("spacing", [(0.2, 0.1), None], ids=["spacing", "no-spacing"])
@pytest.mark.parametrize("kind", MULTI_FRAME)
def test_objects_of_a_frame_refer_to_it(kind, spacing, tmp_path):
    file = frames_of(tmp_path, kind)
    result, header = result_of(file, spacing), dcmread(file)
    made = saved(OBJECTS.build(file, result, frame=2), tmp_path)
    masks = hd.seg.segread(made["seg"])
    pixels = masks.get_pixels_by_source_frame(header.SOPInstanceUID, [2])
    np.testing.assert_array_equal(pixels[0], np.stack(list(result.masks["lungs"].values()), axis=-1))
    for group in masks.PerFrameFunctionalGroupsSequence:
        (image,) = group.DerivationImageSequence[0].SourceImageSequence
        assert (image.ReferencedSOPClassUID, image.ReferencedFrameNumber) == (header.SOPClassUID, 2)
        if kind == "enhanced":
            assert group.PlanePositionSequence[0].ImagePositionPatient == [0, 0, 5]
    (series,) = masks.ReferencedSeriesSequence
    assert series.ReferencedInstanceSequence[0].ReferencedSOPClassUID == header.SOPClassUID
    assert masks.get("FrameOfReferenceUID") == header.get("FrameOfReferenceUID")
    report = hd.sr.srread(made["sr"])
    assert report.content.get_image_measurement_groups()[0].source_images[0].referenced_frame_numbers == [2]
    regions = report.content.get_planar_roi_measurement_groups()
    np.testing.assert_allclose(regions[0].roi.value[0], [1.5, 2.5])
    other = OBJECTS.build(file, result, frame=3)
    assert other["seg"].SOPInstanceUID != masks.SOPInstanceUID
    assert other["sr"].SOPInstanceUID != report.SOPInstanceUID
    assert other["seg"].SeriesInstanceUID == masks.SeriesInstanceUID
