import pytest

from datamodules.cache.rasterize import rasterize
from datamodules.images.presets import PlainPreset
from datamodules.public.inbreast import BIRADS, read_catalogue
from datamodules.records import BoxTruth, MaskSource
from mtmedformer.errors import DataError
from tests.fixtures.public_layouts import inbreast as layout

INNER, BOX, FAR = (12, 14, 20, 28), (10.5, 12.5, 24.5, 30.5), (5, 40, 15, 50)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return layout.write(tmp_path_factory.mktemp("inbreast"))


@pytest.fixture(scope="module")
def records(root):
    return read_catalogue(root).records


def test_the_patient_is_the_second_part_of_the_file_name(records):
    assert [r.patient for r in records[:6]] == ["aaaaa14b80a859"] * 4 + ["bbbba14b80a859"] * 2


def test_ml_in_a_file_name_is_mlo_and_fb_stays(records):
    assert [r.view for r in records[:7]] == ["CC", "MLO", "CC", "MLO", "CC", "MLO", "FB"]
    assert records[0].laterality == "R"


def test_blank_acr_of_190_blanks_is_unknown_density(records):
    assert "density" not in records[4].truth
    assert records[0].truth["density"].values == (0, 1, 0, 0)


def test_birads_4a_to_4c_are_4_and_positive_from_4(records):
    assert records[4].truth["birads"].values == tuple(float(name == "4") for name in BIRADS)
    positive = [r.truth["suspicion"].values == (0, 1) for r in records]
    assert positive[:10] == [True, True, False, False, True, True, False, False, True, False]


def test_birads_3_is_negative_or_unknown_by_option(root, records):
    assert records[6].truth["suspicion"].values == (1, 0)
    assert "suspicion" not in read_catalogue(root, birads_3="unknown").records[6].truth
    assert read_catalogue(root, birads_positive=3, birads_3="unknown").records[6].truth["suspicion"].values == (0, 1)


def test_spiculated_region_joins_the_mask_of_its_mass_and_is_no_second_box(records):
    assert records[0].truth["lesions"] == BoxTruth((INNER,), (0,))
    assert len(records[0].truth["lesion"].channels[0].polygons) == 2


def test_spiculated_region_without_a_mass_is_a_box_in_either_spelling(records):
    assert records[1].truth["lesions"] == BoxTruth((BOX,), (0,))


def test_region_of_one_or_two_points_is_a_point_of_the_mask_and_never_a_box(root, records):
    calcification = records[1].truth["lesion"].channels[1]
    assert calcification.polygons == (((30.2, 40.7),),)
    assert len(records[4].truth["lesion"].channels[1].polygons) == 2
    small = rasterize(records[1], PlainPreset(), (80, 64)).masks["lesion"][1].sum()
    wide = (
        rasterize(read_catalogue(root, point_radius=4.0).records[1], PlainPreset(), (80, 64)).masks["lesion"][1].sum()
    )
    assert 1 <= small < 9 < wide


@pytest.mark.parametrize("points", [[(9.0, 9.0)], [(9.0, 9.0), (12.0, 14.0)]])
def test_a_mass_of_one_point_makes_the_boxes_unknown(tmp_path, points):
    root = layout.write(tmp_path)
    layout.write_xml(root / "AllXML" / "20586908.xml", [("Mass", points)])
    truth = read_catalogue(root).records[0].truth
    assert "lesions" not in truth
    assert len(truth["lesion"].channels[0].polygons) == 1


def test_cluster_is_the_box_of_calcifications(records):
    assert records[4].truth["lesions"] == BoxTruth((FAR,), (1,))


def test_misspelt_asymmetries_are_recognised(records):
    assert records[5].truth["lesions"] == BoxTruth((BOX, FAR), (3, 3))


def test_unnamed_point_is_a_calcification_but_an_unnamed_contour_makes_the_image_unknown(records):
    assert len(records[7].truth["lesion"].channels[1].polygons) == 2
    assert records[7].truth["lesions"] == BoxTruth()
    assert not {"lesions", "lesion"} & records[8].truth.keys()


def test_image_without_xml_is_negative_only_where_birads_is_1(records):
    assert records[2].truth["lesions"] == BoxTruth()
    assert records[2].truth["lesion"].channels == (MaskSource(),) * 4
    assert not {"lesions", "lesion"} & records[9].truth.keys()


def test_without_any_xml_nothing_is_negative(tmp_path):
    root = layout.write(tmp_path)
    for file in (root / "AllXML").iterdir():
        file.unlink()
    assert not any("lesions" in r.truth for r in read_catalogue(root).records)


def test_mask_canvas_is_the_dicoms_own_size(records):
    for record, size in ((records[0], (72, 56)), (records[5], (80, 64))):
        assert rasterize(record, PlainPreset(), (64, 64)).original_size == size


def test_image_that_is_not_in_the_table_is_left_out_and_counted(root, records):
    assert len(records) == 22
    assert any("1 images on disk are not in INbreast.csv" in note for note in read_catalogue(root).notes)


def test_unknown_names_of_regions_are_listed_not_dropped(tmp_path):
    root = layout.write(tmp_path)
    layout.write_xml(root / "AllXML" / "20586908.xml", [("Lump", [(1, 1), (9, 1), (9, 9)]), ("Mass", [(3, 3)])])
    layout.write_xml(root / "AllXML" / "20586934.xml", [("Lump", [(1, 1)]), ("Knot", [(2, 2)])])
    with pytest.raises(DataError, match=r"'Knot' \(1\), 'Lump' \(2\)"):
        read_catalogue(root)
    records = read_catalogue(root, unknown_names="unknown").records
    assert not any("lesion" in r.truth for r in records[:2])


@pytest.mark.parametrize(
    "write",
    [
        lambda file: layout.write_xml(file, [("Mass", [(1, 1), (9, 1), (9, 9)])], number_of_rois=2),
        lambda file: file.write_bytes(file.read_bytes().replace(b"<integer>4</integer>", b"<integer>5</integer>")),
        lambda file: file.write_bytes(file.read_bytes().replace(b"(12.000000, ", b"(twelve, ")),
        lambda file: file.write_bytes(b"<plist><dict></dict></plist>"),
        lambda file: file.write_bytes(b"<plist><dict"),
        lambda file: file.write_bytes(b'<!DOCTYPE x [<!ENTITY a "b">]><plist><string>&a;</string></plist>'),
        lambda file: file.write_bytes(b""),
    ],
    ids=["roi count", "point count", "no number", "no ROIs", "cut off", "entity", "empty"],
)
def test_contradictory_or_broken_xml_raises_and_names_itself(tmp_path, write):
    root = layout.write(tmp_path)
    write(root / "AllXML" / "20586908.xml")
    with pytest.raises(DataError, match=r"20586908\.xml"):
        read_catalogue(root)


@pytest.mark.parametrize("old, new", [(";4c", ";7"), (";1;1\n", ";9;1\n")])
def test_an_unknown_grade_raises(tmp_path, old, new):
    root = layout.write(tmp_path)
    table = root / "INbreast.csv"
    table.write_bytes(table.read_bytes().replace(b"\r\n", b"\n").replace(old.encode(), new.encode(), 1))
    with pytest.raises(DataError, match=r"INbreast\.csv: image"):
        read_catalogue(root)
