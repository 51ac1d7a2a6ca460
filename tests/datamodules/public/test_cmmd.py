import pandas as pd
import pydicom
import pytest

from datamodules.public.cmmd import read_catalogue
from mtmedformer.errors import DataError
from tests.fixtures.layout_files import hash_of
from tests.fixtures.public_layouts import cmmd as layout


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return layout.write(tmp_path_factory.mktemp("cmmd"))


@pytest.fixture(scope="module")
def records(root):
    return {r.id: r for r in read_catalogue(root).records}


def test_other_breast_is_unknown_not_negative(root, records):
    assert "D1-0001_L_CC" in records
    assert "D1-0001_R_CC" not in records
    every = {r.id: r for r in read_catalogue(root, keep_unlabelled=True).records}
    assert every["D1-0001_R_CC"].truth == {}
    assert every["D1-0001_L_CC"] == records["D1-0001_L_CC"]
    assert any("6 of 28 images show a breast without a row" in note for note in read_catalogue(root).notes)


def test_side_comes_from_the_header_and_view_from_the_code_sequence(records):
    record = records["D1-0001_L_MLO"]
    assert (record.laterality, record.view) == ("L", "MLO")
    assert "ViewPosition" not in pydicom.dcmread(record.file, stop_before_pixels=True)


def test_each_breast_has_its_own_label(records):
    assert records["D2-0010_L_CC"].truth["pathology"].values == (1, 0)
    assert records["D2-0010_R_CC"].truth["pathology"].values == (0, 1)


def test_both_sets_mass_and_calcification(records):
    assert records["D1-0001_L_CC"].truth["abnormality"].values == (1, 0)
    assert records["D2-0002_R_CC"].truth["abnormality"].values == (0, 1)
    assert records["D1-0003_R_CC"].truth["abnormality"].values == (1, 1)


def test_patient_and_sub_collection(records):
    assert records["D2-0010_L_CC"].patient == records["D2-0010_R_MLO"].patient == "D2-0010"
    assert records["D2-0010_L_CC"].groups == {"client": "D2"}


def test_there_are_neither_boxes_masks_nor_official_splits(root, records):
    assert {task.kind for task in read_catalogue(root).tasks.values()} == {"classification"}
    assert {r.split for r in records.values()} == {None}


def test_no_id_carries_a_date(records):
    assert not any("2010" in name for name in records)


def test_table_saved_as_csv_and_a_tree_of_study_folders_are_read(root, records, tmp_path):
    table = pd.read_excel(root / "CMMD_clinicaldata_revision.xlsx", dtype=str)
    table.to_csv(tmp_path / "CMMD_clinicaldata_revision.csv", index=False)
    for record in records.values():
        study = tmp_path / "CMMD" / f"1.3.6.{hash_of(record.patient)}"
        study.mkdir(parents=True, exist_ok=True)
        (study / f"{record.laterality}{record.view}.dcm").write_bytes(record.file.read_bytes())
    found = {r.id: r for r in read_catalogue(tmp_path).records}
    assert found.keys() == records.keys()
    assert all(found[name].truth == records[name].truth for name in records)


def test_second_image_of_the_same_view_gets_a_name_of_its_own(tmp_path):
    root = layout.write(tmp_path)
    file = next(r.file for r in read_catalogue(root).records if r.id == "D1-0001_L_CC")
    (file.parent / "1-9.dcm").write_bytes(file.read_bytes())
    assert {"D1-0001_L_CC", "D1-0001_L_CC_2"} <= {r.id for r in read_catalogue(root).records}


def test_image_without_laterality_and_a_broken_one_get_no_label(tmp_path):
    root = layout.write(tmp_path)
    files = {r.id: r.file for r in read_catalogue(root).records}
    header = pydicom.dcmread(files["D1-0001_L_CC"])
    del header.ImageLaterality
    header.save_as(files["D1-0001_L_CC"])
    files["D1-0001_L_MLO"].write_bytes(b"no DICOM")
    catalogue = read_catalogue(root)
    assert not {"D1-0001_L_CC", "D1-0001_L_MLO"} & {r.id for r in catalogue.records}
    notes = " ".join(catalogue.notes)
    assert "2 images have no laterality" in notes
    assert "1 of those are not readable as DICOM (download them again): 1-2.dcm" in notes
    assert "1 of 11 labelled breasts have no image" in notes


@pytest.mark.parametrize("column, value", [("classification", "Normal"), ("abnormality", "lump"), ("LeftRight", "B")])
def test_an_invalid_cell_raises(tmp_path, column, value):
    root = layout.write(tmp_path)
    file = root / "CMMD_clinicaldata_revision.xlsx"
    table = pd.read_excel(file, dtype=str)
    table.loc[0, column] = value
    table.to_excel(file, index=False)
    with pytest.raises(DataError, match=f"{value!r}"):
        read_catalogue(root)


def test_rows_of_one_breast_give_the_worst(tmp_path):
    root = layout.write(tmp_path)
    file = root / "CMMD_clinicaldata_revision.xlsx"
    table = pd.read_excel(file, dtype=str)
    extra = pd.DataFrame([["D2-0002", "R", "44", "2", "mass", "Malignant", ""]], columns=table.columns)
    pd.concat([table, extra]).to_excel(file, index=False)
    truth = next(r.truth for r in read_catalogue(root).records if r.id == "D2-0002_R_CC")
    assert truth["pathology"].values == (0, 1)
    assert truth["abnormality"].values == (1, 1)
