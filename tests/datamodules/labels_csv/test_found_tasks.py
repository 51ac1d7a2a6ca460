"""Tasks that are found in a table or in folders, where the configuration describes none."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.labels_csv.columns import BoxColumns, ClassColumns, MaskColumns
from datamodules.labels_csv.datamodule import LabelsCSVDataModule
from datamodules.labels_csv.found_tasks import tasks_of_table
from datamodules.labels_csv.table import read_labels
from datamodules.records import BoxTruth
from mtmedformer.errors import DataError
from tests.fixtures.real_data import real
from tests.fixtures.small_set import write_small_set

USED = ["image", "patient", "site", "split", "view", "laterality", "height", "width", "client"]


def found(folder: Path, rows: list[dict]):
    with (folder / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return tasks_of_table(read_labels(folder / "labels.csv", "image"), USED)


def data(root: Path, **arguments) -> LabelsCSVDataModule:
    return LabelsCSVDataModule(root, image_size=32, num_workers=0, cache_dir=None, **arguments)


def test_tasks_of_all_kinds_are_found_with_their_flags(tmp_path):
    rows = [
        {
            "image": f"{i}.png", "patient": i, "Sex": "MF"[i % 2], "age": 40 + i, "view": "PA", "scanner": "ab"[i % 2],
            "diagnosis": ("normal", "mass", "cyst")[i % 3], "BI-RADS": i % 4 + 1, "effusion": i % 2,
            "nodule": -(i % 2) or 1, "has_boxes": 1, "boxes": "[[1, 2, 9, 9]]",
            "box_labels": '["mass"]', "node_boxes": "[]",
            "has_lungs": i % 2,
            "mask_lungs": f"m/{i}.png", "heart_mask": f"h/{i}.png", "report": f"text {i}", "file_id": i,
        }
        for i in range(12)
    ]  # fmt: skip
    tasks, sentence = found(tmp_path, rows)
    assert tasks == {
        "boxes": BoxColumns("boxes", "box_labels", flag="has_boxes"),
        "node": BoxColumns("node_boxes", None),
        "lungs": MaskColumns({"lungs": "mask_lungs"}, flag="has_lungs"),
        "heart": MaskColumns({"heart": "heart_mask"}),
        "diagnosis": ClassColumns("diagnosis"),
        "BI-RADS": ClassColumns("BI-RADS"),
        "findings": ClassColumns(columns=["effusion", "nodule"]),
    }
    assert "Columns without a task: Sex, age, scanner, report, file_id." in sentence
    assert "findings (0/1: effusion, nodule)" in sentence


def test_a_flag_that_marks_no_task_is_refused(tmp_path):
    rows = [{"image": f"{i}.png", "boxes": "[]", "has_nodules": 0, "label": "ab"[i % 2]} for i in range(8)]
    with pytest.raises(DataError, match="column 'has_nodules' may mark the images that are labelled for a task"):
        found(tmp_path, rows)


def test_a_table_without_labels_is_refused_with_its_columns(tmp_path):
    with pytest.raises(DataError, match=r"no column looks like labels \(the columns are image, patient, age\)"):
        found(tmp_path, [{"image": f"{i}.png", "patient": i, "age": i} for i in range(8)])


def test_what_is_not_labelled_stays_unknown(tmp_path):
    catalogue = data(write_small_set(tmp_path)).catalogue()
    assert {name: task.kind for name, task in catalogue.tasks.items()} == {
        "boxes": "detection",
        "organ": "segmentation",
        "label": "classification",
    }
    south = [record for record in catalogue.records if record.site == "south"]
    assert south
    assert not any("boxes" in record.truth for record in south), "has_det is 0 there, though the cells are []"
    north = [record.truth["boxes"] for record in catalogue.records if record.site == "north"]
    assert all(isinstance(truth, BoxTruth) for truth in north)


@pytest.mark.parametrize(
    "name, kinds",
    [
        ("covid_cxr", {"label", "finding", "boxes", "lungs", "infection"}),
        ("mini_mias", {"label", "abnormality", "background_tissue", "boxes", "breast", "lesion"}),
        ("pneumonia_cxr", {"label", "subtype", "lungs"}),
    ],
)
def test_the_tasks_of_real_tables(name, kinds):
    own = data(real(name))
    assert set(own.catalogue().tasks) == kinds
    assert not own.quarantine.issues


def write_images(root: Path, *files: str) -> None:
    for n, file in enumerate(files):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(n).integers(1, 255, (32, 32), np.uint8)).save(root / file)


def test_sub_folders_are_classes(tmp_path):
    write_images(tmp_path, *(f"{c}/{i}.png" for c in ("normal", "mass") for i in range(8)), "mass/masks/0.png")
    catalogue = data(tmp_path).catalogue()
    assert catalogue.tasks["label"].classes == ("mass", "normal")
    assert len(catalogue.records) == 16
    assert any("1 files in folders of masks" in note for note in catalogue.notes)
    assert any("no patient column" in note for note in catalogue.notes)


def test_folders_of_splits_come_before_those_of_classes(tmp_path):
    write_images(
        tmp_path, *(f"{s}/{c}/sub/{i}.jpg" for s in ("train", "test") for c in ("NORMAL", "COVID") for i in "ab")
    )
    catalogue = data(tmp_path).catalogue()
    assert catalogue.tasks["label"].classes == ("COVID", "NORMAL")
    assert [record.split for record in catalogue.records].count("test") == 4


@pytest.mark.parametrize(
    "files, words",
    [
        (["a.png", "x/b.png"], "1 images lie in no folder of a class, such as 'a.png'"),
        (["x/a.png", "x/b.png"], "its images lie in one folder of a class, x"),
        ([], "its images lie in no folder"),
    ],
)
def test_a_folder_without_table_and_classes_is_refused(tmp_path, files, words):
    write_images(tmp_path, *files)
    with pytest.raises(DataError, match=words):
        data(tmp_path).catalogue()
