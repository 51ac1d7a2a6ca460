import csv
import json

import pytest

from datamodules.cache.rasterize import rasterize
from datamodules.images.presets import PlainPreset
from datamodules.public.mini_mias import read_catalogue, read_rows
from datamodules.records import BoxTruth, MaskSource
from mtmedformer.errors import DataError
from tests.fixtures.layout_files import noise, write_image
from tests.fixtures.public_layouts import mini_mias as layout
from tests.fixtures.real_data import real


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return layout.write(tmp_path_factory.mktemp("mias"))


@pytest.fixture(scope="module")
def records(root):
    return {r.id: r for r in read_catalogue(root).records}


def test_y_counts_from_the_bottom(records):
    [disc] = records["mdb001"].truth["lesion"].channels[0].discs
    assert disc == (535.5, 1023.5 - 425, 197)
    assert records["mdb001"].truth["lesions"].boxes == ((338.5, 401.5, 732.5, 795.5),)


def test_circle_over_the_edge_is_clipped(records):
    first = records["mdb144"].truth["lesions"].boxes[0]
    assert first == (204.5, 0.5, 262.5, 58.5)
    assert all(
        0 <= side <= 1024 for r in records.values() for b in r.truth.get("lesions", BoxTruth()).boxes for side in b
    )


def test_several_rows_of_an_image_are_several_boxes_of_one_record(records):
    assert len(records["mdb005"].truth["lesions"].boxes) == 2
    assert len(records["mdb005"].truth["lesion"].channels[0].discs) == 2


def test_abnormal_rows_without_a_place_are_unknown_not_negative(root, records):
    for name in ("mdb059", "mdb216"):
        assert not {"lesions", "lesion"} & records[name].truth.keys()
        assert records[name].truth["pathology"].values != (1, 0, 0)
    assert any("2 abnormal images have a finding without position" in note for note in read_catalogue(root).notes)


def test_circle_wholly_outside_the_image_is_unknown_too(tmp_path):
    (tmp_path / "Info.txt").write_text("mdb001 G CIRC B 535 2000 30\n")
    write_image(tmp_path / "mdb001.pgm", noise(1, 64, 64))
    assert "lesions" not in read_catalogue(tmp_path).records[0].truth


def test_normal_image_is_a_true_negative(records):
    assert records["mdb003"].truth["lesions"] == BoxTruth()
    assert records["mdb003"].truth["lesion"].channels == (MaskSource(),)
    assert records["mdb003"].truth["pathology"].values == (1, 0, 0)


def test_odd_and_even_films_are_right_and_left_of_one_patient(records):
    assert records["mdb001"].patient == records["mdb002"].patient == "mias001"
    assert records["mdb003"].patient == records["mdb004"].patient != records["mdb005"].patient
    assert (records["mdb001"].laterality, records["mdb002"].laterality) == ("R", "L")


def test_truth_from_circles_is_weak_and_classes_are_not(root, records):
    tasks = read_catalogue(root).tasks
    assert {name for name, task in tasks.items() if task.weak} == {"lesions", "lesion"}
    assert records["mdb001"].weak == {"lesions", "lesion"}


def test_worst_severity_labels_the_image(records):
    assert records["mdb144"].truth["pathology"].values == (0, 0, 1)
    assert records["mdb005"].truth["pathology"].values == (0, 1, 0)


def test_lesions_can_carry_severity_or_abnormality(root):
    severity = {r.id: r for r in read_catalogue(root, "severity").records}
    assert severity["mdb144"].truth["lesions"].labels == (0, 1)
    assert [len(c.discs) for c in severity["mdb144"].truth["lesion"].channels] == [1, 1]
    kind = read_catalogue(root, "abnormality")
    assert kind.tasks["lesions"].classes[0] == "calcification"
    assert {r.id: r for r in kind.records}["mdb219"].truth["lesions"].labels == (0,)


def test_listed_image_that_is_absent_is_counted(root, records):
    assert "mdb322" not in records
    assert any("1 of 16 listed images are not on disk" in note for note in read_catalogue(root).notes)


@pytest.mark.parametrize(
    "line", ["mdb001 X CIRC B 1 2 3", "mdb001 G CIRC B 1 2", "mdb001 G CIRC 1 2 3", "mdb001 G NORM B"]
)
def test_line_that_cannot_be_read_raises(tmp_path, line):
    (tmp_path / "Info.txt").write_text(line + "\n")
    with pytest.raises(DataError, match=r"Info\.txt: line"):
        read_rows(tmp_path / "Info.txt")


def test_real_table_has_322_films_of_161_women():
    rows = read_rows(real("mini_mias", "Info.txt"))
    assert len(rows) == 330
    assert len({row.image for row in rows}) == 322
    assert sum(row.abnormality == "NORM" for row in rows) == 207
    assert {row.image for row in rows if row.abnormality != "NORM" and row.circle is None} == {
        "mdb059",
        "mdb216",
        "mdb233",
        "mdb245",
    }


def test_real_films_agree_with_the_converted_table(tmp_path):
    (tmp_path / "Info.txt").write_bytes(real("mini_mias", "Info.txt").read_bytes())
    for file in real("mini_mias", "fullres_pgm").iterdir():
        (tmp_path / file.name).symlink_to(file)
    records = read_catalogue(tmp_path).records
    with real("mini_mias", "labels.csv").open() as stream:
        converted = {row["image"][7:13]: row for row in csv.DictReader(stream)}
    assert len(records) == 6
    for record in records:
        row = converted[record.id]
        assert record.patient == row["patient"]
        assert record.laterality == row["laterality"]
        assert record.groups["client"] == row["client"]
        expected = [[2 * side for side in box] for box in json.loads(row["boxes"])]
        assert len(record.truth["lesions"].boxes) == len(expected)
        for mine, theirs in zip(record.truth["lesions"].boxes, expected, strict=True):
            assert mine == pytest.approx(theirs, abs=1.0)
        drawn = rasterize(record, PlainPreset(), (256, 256))
        assert (drawn.masks["lesion"][0] == 1).any() == bool(expected)
