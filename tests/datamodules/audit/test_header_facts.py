"""Facts of headers: one spelling for one kind of image, nothing that could name a patient, no error for any file."""

import pytest

from datamodules.audit.header_facts import canonical_view, header_facts
from tests.fixtures.dicom_files import film, write_dicom
from tests.fixtures.real_data import real


@pytest.mark.parametrize(
    ("attributes", "facts"),
    [
        ({"Modality": "DX", "BodyPartExamined": "CHEST"}, {"Modality": "CR/DX", "BodyPartExamined": "CHEST"}),
        ({"Modality": "CR", "BodyPartExamined": "thorax"}, {"Modality": "CR/DX", "BodyPartExamined": "CHEST"}),
        ({"Modality": "MG", "BodyPartExamined": "BREAST"}, {"Modality": "MG", "BodyPartExamined": "BREAST"}),
        ({"Modality": "SC", "BodyPartExamined": ""}, {}),
        ({"Modality": "MG", "BodyPartExamined": "Doe^Jane"}, {"Modality": "MG"}),
    ],
)
def test_facts_have_one_spelling(tmp_path, attributes, facts):
    file = write_dicom(tmp_path / "x.dcm", film(), **attributes)
    assert header_facts(file) == {**facts, "Photometric": "grey"}


def test_both_kinds_of_monochrome_are_grey_and_views_are_one_word(tmp_path):
    inverted = write_dicom(tmp_path / "a.dcm", film(), PhotometricInterpretation="MONOCHROME1")
    colour = write_dicom(tmp_path / "b.dcm", film(bits=8)[..., None].repeat(3, axis=2))
    assert header_facts(inverted)["Photometric"] == "grey"
    assert header_facts(colour)["Photometric"] == "colour"
    spelled = {"AP Supine": "AP", "pa": "PA", "LL": "LATERAL", "Lateral": "LATERAL", None: "", "Frau Müller": "FRAU"}
    assert {view: canonical_view(view) for view in spelled} == spelled


def test_other_files_have_only_their_view(tmp_path):
    (tmp_path / "broken.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\xff" * 40)
    for file in (tmp_path / "broken.dcm", tmp_path / "absent", tmp_path, None):
        assert header_facts(file, "PA") == {"View": "PA"}


def test_real_mammograms_and_films_differ():
    folder = real("dicom_fixtures")
    kinds = {tuple(sorted(header_facts(file).items())) for file in sorted(folder.rglob("*.dcm"))}
    assert {dict(kind)["Modality"] for kind in kinds if "Modality" in dict(kind)} >= {"MG", "CR/DX"}
