"""Patients found in paths, findings that a report leaves open, films that are negatives."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image

from datamodules.base import MedicalDataModule
from datamodules.labels_csv.columns import ClassColumns, PatientColumn
from datamodules.labels_csv.datamodule import LabelsCSVDataModule
from mtmedformer.errors import ConfigError, DataError

PATHS = [f"{split}/patient{n:05d}/study1/view1.png" for split in ("train", "valid") for n in range(4)]
SIGNS = {"signs": ClassColumns(columns=["Edema", "Effusion"], uncertain=0.5)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Six columns of CheXpert, of eight films of four patients each with the number of another split's patient."""
    rows = ["Path,Sex,Age,Edema,Effusion,inverted"]
    for n, path in enumerate(PATHS):
        (tmp_path / path).parent.mkdir(parents=True)
        film = np.random.default_rng(n).integers(1, 200, (32, 32), np.uint8)
        Image.fromarray(255 - film if n == 1 else film).save(tmp_path / path)
        rows.append(f"{path},Male,6{n},{('1.0', '-1.0', '0.0', '')[n % 4]},{('0.0', '1.0')[n % 2]},{int(n == 1)}")
    (tmp_path / "labels.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


def data(root: Path, **arguments) -> LabelsCSVDataModule:
    plain = {"image_size": 32, "num_workers": 0, "cache_dir": None, "image_column": "Path", "preset": None,
             "patient": PatientColumn("Path", r"patient(\d+)"), "classification": SIGNS}  # fmt: skip
    return LabelsCSVDataModule(root, **plain | arguments)


def test_a_pattern_finds_the_patient_in_a_path(root):
    records = data(root).catalogue().records
    assert [record.patient for record in records] == ["00000", "00001", "00002", "00003"] * 2
    whole = data(root, patient=PatientColumn(pattern=r"patient\d+")).catalogue().records
    assert whole[1].patient == "patient00001", "without a group the whole match, without a column the image's"


def test_a_row_without_a_match_is_left_out_and_listed(root):
    table = (root / "labels.csv").read_text()
    (root / "labels.csv").write_text(table.replace(PATHS[0], "train/unknown/view1.png"))
    own = data(root)
    assert len(own.catalogue().records) == 7
    (issue,) = own.quarantine.issues
    assert issue.reason == "no patient in the cell"
    assert issue.detail.startswith(
        "labels.csv line 2, column 'Path': 'train/unknown/view1.png'; data.init_args.patient"
    )
    with pytest.raises(DataError, match=r"no row can be used. .*'person\(.*' finds none; correct the pattern"):
        data(root, patient=PatientColumn("Path", r"person(\d+)")).catalogue()


def test_a_pattern_that_is_no_expression_is_refused(root):
    with pytest.raises(ConfigError, match=r"data.init_args.patient.pattern='\(': no regular expression"):
        data(root, patient=PatientColumn("Path", "("))


def test_the_options_of_the_command_line(root):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(MedicalDataModule, "data")
    words = ["--data=datamodules.LabelsCSVDataModule", f"--data.root={root}", "--data.patient.column=Path",
             r"--data.patient.pattern=patient(\d+)", "--data.image_column=Path",
             "--data.classification={signs: {columns: [Edema, Effusion], uncertain: {Edema: 1}}}"]  # fmt: skip
    own = parser.instantiate(parser.parse_args(words)).data
    assert own.catalogue().records[1].patient == "00001"
    assert own.catalogue().records[1].truth["signs"].values == (1.0, 1.0)


@pytest.mark.parametrize(
    "uncertain, label", [("unknown", math.nan), (0, 0.0), (1, 1.0), (0.5, 0.5), ({"Edema": 1}, 1.0), ({}, math.nan)]
)
def test_a_finding_left_open_has_the_label_of_the_option(root, uncertain, label):
    signs = ClassColumns(columns=["Edema", "Effusion"], uncertain=uncertain)
    values = [
        record.truth["signs"].values for record in data(root, classification={"signs": signs}).catalogue().records
    ]
    np.testing.assert_equal([v[0] for v in values[:4]], [1.0, label, 0.0, math.nan])


def test_a_probability_is_a_label_of_training_only(root):
    own = data(root, official_splits=True)
    own.setup("fit")
    labels = {split: [own.datasets[split][i].truth["signs"] for i in range(len(own.datasets[split]))]
              for split in ("train", "val")}  # fmt: skip
    soft = [float(v) for values in labels["train"] for v in values if 0 < v < 1]
    assert not any(0 < v < 1 for values in labels["val"] for v in values)
    assert set(soft) <= {0.5}
    own.datasets["train"].augment = False
    assert torch.isnan(own.datasets["train"]._labels(own.records[1].truth["signs"]))[0]


@pytest.mark.parametrize(
    "spec, words",
    [
        (ClassColumns(columns=["a", "b"], uncertain=2.0), "uncertain=2: give unknown, or a probability"),
        (ClassColumns(columns=["a", "b"], uncertain={"c": 1}), "'c' is no class of the task; its classes are a, b"),
        (ClassColumns(column="a", uncertain=1), "this task has one column of names"),
    ],
)
def test_labels_of_open_findings_that_cannot_be_are_refused(root, spec, words):
    with pytest.raises(ConfigError, match=words):
        data(root, classification={"signs": spec})


def test_a_negative_is_inverted_when_it_is_read(root):
    own = data(root)
    own.setup(None)
    films = {record.file: split[i].image for split in own.datasets.values() for i, record in enumerate(split.records)}
    expected = np.random.default_rng(1).integers(1, 200, (32, 32), np.uint8)
    np.testing.assert_allclose(films[root / PATHS[1]][0] * 255, expected, atol=0.01)
    np.testing.assert_allclose(own.original(root / PATHS[1]) * 255, expected, atol=0.01)  # overlays show it alike
    plain = data(root, inverted_column=None)
    first, second = own.catalogue().records[1], plain.catalogue().records[1]
    assert own.preprocessing.keys([first]) != plain.preprocessing.keys([second]), "another entry of the cache"


def test_a_cell_that_is_neither_0_nor_1_leaves_the_image_out(root):
    table = (root / "labels.csv").read_text().replace(",1\n", ",perhaps\n")
    (root / "labels.csv").write_text(table)
    own = data(root)
    assert len(own.catalogue().records) == 7
    assert own.quarantine.by_reason() == {"image: cell neither 0 nor 1": 1}
