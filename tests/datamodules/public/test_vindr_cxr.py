"""VinDr-CXR: what several readers agree on, boxes of one lesion, the two parts."""

import math
import shutil

import numpy as np
import pytest

from datamodules import VinDrCXRDataModule
from datamodules.public.vindr_cxr import DISEASES, LESIONS, _boxes, _Mark
from mtmedformer.errors import ConfigError, DataError
from tests.fixtures.public_layouts.vindr_cxr import name, write, write_png

CLASSES = (*LESIONS, *DISEASES)


def records(root, **options):
    data = VinDrCXRDataModule(root, image_size=64, num_workers=0, cache_dir=None, **options)
    catalogue = data.catalogue()
    return {record.id: record for record in catalogue.records}, catalogue


def value(record, label):
    return record.truth["findings"].values[CLASSES.index(label)]


def test_labels_are_what_the_readers_agree_on(tmp_path):
    found, catalogue = records(write(tmp_path))
    agreed, alone, normal = found[name(0)], found[name(1)], found[name(2)]
    assert (value(agreed, "Cardiomegaly"), value(agreed, "Pneumonia"), value(agreed, "Edema")) == (1, 1, 0)
    assert agreed.truth["normality"].values == (0, 1)
    assert math.isnan(value(alone, "Nodule/Mass")), "one of three readers: neither a finding nor none"
    assert value(alone, "Edema") == 0
    assert alone.truth["normality"].values == (1, 0), "two of three readers call it normal"
    assert normal.truth["normality"].values == (1, 0)
    assert catalogue.notes == []
    any_reader, _ = records(tmp_path / "vindr-cxr", min_readers=1)
    assert value(any_reader[name(1)], "Nodule/Mass") == 1


def test_boxes_of_one_lesion_become_their_mean_and_none_is_lost(tmp_path):
    found, _ = records(write(tmp_path))
    (box,) = found[name(0)].truth["lesions"].boxes
    np.testing.assert_allclose(box, (11, 30, 41, 60))
    assert found[name(0)].truth["lesions"].labels == (LESIONS.index("Cardiomegaly"),)
    assert found[name(1)].truth["lesions"].boxes == ((8, 8, 16, 16),), "the box of a single reader"
    assert found[name(2)].truth["lesions"].boxes == (), "read by three, and none found: a true negative"
    strict, _ = records(tmp_path / "vindr-cxr", box_readers=2)
    assert strict[name(1)].truth["lesions"].boxes == ()


def test_two_boxes_of_one_reader_are_two_lesions():
    marks = [_Mark("R1", "ILD", (0, 0, 10, 10)), _Mark("R1", "ILD", (1, 0, 11, 10)), _Mark("R2", "ILD", (0, 1, 10, 10))]
    assert len(_boxes(marks, LESIONS, 1).boxes) == 2
    assert len(_boxes(marks, LESIONS, 2).boxes) == 1


def test_the_test_part_is_a_consensus_with_another_spelling(tmp_path):
    found, _ = records(write(tmp_path))
    first, second = found[name(20)], found[name(21)]
    assert (first.split, found[name(0)].split) == ("test", "train")
    assert math.isnan(value(first, LESIONS[0])), "a blank cell"
    assert value(second, "Edema") == 1
    assert value(second, "Other diseases") == 0
    assert second.truth["lesions"].boxes == ((5, 5, 30, 30),)


def test_files_of_another_size_and_a_missing_part(tmp_path):
    root = write_png(tmp_path)
    for table in ("image_labels_train.csv", "annotations_train.csv"):
        (root / "annotations" / table).rename(root / table)
    shutil.rmtree(root / "annotations")
    found, catalogue = records(root)
    assert found[name(0)].size == (64, 64)
    assert catalogue.notes == ["VinDr-CXR: image_labels_test.csv is missing, so the test part is not read"]


@pytest.mark.parametrize(
    "options, words",
    [({"classes": ["Edemas"]}, r"\['Edemas'\]; choose from"), ({"classes": ["COPD"]}, "no class with boxes"),
     ({"min_readers": 0}, "give 1 or more")],
)  # fmt: skip
def test_options_that_cannot_be_are_refused(tmp_path, options, words):
    with pytest.raises(ConfigError, match=words):
        VinDrCXRDataModule(tmp_path, **options)


@pytest.mark.parametrize(
    "table, old, new, words",
    [
        ("annotations_train.csv", "Cardiomegaly", "Cardiomegalie", "unknown class 'Cardiomegalie'"),
        ("annotations_train.csv", ",10,30,40,60", ",,,,", "'Cardiomegaly' without a box"),
        ("image_labels_test.csv", "Other disease", "Diseases", "no column 'Other diseases'"),
        ("image_labels_train.csv", "R8,0.0", "R8,0.5", "expected 0 or 1"),
    ],
)
def test_tables_that_cannot_be_are_refused(tmp_path, table, old, new, words):
    root = write(tmp_path)
    file = root / "annotations" / table
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(DataError, match=words):
        records(root)
