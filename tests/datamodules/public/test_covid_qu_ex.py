import shutil

import pytest

from datamodules import CovidQuExDataModule
from datamodules.public.covid_qu_ex import read_catalogue
from datamodules.records import BoxTruth, MaskSource
from mtmedformer.errors import DataError
from tests.fixtures.public_layouts import covid_qu_ex as layout


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return layout.write(tmp_path_factory.mktemp("covid_qu_ex"))


@pytest.fixture(scope="module")
def records(root):
    return {r.id: r for r in read_catalogue(root).records}


def test_doubled_folder_name_is_found_and_a_single_one_too(root, tmp_path, records):
    for name in ("Lung Segmentation Data", "Infection Segmentation Data"):
        shutil.copytree(root / name / name, tmp_path / name)
    assert {r.id for r in read_catalogue(tmp_path).records} == records.keys()


def test_trees_are_not_swapped(root):
    lung, infection = (read_catalogue(root, tree=tree) for tree in ("lung", "infection"))
    assert all("Lung Segmentation Data" in str(r.file) for r in lung.records)
    assert all("Infection Segmentation Data" in str(r.file) for r in infection.records)
    assert "infection" not in lung.tasks
    assert {"lungs", "infection", "lesions"} <= infection.tasks.keys()


def test_infection_masks_are_matched_to_the_lung_tree_by_class_and_name(records):
    with_mask = {name for name, r in records.items() if r.truth.get("infection") and r.truth["lesions"].masks}
    assert with_mask == {
        "covid19_covid_1",
        "covid19_sub-S09001_ses-E24000_run-1_bp-chest_vp-pa_cr",
        "covid19_covid_3",
        "covid19_covid_4",
    } - ({"covid19_sub-S09001_ses-E24000_run-1_bp-chest_vp-pa_cr"} - records.keys())


def test_image_without_infection_mask_is_unknown_not_negative(records):
    assert records["covid19_covid_2"].truth.keys() == {"pathology", "lungs"}


def test_all_zero_mask_of_another_pneumonia_is_unknown(records):
    assert records["other_pneumonia_non_COVID (1)"].truth.keys() == {"pathology", "lungs"}


def test_normal_image_of_the_infection_tree_is_a_true_negative(records):
    truth = records["no_finding_Normal (1)"].truth
    assert truth["infection"].channels == (MaskSource(),)
    assert truth["lesions"] == BoxTruth()
    assert "infection" not in records["no_finding_Normal (2)"].truth


def test_boxes_are_components_of_the_infection_mask_without_specks(root):
    module = CovidQuExDataModule(root=root, image_size=64, num_workers=0, cache_dir=None, preset=None)
    module.setup("fit")
    [batch] = [b for b in module.val_dataloader() if len(b)]
    index = [m.id for m in batch.meta].index("covid19_covid_3")
    assert batch.targets["lesions"].boxes[index].tolist() == [[40, 20, 52, 34], [8, 30, 24, 50]]


def test_subject_of_two_official_splits_stays_in_the_later_one(root, records):
    in_both = [name for name in records if "S09345" in name]
    assert in_both == ["covid19_sub-S09345_ses-E24850_run-1_bp-chest_vp-ap_cr"]
    assert any("image-level" in note or "by image" in note for note in read_catalogue(root).notes)


def test_published_image_level_protocol_keeps_every_image(root):
    kept = read_catalogue(root, patients="image").records
    assert sum("S09345" in r.id for r in kept) == 2
    assert len({r.patient for r in kept}) == len(kept) == 15


def test_official_splits_and_classes(records):
    assert records["covid19_covid_4"].split == "test"
    assert records["no_finding_Normal (3)"].split == "val"
    assert records["other_pneumonia_non_COVID (1)"].truth["pathology"].values == (0, 1, 0)
    assert records["covid19_sub-S09345_ses-E24850_run-1_bp-chest_vp-ap_cr"].view == "AP"


def test_missing_infection_tree_is_named(root, tmp_path):
    name = "Lung Segmentation Data"
    shutil.copytree(root / name, tmp_path / name)
    assert read_catalogue(tmp_path, tree="lung").records
    with pytest.raises(DataError, match="expected Infection Segmentation Data/Infection Segmentation Data/Train"):
        read_catalogue(tmp_path)
