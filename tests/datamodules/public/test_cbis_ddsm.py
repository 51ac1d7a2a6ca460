import numpy as np
import pytest

from datamodules.cache.rasterize import rasterize
from datamodules.images.masks import read_mask
from datamodules.images.presets import PlainPreset
from datamodules.public.cbis_ddsm import CASES, find_mask, read_catalogue, read_films
from datamodules.public.layout import image_size
from datamodules.records import BoxTruth, MaskSource
from mtmedformer.errors import DataError
from tests.fixtures.layout_files import noise, square, write_dicom
from tests.fixtures.public_layouts import cbis_ddsm as layout

HEIGHT, WIDTH = layout.SIZE
FIRST = "Mass-Training_P_00001_LEFT_CC"
TWO = "Mass-Training_P_00001_LEFT_MLO"


@pytest.fixture(scope="module", params=["nbia", "classic", "jpeg"])
def root(request, tmp_path_factory):
    return layout.write(tmp_path_factory.mktemp("cbis"), request.param)


@pytest.fixture(scope="module")
def records(root):
    return {r.id: r for r in read_catalogue(root).records}


@pytest.fixture(scope="module")
def nbia(tmp_path_factory):
    return layout.write(tmp_path_factory.mktemp("nbia"))


def test_mask_and_crop_are_distinguished_by_content_in_every_layout(records):
    for record in records.values():
        for truth in (record.truth.get("masses"), record.truth.get("calcifications")):
            for source in truth.masks if truth else ():
                size = image_size(source.file)
                assert size in ((HEIGHT, WIDTH), (2 * HEIGHT, 2 * WIDTH))
                values = read_mask(source.file)
                assert len(np.unique(values)) == 2
                assert 0 < (values > 0).mean() < 0.1


def test_every_film_is_found_and_is_the_full_image(records):
    assert len(records) == 18
    assert all(image_size(r.file) == (HEIGHT, WIDTH) for r in records.values())


def test_a_mask_of_the_size_of_its_crop_is_recognised_by_its_two_grey_levels(tmp_path):
    crop, mask = noise(1, 20, 20), square(20, 20, (5, 5, 9, 9))
    for names in (("1-1.dcm", "1-2.dcm"), ("1-2.dcm", "1-1.dcm")):
        write_dicom(tmp_path / names[0], crop)
        write_dicom(tmp_path / names[1], mask)
        assert find_mask([tmp_path / "1-1.dcm", tmp_path / "1-2.dcm"], (20, 20)) == tmp_path / names[1]
        assert find_mask([tmp_path / "1-1.dcm", tmp_path / "1-2.dcm"], (99, 99)) == tmp_path / names[1]


def test_two_crops_and_no_mask_give_none(tmp_path):
    for number in (1, 2):
        write_dicom(tmp_path / f"1-{number}.dcm", noise(number, 20 + number, 20))
    assert find_mask(sorted(tmp_path.iterdir()), (80, 60)) is None
    assert find_mask([], (80, 60)) is None


def test_paths_that_end_in_a_newline_and_either_spelling_of_density_are_read(nbia):
    raw = (nbia / "mass_case_description_train_set.csv").read_text()
    assert '000001.dcm\n"' in raw
    for kind in ("mass", "calc"):
        for film in read_films(nbia / f"{kind}_case_description_train_set.csv"):
            assert film.density == {"3"}
            assert all(CASES.match(lesion.roi)[6] for lesion in film.lesions)


def test_patient_is_the_woman_not_the_view(records):
    assert records[FIRST].patient == records[TWO].patient == "P_00001"
    assert records["Calc-Training_P_00001_LEFT_CC"].patient == "P_00001"
    assert (records[TWO].laterality, records[TWO].view) == ("L", "MLO")


def test_film_of_two_lesions_has_a_box_each_and_both_in_one_mask(records):
    record = records[TWO]
    assert len(record.truth["masses"].masks) == 2
    [mass, calcification] = record.truth["lesion"].channels
    assert calcification is None
    assert mass.file == record.truth["masses"].masks[0].file
    assert [also.file for also in mass.also] == [record.truth["masses"].masks[1].file]
    drawn = rasterize(record, PlainPreset(), (HEIGHT, WIDTH))
    assert drawn.boxes["masses"].tolist() == [[10, 20, 18, 34], [25, 20, 33, 34]]
    assert drawn.masks["lesion"][0].sum() == 2 * 8 * 14
    assert (drawn.masks["lesion"][1] == 255).all()


def test_mask_of_another_size_is_brought_to_the_image_and_noted(root, records):
    record = records["Mass-Training_P_00003_RIGHT_MLO"]
    drawn = rasterize(record, PlainPreset(), (HEIGHT, WIDTH))
    assert drawn.boxes["masses"].tolist() == [[10, 20, 18, 34]]
    assert any("1 masks differ in size" in note for note in read_catalogue(root).notes)


def test_mask_in_another_series_than_its_crop_is_found(records):
    assert records["Mass-Training_P_00002_RIGHT_CC"].truth["masses"].masks


def test_film_whose_mask_is_missing_is_unknown_not_negative(root, records):
    truth = records["Mass-Training_P_00004_LEFT_CC"].truth
    assert truth.keys() == {"pathology", "birads", "density"}
    assert any("1 mammograms lack the mask" in note for note in read_catalogue(root).notes)


def test_other_type_of_lesion_is_unknown_in_a_film_of_one_type(records):
    for record in records.values():
        mine, other = ("masses", "calcifications") if record.id.startswith("Mass") else ("calcifications", "masses")
        assert other not in record.truth
        if mine in record.truth:
            known = [channel is not None for channel in record.truth["lesion"].channels]
            assert known == ([True, False] if mine == "masses" else [False, True])


def test_there_is_no_true_negative(records):
    assert not any(truth == BoxTruth() for r in records.values() for truth in r.truth.values())
    assert not any(
        source == MaskSource() for r in records.values() if "lesion" in r.truth for source in r.truth["lesion"].channels
    )


def test_image_label_is_the_worst_of_both_tables(records):
    assert records["Calc-Training_P_00001_LEFT_CC"].truth["pathology"].values == (0, 1)
    assert records[TWO].truth["pathology"].values == (0, 1)
    assert records[TWO].truth["birads"].values == (0, 0, 0, 0, 1)
    assert records["Calc-Training_P_00001_LEFT_CC"].truth["birads"].values == (0, 0, 0, 1, 0)


def test_assessment_0_is_unknown(records):
    assert "birads" not in records["Mass-Training_P_00002_RIGHT_CC"].truth


@pytest.mark.parametrize(
    "option, classes, values",
    [
        ("benign", ("benign", "malignant"), (1, 0)),
        ("separate", ("benign_without_callback", "benign", "malignant"), (1, 0, 0)),
        ("unknown", ("benign", "malignant"), None),
    ],
)
def test_benign_without_callback_follows_the_option(nbia, option, classes, values):
    catalogue = read_catalogue(nbia, benign_without_callback=option)
    record = next(r for r in catalogue.records if r.id == "Mass-Training_P_00002_RIGHT_CC")
    assert catalogue.tasks["pathology"].classes == classes
    truth = record.truth.get("pathology")
    assert (truth.values if truth else None) == values


def test_boxes_can_carry_each_lesions_own_pathology(nbia):
    catalogue = read_catalogue(nbia, lesion_classes="pathology")
    assert catalogue.tasks["masses"].classes == ("benign", "malignant")
    record = next(r for r in catalogue.records if r.id == TWO)
    assert record.truth["masses"].mask_labels == (0, 1)
    unknown = read_catalogue(nbia, lesion_classes="pathology", benign_without_callback="unknown").records
    assert "masses" not in next(r for r in unknown if "P_00002" in r.id).truth


def test_patients_that_leak_across_types_are_dropped_from_train_and_noted(root, records):
    assert "Mass-Training_P_00013_LEFT_CC" not in records
    assert "Calc-Training_P_00018_RIGHT_CC" not in records
    assert records["Calc-Test_P_00013_LEFT_CC"].split == "test"
    assert any("2 images of 2 patients" in note for note in read_catalogue(root).notes)
    assert len(read_catalogue(root, official=False).records) == 20


def test_one_lesion_type_leaks_no_patient_and_has_one_detection_task(nbia):
    catalogue = read_catalogue(nbia, lesion_types="mass")
    assert "Mass-Training_P_00013_LEFT_CC" in {r.id for r in catalogue.records}
    assert not any("dropped" in note for note in catalogue.notes)
    assert catalogue.tasks["lesions"].classes == catalogue.tasks["lesion"].classes == ("mass",)


def test_tables_of_the_other_type_may_be_missing(tmp_path):
    root = layout.write(tmp_path)
    for table in root.glob("calc*.csv"):
        table.unlink()
    assert read_catalogue(root, lesion_types="mass").records
    with pytest.raises(DataError, match="lacks calc_case_description"):
        read_catalogue(root)


def test_broken_files_make_only_their_labels_unknown(tmp_path, caplog):
    root = layout.write(tmp_path)
    records = {r.id: r for r in read_catalogue(root).records}
    records[FIRST].truth["masses"].masks[0].file.write_bytes(b"\0" * 200)
    records["Mass-Test_P_00101_LEFT_CC"].file.write_bytes(b"no image")
    image_size.cache_clear()
    after = {r.id: r for r in read_catalogue(root).records}
    assert after.keys() == records.keys()
    assert "masses" not in after[FIRST].truth
    assert "masses" not in after["Mass-Test_P_00101_LEFT_CC"].truth
    assert "cannot be read as an image" in caplog.text


@pytest.mark.parametrize(
    "old, new", [("MALIGNANT", "MALIGN"), ("Mass-Training_P_00001", "P_00001"), (",4,BENIGN", ",9,BENIGN")]
)
def test_an_invalid_row_raises(tmp_path, old, new):
    root = layout.write(tmp_path)
    table = root / "mass_case_description_train_set.csv"
    table.write_text(table.read_text().replace(old, new))
    with pytest.raises(DataError, match="mass_case_description_train_set"):
        read_catalogue(root)


def test_a_missing_table_is_named(tmp_path):
    root = layout.write(tmp_path)
    (root / "CBIS-DDSM").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="CBIS-DDSM images: not found: expected Mass-T"):
        read_catalogue(root)
