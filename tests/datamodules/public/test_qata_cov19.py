import pytest

from datamodules.public.qata_cov19 import read_catalogue
from mtmedformer.errors import DataError
from tests.fixtures.public_layouts import qata_cov19 as layout


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return layout.write(tmp_path_factory.mktemp("qata"))


@pytest.fixture(scope="module")
def records(root):
    return {r.id: r for r in read_catalogue(root).records}


def test_mask_is_found_behind_its_prefix(records):
    for record in records.values():
        [source] = record.truth["infection"].channels
        assert source.file.name == f"mask_{record.file.name}"
        assert source.file.parent.name == "Ground-truths"


def test_boxes_are_the_components_of_the_mask(records):
    boxes = records["covid_1"].truth["lesions"]
    assert boxes.components
    assert boxes.min_area == 25
    assert boxes.masks == records["covid_1"].truth["infection"].channels


def test_there_is_no_classification_task(root):
    assert {task.kind for task in read_catalogue(root).tasks.values()} == {"segmentation", "detection"}


def test_subject_in_the_name_is_the_patient(records):
    assert records["sub-S09103_ses-E1_run-1_bp-chest_vp-ap_cr"].patient == "sub-S09103"
    assert records["sub-S09103_ses-E2_run-1_bp-chest_vp-pa_cr"].patient == "sub-S09103"
    assert records["covid_1"].patient == "covid_1"
    assert records["sub-S09103_ses-E2_run-1_bp-chest_vp-pa_cr"].view == "PA"


def test_subject_of_both_official_sets_is_dropped_from_train(root, records):
    assert [r.split for r in records.values() if r.patient == "sub-S09999"] == ["test"]
    assert any("dropped from train" in note for note in read_catalogue(root).notes)


def test_lvit_list_of_mask_names_makes_validation_without_a_shared_subject(root):
    by_id = {r.id: r for r in read_catalogue(root, val_ids=root / "Val_ID.xlsx").records}
    assert by_id["covid_2"].split == "val"
    assert by_id["sub-S09104_ses-E1_run-1_bp-chest_vp-ap_cr"].split == "val"
    assert by_id["sub-S09103_ses-E2_run-1_bp-chest_vp-pa_cr"].split == "val"
    assert "sub-S09103_ses-E1_run-1_bp-chest_vp-ap_cr" not in by_id


def test_list_without_png_endings_works_and_a_foreign_list_raises(root, tmp_path):
    marked = read_catalogue(root, val_ids=root / "Train_ID.xlsx").records
    assert sum(r.split == "val" for r in marked) > 5
    (tmp_path / "list.csv").write_text("Image\nmask_nothing.png\n")
    with pytest.raises(DataError, match=r"list\.csv: none of its 1 names"):
        read_catalogue(root, val_ids=tmp_path / "list.csv")
    with pytest.raises(DataError, match=r"absent\.xlsx does not exist"):
        read_catalogue(root, val_ids=tmp_path / "absent.xlsx")


def test_files_that_are_also_in_covid_qu_ex_can_be_left_out(root, records):
    kept = read_catalogue(root, only_subjects=True).records
    assert all(r.id.startswith("sub-") for r in kept)
    assert len(records) - len(kept) == 3
    assert any("also in COVID-QU-Ex" in note for note in read_catalogue(root).notes)


def test_image_without_a_mask_is_dropped_and_counted(root, records):
    assert "covid_9" not in records
    assert any("1 images without a mask were dropped" in note for note in read_catalogue(root).notes)
