import pytest

from datamodules.public.vindr_mammo import CATEGORIES, read_catalogue
from datamodules.records import BoxTruth
from mtmedformer.errors import ConfigError, DataError
from tests.fixtures.public_layouts import vindr_mammo as layout

HEIGHT, WIDTH = layout.SIZE


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return layout.write(tmp_path_factory.mktemp("vindr"))


@pytest.fixture(scope="module")
def records(root):
    return read_catalogue(root).records


def of(records, study, side, view):
    return next(r for r in records if (r.patient, r.laterality, r.view) == (study, side, view))


def label(name):
    return CATEGORIES.index(name)


def test_boxes_over_each_edge_are_clipped(records):
    assert of(records, "s0", "L", "CC").truth["lesions"] == BoxTruth(((0, 10, 20, 30.5),), (label("Mass"),))
    assert of(records, "s0", "L", "MLO").truth["lesions"].boxes == ((30, 0, WIDTH, 20),)
    assert of(records, "s1", "R", "CC").truth["lesions"].boxes == ((5, 50, 25, HEIGHT), (20, 20, 30, 30))


def test_list_of_categories_is_parsed_the_first_labels_the_box_and_all_label_the_image(records):
    record = of(records, "s8", "R", "CC")
    assert record.truth["lesions"].labels == (label("Nipple Retraction"),)
    found = {name for name, value in zip(CATEGORIES, record.truth["findings"].values, strict=True) if value}
    assert found == {"Nipple Retraction", "Mass"}


def test_no_finding_is_a_true_negative(records):
    truth = of(records, "s4", "L", "CC").truth
    assert truth["lesions"] == BoxTruth()
    assert set(truth["findings"].values) == {0}


def test_finding_without_a_box_leaves_the_boxes_unknown_but_not_the_finding(root, records):
    truth = of(records, "s2", "R", "MLO").truth
    assert "lesions" not in truth
    assert truth["findings"].values[label("Global Asymmetry")] == 1
    assert any("1 images have no usable finding row" in note for note in read_catalogue(root).notes)


def test_box_without_finding_birads_is_kept(records):
    assert of(records, "s1", "R", "CC").truth["lesions"].labels == (label("Focal Asymmetry"), label("Mass"))


def test_fewer_categories_keep_the_image_annotated(root):
    catalogue = read_catalogue(root, categories=["Mass", "Suspicious Calcification"])
    assert catalogue.tasks["lesions"].classes == ("Mass", "Suspicious Calcification")
    assert of(catalogue.records, "s1", "R", "CC").truth["lesions"] == BoxTruth(((20, 20, 30, 30),), (0,))
    assert of(catalogue.records, "s8", "R", "CC").truth["lesions"].labels == (0,)
    assert of(catalogue.records, "s2", "R", "MLO").truth["lesions"] == BoxTruth()


def test_study_is_the_patient_and_the_extra_view_belongs_to_it(records):
    assert len(records) == 41
    assert sum(r.patient == "s3" for r in records) == 5


def test_the_official_test_split_is_kept_and_validation_is_drawn(records):
    assert {r.split for r in records if r.patient in ("s8", "s9")} == {"test"}
    assert {r.split for r in records if r.patient not in ("s8", "s9")} == {"train"}


def test_birads_density_and_suspicion_are_of_the_breast(root, records):
    truth = of(records, "s0", "L", "CC").truth
    assert truth["birads"].values == (0, 0, 0, 0, 1)
    assert truth["suspicion"].values == (0, 1)
    assert of(records, "s0", "R", "CC").truth["suspicion"].values == (1, 0)
    assert truth["density"].values == (1, 0, 0, 0)
    assert of(read_catalogue(root, birads_positive=3).records, "s2", "L", "CC").truth["suspicion"].values == (0, 1)


def test_there_is_no_mask_task(root):
    assert "segmentation" not in {task.kind for task in read_catalogue(root).tasks.values()}


def test_the_scanner_is_a_group_if_the_metadata_has_it(records):
    assert of(records, "s1", "L", "CC").groups == {"client": "Mammomat Inspiration"}


def test_boxes_refer_to_the_tables_size(records):
    assert {r.size for r in records} == {(HEIGHT, WIDTH)}


def test_box_wholly_outside_leaves_the_boxes_unknown_and_is_counted(tmp_path):
    root = layout.write(tmp_path)
    edit(root / "finding_annotations.csv", "20.0,20.0,30.0,30.0", "500.0,500.0,600.0,600.0")
    catalogue = read_catalogue(root)
    assert "lesions" not in of(catalogue.records, "s1", "R", "CC").truth
    assert any("1 boxes lie wholly outside" in note for note in catalogue.notes)


def edit(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    "table, old, new",
    [
        ("finding_annotations.csv", "['Focal Asymmetry']", "['Blob']"),
        ("finding_annotations.csv", "['Focal Asymmetry']", "__import__('os')"),
        ("finding_annotations.csv", "20.0,20.0,30.0,30.0", "x,20.0,30.0,30.0"),
        ("finding_annotations.csv", "20.0,20.0,30.0,30.0", "inf,20.0,30.0,30.0"),
        ("breast-level_annotations.csv", "BI-RADS 5", "BI-RADS 9"),
        ("breast-level_annotations.csv", "DENSITY A", "DENSITY"),
        ("breast-level_annotations.csv", "training", "trianing"),
        ("breast-level_annotations.csv", f"{HEIGHT},{WIDTH}", f",{WIDTH}"),
    ],
)
def test_an_invalid_cell_raises_and_names_the_table(tmp_path, table, old, new):
    root = layout.write(tmp_path)
    edit(root / table, old, new)
    with pytest.raises(DataError, match=table):
        read_catalogue(root)


@pytest.mark.parametrize("categories", [[], ["Lump"]])
def test_an_unknown_category_raises(root, categories):
    with pytest.raises(ConfigError, match="valid are Mass"):
        read_catalogue(root, categories=categories)
