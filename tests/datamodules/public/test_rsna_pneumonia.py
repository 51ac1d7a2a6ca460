import json
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from datamodules import RSNAPneumoniaDataModule
from datamodules.public.layout import read_table
from datamodules.public.rsna_pneumonia import MAPPING, read_boxes, read_catalogue
from datamodules.records import BoxTruth
from mtmedformer.errors import DataError
from tests.fixtures.public_layouts import rsna_pneumonia as layout


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return layout.write(tmp_path_factory.mktemp("rsna"))


@pytest.fixture(scope="module")
def records(root):
    return {r.id: r for r in read_catalogue(root).records}


def named(records, number):
    return next(r for name, r in records.items() if name.startswith(f"00{number:02d}"))


def test_one_record_per_image_from_a_table_with_one_row_per_box(records):
    assert len(records) == 14
    assert named(records, 0).truth["lesions"].boxes == ((264, 152, 477, 531), (562, 152, 818, 605))
    assert named(records, 0).truth["lesions"].labels == (0, 0)


def test_target_0_is_a_true_negative_of_the_boxes(records):
    assert named(records, 2).truth["lesions"] == BoxTruth()
    assert named(records, 2).truth["pneumonia"].values == (1.0, 0.0)


def test_the_three_class_label_is_a_second_task_and_rows_may_repeat(root, records):
    tasks = read_catalogue(root).tasks
    assert tasks["pathology"].classes == ("normal", "not_normal_no_opacity", "lung_opacity")
    assert named(records, 0).truth["pathology"].values == (0, 0, 1)
    assert named(records, 2).truth["pathology"].values == (1, 0, 0)
    assert named(records, 3).truth["pathology"].values == (0, 1, 0)


def test_images_are_grouped_by_the_nih_patient_behind_them(records):
    assert named(records, 0).patient == named(records, 1).patient == "nih00000000"
    assert len({r.patient for r in records.values()}) == 7


def test_a_missing_mapping_is_noted_and_every_image_is_a_patient(tmp_path):
    root = layout.write(tmp_path)
    (root / MAPPING).unlink()
    catalogue = read_catalogue(root)
    assert any("PATIENTS LEAK" in note and "11,439" in note for note in catalogue.notes)
    assert len({r.patient for r in catalogue.records}) == 14


def test_the_mapping_may_be_another_file(tmp_path):
    root = layout.write(tmp_path)
    moved = (root / MAPPING).rename(tmp_path / "mappings.json")
    assert len({r.patient for r in read_catalogue(root, moved).records}) == 7
    with pytest.raises(DataError, match="mapping="):
        read_catalogue(root, tmp_path / "nothing.json")


def test_images_missing_in_the_mapping_are_counted(tmp_path):
    root = layout.write(tmp_path)
    pairs = json.loads((root / MAPPING).read_text())
    (root / MAPPING).write_text(json.dumps(pairs[:-3]))
    assert any("3 images are not in the NIH mapping" in note for note in read_catalogue(root).notes)


def test_unlabelled_test_images_are_no_records(records):
    assert not any("stage_2_test_images" in str(r.file) for r in records.values())


def test_without_the_class_table_the_three_class_task_is_unknown_not_negative(tmp_path):
    root = layout.write(tmp_path)
    (root / "stage_2_detailed_class_info.csv").unlink()
    catalogue = read_catalogue(root)
    assert not any("pathology" in r.truth for r in catalogue.records)
    assert any("stage_2_detailed_class_info.csv is absent" in note for note in catalogue.notes)


@pytest.mark.parametrize("row", ["a,1,2,3,4,0", "a,,,,,1", "a,1,2,0,4,1", "a,1,2,x,4,1", "a,,,,,2"])
def test_row_that_contradicts_itself_raises(row, tmp_path):
    file = tmp_path / "labels.csv"
    file.write_text(f"patientId,x,y,width,height,Target\n{row}\n")
    with pytest.raises(DataError, match=r"labels\.csv"):
        read_boxes(file)


def test_boxes_refer_to_1024_pixels_whatever_the_files_size(root):
    module = RSNAPneumoniaDataModule(root=root, image_size=64, num_workers=0, cache_dir=None)
    module.setup("fit")
    boxes = [target for batch in module.train_dataloader() for target in batch.targets["lesions"].boxes]
    assert max(float(b.max()) for b in boxes if len(b)) <= 64


def wheel(name):
    """Return a file of the torchxrayvision distribution without importing it (that needs scikit-image)."""
    try:
        files = metadata.files("torchxrayvision") or []
    except metadata.PackageNotFoundError:
        pytest.skip("torchxrayvision is not installed (pip install --no-deps torchxrayvision)")
    return Path(next(file.locate() for file in files if file.name == name))


def test_real_label_table_gives_the_published_counts():
    file = wheel("kaggle_stage_2_train_labels.csv.zip")
    boxes = read_boxes(file)
    assert len(read_table(file, ["patientId"])) == 30_227
    assert len(boxes) == 26_684
    assert sum(map(bool, boxes.values())) == 6_012
    assert sum(map(len, boxes.values())) == 9_555
    per_image = [sum(len(found) == n for found in boxes.values()) for n in (1, 2, 3, 4)]
    assert per_image == [2_614, 3_266, 119, 13]
    assert all(0 <= x0 < x1 <= 1024 and 0 <= y0 < y1 <= 1024 for b in boxes.values() for x0, y0, x1, y1 in b)


def test_zipped_label_table_is_read_too(tmp_path):
    root = layout.write(tmp_path)
    table = root / "stage_2_train_labels.csv"
    before = read_catalogue(root).records
    with zipfile.ZipFile(root / "stage_2_train_labels.csv.zip", "w") as archive:
        archive.write(table, table.name)
    table.unlink()
    assert read_catalogue(root).records == before
