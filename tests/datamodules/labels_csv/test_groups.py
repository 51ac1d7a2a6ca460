"""Group columns of a table, bands of numbers, and groups that lack a class."""

import logging

import pytest
from PIL import Image

from datamodules import LabelsCSVDataModule
from datamodules.audit.group_classes import classes_missing_in_groups
from datamodules.labels_csv.columns import ClassColumns
from datamodules.labels_csv.groups import band
from datamodules.records import ClassTruth, Record
from mtmedformer.batch import Task
from mtmedformer.errors import ConfigError, DataError
from tests.datamodules.labels_csv.test_regression_columns import table
from tests.fixtures.dicom_files import film, write_dicom

CANCER = {"cancer": Task("cancer", "classification", ("no", "yes"))}


def data(root, **options) -> LabelsCSVDataModule:
    return LabelsCSVDataModule(
        root, classification={"f": ClassColumns("f")}, cache_dir=None, num_workers=0, image_size=32, **options
    )


def groups(root, **options) -> list[dict[str, str]]:
    return [record.groups for record in data(root, **options).catalogue().records]


@pytest.mark.parametrize(
    ("value", "bounds", "name"),
    [
        (39.9, [40, 60], "under 40"),
        (40, [40, 60], "40-59"),
        (59.5, [40, 60], "40-59"),
        (60, [40, 60], "60 and over"),
        (0.3, [0.25, 0.5], "0.25 to under 0.5"),
        (1, [1, 2, 4], "1 to under 2"),
    ],
)
def test_a_bound_belongs_to_the_band_above_it(value, bounds, name):
    assert band(value, bounds) == name


def test_an_age_column_is_cut_into_bands_and_other_columns_stay(tmp_path):
    root = table(tmp_path, {"f": list("abab"), "sex": ["F", "M", "", "F"], "Age": ["17", "018Y", "", "85.0"]})
    assert groups(root, group_columns=["sex", "Age"]) == [
        {"sex": "F", "Age": "under 18"},
        {"sex": "M", "Age": "18-39"},
        {},
        {"sex": "F", "Age": "80 and over"},
    ]
    assert groups(root, group_columns=["Age"], group_bands={"Age": [50]})[3] == {"Age": "50 and over"}
    assert groups(root, group_bands={"Age": [50]})[0] == {"Age": "under 50"}


def test_what_is_no_number_has_no_band_and_is_counted(tmp_path):
    root = table(tmp_path, {"f": list("abab"), "age": ["old", "40", "", "50"]})
    catalogue = data(root, group_columns=["age"]).catalogue()
    assert catalogue.records[0].groups == {}
    assert any("1 × age that is no number, taken as blank" in note for note in catalogue.notes)


def test_numbers_that_are_not_cut_are_named(tmp_path):
    root = table(tmp_path, {"f": list("ab") * 20, "bmi": [str(20 + i / 10) for i in range(40)]})
    assert any("bmi" in note and "group_bands" in note for note in data(root, group_columns=["bmi"]).catalogue().notes)
    cut = data(root, group_bands={"bmi": [21, 22, 23]}).catalogue()
    assert not any("bmi" in note for note in cut.notes)


@pytest.mark.parametrize("bounds", [[], [60, 40], [float("nan")]])
def test_bounds_that_do_not_rise_are_refused(tmp_path, bounds):
    with pytest.raises(ConfigError, match="rising order"):
        data(tmp_path, group_bands={"age": bounds})


def test_a_column_that_is_missing_is_named(tmp_path):
    root = table(tmp_path, {"f": list("abab"), "age": ["1"] * 4})
    with pytest.raises(DataError, match=r"group_bands.*did you mean 'age'"):
        data(root, group_bands={"agee": [40]}).catalogue()


def test_sex_age_and_manufacturer_are_read_from_headers_where_the_table_lacks_them(tmp_path):
    header = {"PatientSex": "F", "PatientAge": "047Y", "Manufacturer": "Acme  XR "}
    write_dicom(tmp_path / "a.dcm", film(40, 32), bits=12, **header)
    write_dicom(tmp_path / "b.dcm", film(40, 32), bits=12, PatientSex="unclear", PatientAge="", Manufacturer="")
    Image.effect_noise((48, 48), 40).save(tmp_path / "c.png")
    (tmp_path / "labels.csv").write_text("image,patient,f,sex\na.dcm,p,x,M\nb.dcm,q,y,\nc.png,r,y,F\n")
    columns = ["sex", "age", "manufacturer"]
    assert groups(tmp_path, group_columns=columns, group_bands={"age": [40, 60]}) == [
        {"sex": "M", "age": "40-59", "manufacturer": "Acme XR"},  # the table has a column of the sex
        {},
        {"sex": "F"},
    ]
    (tmp_path / "labels.csv").write_text("image,patient,f\na.dcm,p,x\nb.dcm,q,y\nc.png,r,y\n")
    assert [one.get("sex") for one in groups(tmp_path, group_columns=columns)] == ["F", None, None]


def test_a_batch_has_the_groups_of_its_images(tmp_path):
    root = table(tmp_path, {"f": list("ab") * 10, "sex": list("FM") * 10})
    module = data(root, group_columns=["sex"], batch_size=2)
    module.setup("test")
    metas = [meta for batch in module.test_dataloader() for meta in batch.meta]
    assert metas
    assert all(meta.groups == {"sex": "FM"[int(meta.id) % 2]} for meta in metas)


def records(count: int, sick, column="scanner") -> list[Record]:
    return [
        Record(
            str(i), None, f"p{i}", {"cancer": ClassTruth((1.0 - sick(i), float(sick(i))))}, groups={column: "AB"[i % 2]}
        )  # type: ignore[arg-type]
        for i in range(count)
    ]


def test_a_scanner_without_a_single_cancer_is_named():
    found = classes_missing_in_groups(records(60, lambda i: i % 2 == 0 and i % 4 == 0), CANCER)
    assert list(found) == ["scanner B of cancer"]
    assert (
        "none of the 30 images of scanner 'B' shows 'yes' (50 % of the patients elsewhere)"
        in found["scanner B of cancer"]
    )


def test_ordinary_groups_pass_without_a_word():
    assert not classes_missing_in_groups(records(60, lambda i: i % 3 == 0), CANCER)
    assert not classes_missing_in_groups(records(60, lambda i: i == 4), CANCER)  # a rare class is missing by chance
    assert not classes_missing_in_groups(records(16, lambda i: i % 2 == 0), CANCER)  # few patients
    same = [record for one in records(8, lambda i: i % 2 == 0) for record in [one] * 10]  # few patients, many images
    assert not classes_missing_in_groups(same, CANCER)


def test_the_sites_of_a_federation_cut_by_class_are_no_surprise():
    assert not classes_missing_in_groups(records(60, lambda i: i % 2 == 0, column="client"), CANCER)
    assert classes_missing_in_groups(records(60, lambda i: i % 4 == 0, column="client"), CANCER)


def test_a_patient_with_two_views_counts_once_in_each():
    def film(i, view, sick):
        return Record(f"{i}{view}", None, f"p{i}", {"cancer": ClassTruth((1.0 - sick, float(sick)))}, view=view)  # type: ignore[arg-type]

    rare = [film(i, view, view == "CC" and i < 4) for i in range(20) for view in ("CC", "MLO")]
    assert not classes_missing_in_groups(rare, CANCER)
    often = [film(i, view, view == "CC" and i < 15) for i in range(20) for view in ("CC", "MLO")]
    assert "(75 % of the patients elsewhere)" in classes_missing_in_groups(often, CANCER)["view MLO of cancer"]


def test_fit_logs_it_once(tmp_path, caplog):
    root = table(tmp_path, {"f": ["no", "yes"] * 20, "scanner": ["A", "B"] * 20})
    module = data(root, group_columns=["scanner"])
    with caplog.at_level(logging.WARNING):
        module.plan()
    assert sum("scanner 'A' shows 'yes'" in record.message for record in caplog.records) == 1
