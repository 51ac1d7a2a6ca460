import math
import zipfile
from importlib import metadata

import pytest
from PIL import Image

from datamodules.cache.rasterize import rasterize
from datamodules.images.presets import PlainPreset
from datamodules.public.covid_chestxray import _lung_masks, read_catalogue
from mtmedformer.errors import ConfigError, DataError
from tests.fixtures.public_layouts import covid_chestxray as layout


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return layout.write(tmp_path_factory.mktemp("covid_chestxray"))


@pytest.fixture(scope="module")
def records(root):
    return {r.id: r for r in read_catalogue(root).records}


def findings(record):
    names = ("No Finding", "Pneumonia", "Viral", "COVID-19", "Bacterial", "Fungal")
    values = record.truth["findings"].values
    return {name: None if math.isnan(value) else value for name, value in zip(names, values, strict=True)}


def test_a_finding_holds_for_every_step_of_its_path(records):
    expected = {"No Finding": 0, "Pneumonia": 1, "Viral": 1, "COVID-19": 1, "Bacterial": 0, "Fungal": 0}
    assert findings(records["a-1.jpeg"]) == expected


def test_pneumonia_alone_leaves_its_kinds_unknown_not_absent(records):
    unknown = dict.fromkeys(("Viral", "COVID-19", "Bacterial", "Fungal"))
    assert findings(records["d.png"]) == {"No Finding": 0, "Pneumonia": 1} | unknown
    assert findings(records["e.png"])["COVID-19"] is None
    assert findings(records["e.png"])["Bacterial"] == 0
    assert "pathology" not in records["d.png"].truth
    assert "pathology" not in records["e.png"].truth


def test_other_diseases_are_negative_for_the_classes_they_exclude(records):
    assert set(findings(records["j.png"]).values()) == {0}
    assert "pathology" not in records["j.png"].truth


def test_three_class_label_where_the_path_decides(records):
    assert records["a-1.jpeg"].truth["pathology"].values == (1, 0, 0)
    assert records["b.png"].truth["pathology"].values == (0, 1, 0)
    assert records["c.jpg"].truth["pathology"].values == (0, 1, 0)
    assert records["f.png"].truth["pathology"].values == (0, 0, 1)


def test_ct_lateral_undecided_absent_and_repeated_rows_are_dropped_and_counted(root, records):
    assert not {"i.png", "a-3.jpeg", "h.png", "absent.png"} & records.keys()
    notes = " ".join(read_catalogue(root).notes)
    for reason in ("modality CT", "view L", "todo or unknown", "not on disk", "listed twice"):
        assert f"1 rows dropped: {reason}" in notes.replace("the image is ", "").replace("finding ", "")


def test_undecided_finding_with_a_lung_mask_stays_without_a_class(records):
    assert records["g.png"].truth.keys() == {"lungs"}


def test_patients_are_grouped_and_sites_come_from_the_source(records):
    assert records["a-1.jpeg"].patient == records["a-2.jpeg"].patient == "2"
    assert records["l.png"].patient == "13a"
    sites = {name: records[name].site for name in ("a-1.jpeg", "b.png", "c.jpg", "e.png")}
    assert list(sites.values()) == ["journals", "radiopaedia", "eurorad", "sirm_italy"]


def test_v7_value_127_is_not_lung(root, records):
    drawn = rasterize(records["a-1.jpeg"], PlainPreset(), (60, 50))
    assert drawn.masks["lungs"][0, 20, 30] == 1
    assert drawn.masks["lungs"][0, 32, 30] == 0


def test_an_all_zero_lung_mask_is_unknown(records):
    assert "lungs" not in records["c.jpg"].truth


def test_masks_of_a_network_are_weak(root):
    catalogue = read_catalogue(root, lung_masks=root / "annotations" / "lungVAE-masks")
    labelled = [r for r in catalogue.records if "lungs" in r.truth]
    assert [r.id for r in labelled] == ["d.png"]
    assert labelled[0].weak == {"lungs"}
    assert catalogue.tasks["lungs"].weak
    assert not read_catalogue(root).tasks["lungs"].weak


def test_other_classes_and_views_can_be_chosen(root):
    catalogue = read_catalogue(root, findings=["SARS", "Tuberculosis"], views=["L"])
    assert [r.id for r in catalogue.records] == ["a-3.jpeg"]
    assert catalogue.records[0].truth["findings"].values == (0, 0)


@pytest.mark.parametrize("options", [{"findings": ["Covid"]}, {"findings": []}, {"views": ["PA2"]}])
def test_a_class_or_view_that_is_not_in_the_table_raises(root, options):
    with pytest.raises(ConfigError, match="choose from those in"):
        read_catalogue(root, **options)


def test_missing_mask_folder_and_broken_mask_are_named(root, tmp_path):
    with pytest.raises(DataError, match="lung_masks="):
        read_catalogue(root, lung_masks=tmp_path / "nothing")
    huge = b"P5 60000 60000 255\n"  # more pixels than Pillow opens
    for content in (b"no image", huge):
        (tmp_path / "a-1.jpeg").write_bytes(content)
        with pytest.raises(DataError, match=r"a-1\.jpeg: cannot be read as a lung mask"):
            read_catalogue(root, lung_masks=tmp_path)


@pytest.mark.slow  # decodes 1.2 gigapixels
def test_real_v7_masks_435_of_517_show_lungs(tmp_path):
    try:
        files = metadata.files("torchxrayvision") or []
    except metadata.PackageNotFoundError:
        pytest.skip("torchxrayvision is not installed (pip install --no-deps torchxrayvision)")
    archive = next(file.locate() for file in files if file.name == "semantic_masks_v7labs_lungs.zip")
    with zipfile.ZipFile(archive) as masks:
        masks.extractall(tmp_path)
    names = [f.name for f in (tmp_path / "semantic_masks_v7labs_lungs").iterdir()]
    (tmp_path / "images").mkdir()
    for name in names:
        (tmp_path / "images" / name).touch()
    found, weak = _lung_masks(tmp_path, None)
    assert len(names) == 517
    assert len(found) == 435
    assert not weak
    with Image.open(found[min(found)].file) as mask:
        assert mask.getextrema()[1] == 255
