import pytest

from datamodules.public.kermany import read_catalogue
from mtmedformer.errors import DataError
from tests.fixtures.layout_files import noise, write_image
from tests.fixtures.public_layouts import kermany as layout


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return layout.write(tmp_path_factory.mktemp("kermany"))


@pytest.fixture(scope="module")
def records(root):
    return {r.id: r for r in read_catalogue(root).records}


def test_doubled_folders_and_system_files_of_the_mirror_are_handled(records):
    assert not any(name.startswith(".") for name in records)
    assert "IM-0115-0001" in records


def test_there_is_no_box_task_at_all(root):
    assert {task.kind for task in read_catalogue(root).tasks.values()} == {"classification"}


def test_virus_and_bacteria_come_from_the_name_and_normal_from_the_folder(records):
    assert records["person1_bacteria_1"].truth["pathology"].values == (0, 1, 0)
    assert records["person1672_virus_2888"].truth["pathology"].values == (0, 0, 1)
    assert records["IM-0115-0001"].truth["pathology"].values == (1, 0, 0)
    assert records["person1_bacteria_1"].truth["pneumonia"].values == (0, 1)
    assert records["IM-0115-0001"].truth["pneumonia"].values == (1, 0)


def test_images_of_a_person_have_one_patient_for_every_pathology(root):
    by_id = {r.id: r for r in read_catalogue(root, official=False).records}
    assert by_id["person7_virus_8"].patient == by_id["person7_bacteria_9"].patient == "person7"
    assert by_id["IM-0115-0001"].patient == by_id["IM-0115-0002"].patient == by_id["NORMAL2-IM-0115-0001"].patient


def test_person_in_train_and_test_is_dropped_from_train_and_noted(root, records):
    assert "person7_virus_6" in records
    assert "person7_virus_8" not in records
    assert any("2 images of 1 patients were dropped" in note for note in read_catalogue(root).notes)


def test_numbering_per_split_drops_no_image(root):
    by_id = {r.id: r for r in read_catalogue(root, numbering="per_split").records}
    assert by_id["person7_virus_6"].patient != by_id["person7_virus_8"].patient


def test_tiny_validation_folder_joins_train_unless_asked_for(root, records):
    assert records["NORMAL2-IM-1427-0001"].split == "train"
    assert {r.split for r in records.values()} == {"train", "test"}
    kept = {r.id: r for r in read_catalogue(root, official_val=True).records}
    assert kept["NORMAL2-IM-1427-0001"].split == "val"


def test_mendeley_names_give_accession_and_pathology(tmp_path):
    by_id = {r.id: r for r in read_catalogue(layout.write_mendeley(tmp_path)).records}
    assert by_id["NORMAL-1049278-0001"].patient == by_id["NORMAL-1049278-0002"].patient == "accession1049278"
    assert by_id["BACTERIA-40699-0001"].truth["pathology"].values == (0, 1, 0)
    assert by_id["VIRUS-888-0001"].truth["pathology"].values == (0, 0, 1)
    assert "VIRUS-777-0001" not in by_id
    assert by_id["BACTERIA-777-0002"].split == "test"


def test_a_name_without_pattern_is_a_patient_of_its_own_with_unknown_pathology(tmp_path):
    root = layout.write(tmp_path)
    folder = root / "chest_xray" / "chest_xray" / "train" / "PNEUMONIA"
    write_image(folder / "scan.jpeg", noise(1))
    catalogue = read_catalogue(root)
    record = next(r for r in catalogue.records if r.id == "scan")
    assert record.truth.keys() == {"pneumonia"}
    assert record.patient == "train/PNEUMONIA/scan"
    assert any("contain neither virus nor bacteria" in note for note in catalogue.notes)


def test_layout_without_test_folder_is_named(tmp_path):
    write_image(tmp_path / "train" / "NORMAL" / "IM-0001-0001.jpeg", noise(1))
    (tmp_path / "train" / "PNEUMONIA").mkdir()
    with pytest.raises(DataError, match="lacks test/NORMAL, test/PNEUMONIA"):
        read_catalogue(tmp_path)
