import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pydicom
import pytest
import torch
from PIL import Image
from pydicom.uid import JPEG2000Lossless, RLELossless
from scipy import ndimage, stats

from datamodules.images.pixels import read_image
from datamodules.images.presets import PlainPreset
from datamodules.labels_csv.columns import BoxColumns, ClassColumns, MaskColumns
from datamodules.labels_csv.datamodule import LabelsCSVDataModule
from datamodules.phantom import generate as generation
from datamodules.phantom.breast import Breast, draw_breast, sample_breast_lesions
from datamodules.phantom.chest import Chest, draw_chest, sample_opacities
from datamodules.phantom.datamodule import PhantomDataModule, read_catalogue
from datamodules.phantom.generate import _breasts, _chests, expose, generate, settings_key
from datamodules.phantom.sites import SITE_SETS, PhantomSite, tasks_of
from datamodules.records import BoxTruth
from mtmedformer.errors import ConfigError

SIZE = 64
CHEST = PhantomSite(patients=4, prevalence=1.0)
BREAST = PhantomSite("breast", patients=2, prevalence=1.0)


def tree(folder, seed=0, size=SIZE, **sites):
    generate(folder, sites, size, seed)
    return folder


def contents(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def truth(folder):
    return {name: data for name, data in contents(folder).items() if not name.endswith(".dcm")}


def images(folder):
    return {f.name: read_image(f).pixels for f in sorted(folder.rglob("*.dcm"))}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return tree(tmp_path_factory.mktemp("phantom") / "reference", chest=CHEST, breast=BREAST)


def test_same_seed_writes_the_same_bytes_and_another_seed_other_patients(reference, tmp_path):
    assert contents(tree(tmp_path / "again", chest=CHEST, breast=BREAST)) == contents(reference)
    other = tree(tmp_path / "other", seed=1, chest=CHEST, breast=BREAST)
    table, table2 = (pd.read_csv(folder / "labels.csv") for folder in (reference, other))
    assert not set(table.patient) & set(table2.patient)
    first = [images(folder)["0000_0_LCC.dcm"] for folder in (reference, other)]
    assert np.abs(first[0] - first[1]).mean() > 0.01


def test_sites_of_one_set_have_no_patient_and_no_picture_in_common(tmp_path):
    folder = tree(tmp_path / "two", a=CHEST, b=CHEST)
    table = pd.read_csv(folder / "labels.csv")
    assert table.groupby("patient").site.nunique().max() == 1
    pictures = [f.read_bytes() for f in folder.rglob("*_lungs.png")]
    assert len(set(pictures)) == len(pictures) == len(table)


def test_a_site_does_not_depend_on_other_sites(reference, tmp_path):
    alone = tree(tmp_path / "alone", breast=BREAST)
    whole = contents(reference)
    assert {n: d for n, d in contents(alone).items() if n != "labels.csv"}.items() <= whole.items()


@pytest.mark.parametrize(
    ("dial", "value", "shifts"),
    [
        ("gamma", 1.5, True),
        ("contrast", 0.6, True),
        ("noise", 0.1, True),
        ("blur", 8.0, True),
        ("inverted", True, True),
        ("marker", False, True),
        ("monochrome1", True, False),
        ("transfer_syntax", "rle", False),
        ("transfer_syntax", "jpeg2000", False),
        ("bits", 16, False),
        ("bits", 8, False),
    ],
)
def test_a_scanner_setting_changes_pixels_but_not_labels(reference, tmp_path, dial, value, shifts):
    turned = tree(tmp_path / "turned", chest=replace(CHEST, **{dial: value}), breast=replace(BREAST, **{dial: value}))
    assert truth(turned) == truth(reference)
    before, after = images(reference), images(turned)
    assert before.keys() == after.keys()
    for name in before:
        change = np.abs(before[name] - after[name])
        if shifts:
            assert change.max() > 0.05
        elif dial == "bits":  # half a grey level of the coarser file
            assert 0 < change.max() <= 0.5 / (0.88 * (2 ** min(value, 12) - 1)) + 0.5 / (0.88 * 4095)
        else:
            np.testing.assert_allclose(after[name], before[name], atol=1e-6)


def test_undeclared_inversion_gives_the_negative(reference, tmp_path):
    turned = tree(tmp_path / "negative", chest=replace(CHEST, inverted=True), breast=replace(BREAST, inverted=True))
    before, after = images(reference), images(turned)
    for name in before:
        np.testing.assert_allclose(after[name], 1 - before[name], atol=1 / 3000)
    assert {pydicom.dcmread(f).PhotometricInterpretation for f in turned.rglob("*.dcm")} == {"MONOCHROME2"}


def test_declared_inversion_is_really_stored_inverted(reference, tmp_path):
    turned = tree(tmp_path / "mono1", chest=replace(CHEST, monochrome1=True))
    for file in turned.rglob("*.dcm"):
        ours, theirs = (pydicom.dcmread(root / file.relative_to(turned)) for root in (turned, reference))
        assert ours.PhotometricInterpretation == "MONOCHROME1"
        np.testing.assert_array_equal(ours.pixel_array, 4095 - theirs.pixel_array)


@pytest.mark.parametrize(("name", "uid"), [("rle", RLELossless), ("jpeg2000", JPEG2000Lossless)])
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_compression_loses_nothing_by_another_decoder(tmp_path, name, uid, bits):
    plain = tree(tmp_path / "plain", s=replace(CHEST, patients=1, bits=bits))
    packed = tree(tmp_path / "packed", s=replace(CHEST, patients=1, bits=bits, transfer_syntax=name))
    for file in packed.rglob("*.dcm"):
        ds, expected = pydicom.dcmread(file), pydicom.dcmread(plain / file.relative_to(packed))
        assert ds.file_meta.TransferSyntaxUID == uid
        assert ds.SOPInstanceUID == expected.SOPInstanceUID
        ds.pixel_array_options(decoding_plugin="pydicom" if name == "rle" else "gdcm")
        np.testing.assert_array_equal(ds.pixel_array, expected.pixel_array)


def test_files_have_the_attributes_of_a_hospital_export(reference):
    rows = pd.read_csv(reference / "labels.csv", keep_default_na=False)
    uids = set()
    for row in rows.itertuples():
        ds = pydicom.dcmread(reference / row.image)
        uids.add(ds.SOPInstanceUID)
        assert ds.PatientID == row.patient
        assert ds.PatientID.startswith("PHANTOM-")
        assert (ds.ViewPosition, ds.get("ImageLaterality", "")) == (row.view, row.laterality)
        assert (ds.Rows, ds.Columns) == (row.height, row.width)
        assert (ds.Modality, ds.BodyPartExamined) == (("MG", "BREAST") if row.organ == "breast" else ("DX", "CHEST"))
        pixels = read_image(reference / row.image)
        assert pixels.pixels.min() == 0
        assert pixels.pixels.max() > 0.9
        assert pixels.spacing == pytest.approx((float(ds.PixelSpacing[0]),) * 2)
    assert len(uids) == len(rows)
    breasts = rows[rows.organ == "breast"]
    assert breasts.groupby("patient").image.count().tolist() == [4, 4]
    assert set(zip(breasts.laterality, breasts["view"], strict=True)) == {(s, v) for s in "LR" for v in ("CC", "MLO")}


def test_a_chest_film_has_the_heart_at_the_right_and_dark_lungs():
    for seed in range(8):
        drawing = draw_chest(Chest.sample(np.random.default_rng(seed)), [], 96)
        left, right = drawing.organ[:, :48].sum(), drawing.organ[:, 48:].sum()
        assert right < left  # the heart takes its room from the lung at the image's right
        assert ndimage.label(drawing.organ)[1] == 2
        body = drawing.absorption[48, 40:56]
        assert drawing.absorption[drawing.organ].mean() < 0.6 * body.mean()


@pytest.mark.parametrize("view", ["CC", "MLO"])
def test_the_chest_wall_is_at_the_side_of_the_breast(view):
    breast = Breast.sample(np.random.default_rng(0))
    for side, column in (("L", 0), ("R", -1)):
        drawing = draw_breast(breast, [], side, view, 96, marker=False)
        assert drawing.organ[:, column].any()
        assert not drawing.organ[:, -1 - column].any()
        assert drawing.absorption[~ndimage.binary_dilation(drawing.organ, iterations=6)].max() < 0.02
    muscle = draw_breast(breast, [], "L", "MLO", 96).absorption[4:10, 2:8].mean()
    assert muscle > draw_breast(breast, [], "L", "CC", 96).absorption[40:60, 2:8].mean() * 0.8


@pytest.mark.parametrize("organ", ["chest", "breast"])
def test_boxes_enclose_their_lesions_tightly_and_lesions_can_be_seen(organ):
    for seed in range(12):
        rng = np.random.default_rng(seed)
        if organ == "chest":
            anatomy, found = Chest.sample(rng), sample_opacities(rng, "consolidation")
            drawing, healthy = (draw_chest(anatomy, lesions, 96) for lesions in (found, []))
        else:
            anatomy, found = Breast.sample(rng), sample_breast_lesions(rng, malignant=bool(seed % 2))
            drawing, healthy = (draw_breast(anatomy, lesions, "R", "MLO", 96) for lesions in (found, []))
        assert len(drawing.lesions) == len(found)
        added = drawing.absorption - healthy.absorption
        for _, mask in drawing.lesions:
            x0, y0, x1, y1 = generation.enclosing_box(mask)
            inside = mask[y0:y1, x0:x1]
            assert inside.sum() == mask.sum()
            assert inside[0].any()
            assert inside[-1].any()
            assert inside[:, 0].any()
            assert inside[:, -1].any()
            assert not (mask & ~drawing.organ).any()
            assert added[mask].mean() > 0.03
        np.testing.assert_array_equal(drawing.organ, healthy.organ)
        assert added[~ndimage.binary_dilation(drawing.diseased, iterations=14)].max(initial=0) < 0.05


def test_boxes_and_masks_in_the_tree_agree(reference):
    for row in pd.read_csv(reference / "labels.csv", keep_default_na=False).itertuples():
        file = row.mask_infection if row.organ == "chest" else row.mask_lesion
        mask = np.asarray(Image.open(reference / file)) > 0
        covered = np.zeros_like(mask)
        for x0, y0, x1, y1 in json.loads(row.boxes):
            assert mask[y0:y1, x0:x1].any()
            covered[y0:y1, x0:x1] = True
        assert not (mask & ~covered).any()
        assert len(json.loads(row.boxes)) == len(json.loads(row.box_labels))
        assert (row.label in ("clear", "normal")) == (not mask.any())


def test_size_scales_the_truth(tmp_path):
    small, large = (tree(tmp_path / str(n), size=n, s=CHEST) for n in (96, 192))
    tables = [pd.read_csv(folder / "labels.csv") for folder in (small, large)]
    for a, b in zip(tables[0].boxes, tables[1].boxes, strict=True):
        np.testing.assert_allclose(2 * np.array(json.loads(a)), json.loads(b), atol=3)
    assert tables[0].label.tolist() == tables[1].label.tolist()


@pytest.mark.parametrize("prevalence", [0.0, 0.2, 0.7, 1.0])
def test_chest_prevalence_lies_within_binomial_bounds(prevalence):
    patients = 50
    films = list(_chests("s", PhantomSite(patients=patients, prevalence=prevalence), 32, 0))
    sick = {film.patient for film in films if film.label != "clear"}
    low, high = (
        stats.binom.interval(0.999, patients, prevalence) if 0 < prevalence < 1 else (patients * prevalence,) * 2
    )
    assert low <= len(sick) <= high


def test_breast_prevalence_counts_breasts_and_rises_by_adding():
    site, counts = PhantomSite("breast", patients=25), []
    for prevalence in (0.2, 0.6):
        films = list(_breasts("s", replace(site, prevalence=prevalence), 32, 0))
        sick = {(film.patient, film.laterality) for film in films if film.label != "normal"}
        low, high = stats.binom.interval(0.999, 50, prevalence)
        assert low <= len(sick) <= high
        counts.append(sick)
        views = [film.label for film in films]
        assert views[::2] == views[1::2]  # both views of a breast tell the same
    assert counts[0] < counts[1]


def test_unlabelled_tasks_are_unknown_and_have_no_files(tmp_path):
    sites = {
        "a": replace(CHEST, patients=16, labelled={"finding": 0.5, "lungs": 0.25}),
        "b": replace(CHEST, patients=4, labelled={"lesions": 1.0}, prevalence=0.0),
    }
    folder = tree(tmp_path / "part", size=32, **sites)
    records = read_catalogue(folder, tasks_of(sites)).records
    a, b = ([r for r in records if r.site == site] for site in "ab")
    shares = {t: sum(t in r.truth for r in a) for t in ("finding", "lesions", "lungs", "infection")}
    assert shares == {"finding": round(len(a) / 2), "lesions": 0, "lungs": round(len(a) / 4), "infection": 0}
    assert all(r.truth == {"lesions": BoxTruth()} for r in b)  # known to be healthy, which is not unknown
    assert len(list(folder.rglob("*.png"))) == shares["lungs"]
    table = pd.read_csv(folder / "labels.csv", keep_default_na=False)
    assert (table[table.has_cls == 0].label == "").all()
    assert (table[table.has_det == 0].boxes == "[]").all()


def test_a_larger_share_of_labels_contains_the_smaller_one(tmp_path):
    known = []
    for share in (0.25, 0.75):
        sites = {"s": replace(CHEST, patients=12, labelled={"lungs": share})}
        records = read_catalogue(tree(tmp_path / str(share), size=32, **sites), tasks_of(sites)).records
        known.append({r.id for r in records if "lungs" in r.truth})
    assert known[0] < known[1]


def test_tasks_of_the_other_organ_are_unknown(reference):
    sites = {"chest": CHEST, "breast": BREAST}
    catalogue = read_catalogue(reference, tasks_of(sites))
    assert catalogue.tasks["lesions"].classes == ("ground_glass", "consolidation", "mass", "calcification")
    for record in catalogue.records:
        own = {"finding", "lungs", "infection"} if record.site == "chest" else {"pathology", "breast", "lesion"}
        assert set(record.truth) == own | {"lesions"}
        labels = record.truth["lesions"].labels
        assert all((label < 2) == (record.site == "chest") for label in labels)


def test_the_tree_is_a_labels_csv_data_set_with_the_same_truth(tmp_path):
    sites = {
        "chest": replace(CHEST, patients=8, prevalence=0.5, labelled={"finding": 0.5, "lungs": 0.5, "lesions": 0.5}),
        "breast": replace(BREAST, labelled={"pathology": 0.5, "lesion": 0.5, "lesions": 0.5}),
    }
    folder, tasks = tree(tmp_path / "set", **sites), tasks_of(sites)
    by_kind = {kind: [t for t in tasks.values() if t.kind == kind] for kind in ("classification", "segmentation")}
    table = LabelsCSVDataModule(
        folder,
        classification={t.name: ClassColumns(t.name, classes=list(t.classes)) for t in by_kind["classification"]},
        detection={"lesions": BoxColumns(classes=list(tasks["lesions"].classes), flag="has_det")},
        segmentation={
            t.name: MaskColumns({t.classes[0]: f"mask_{t.name}"}, flag=f"has_{t.name}") for t in by_kind["segmentation"]
        },
        num_workers=0,
        cache_dir=None,
    )
    theirs, ours = table.catalogue(), read_catalogue(folder, tasks)
    assert not table.quarantine.issues
    assert theirs.tasks == ours.tasks
    assert len(theirs.records) == len(ours.records)
    for a, b in zip(theirs.records, ours.records, strict=True):
        assert a.file.samefile(b.file)
        assert (a.patient, a.site, a.view, a.laterality, a.split) == (b.patient, b.site, b.view, b.laterality, b.split)
        assert a.truth.keys() == b.truth.keys()
        for task in a.truth:
            if task == "lesions" or tasks[task].kind == "classification":
                assert a.truth[task] == b.truth[task]
            else:
                (mine,), (other,) = a.truth[task].channels, b.truth[task].channels
                assert mine.file.samefile(other.file)


def test_a_failed_generation_leaves_no_files(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(generation, "write_dicom", full)
        with pytest.raises(OSError, match="disk full"):
            tree(tmp_path / "set", s=CHEST)
    assert list(tmp_path.iterdir()) == []
    assert (tree(tmp_path / "set", s=CHEST) / "labels.csv").exists()


def test_two_processes_that_generate_at_once_keep_one_result(tmp_path, monkeypatch):
    folder = tmp_path / "set"
    write = generation.write_dicom

    def slow(path, *args, **kwargs):
        write(path, *args, **kwargs)
        if not folder.exists():
            folder.mkdir()
            (folder / "labels.csv").write_text("the winner's")

    monkeypatch.setattr(generation, "write_dicom", slow)
    tree(folder, s=CHEST)
    assert (folder / "labels.csv").read_text() == "the winner's"
    assert list(tmp_path.iterdir()) == [folder]


def test_every_setting_has_a_folder_of_its_own_and_is_generated_once(tmp_path):
    first = PhantomDataModule(tmp_path, {"s": CHEST}, SIZE)
    first.prepare_data()
    stamp = {f: f.stat().st_mtime_ns for f in first.folder.rglob("*.dcm")}
    second = PhantomDataModule(tmp_path, {"s": replace(CHEST, gamma=1.2)}, SIZE)
    second.prepare_data()
    PhantomDataModule(tmp_path, {"s": CHEST}, SIZE).prepare_data()
    assert first.folder != second.folder
    assert {f: f.stat().st_mtime_ns for f in first.folder.rglob("*.dcm")} == stamp
    keys = {
        settings_key(sites, size, seed)
        for sites, size, seed in (
            ({"s": CHEST}, 64, 0),
            ({"t": CHEST}, 64, 0),
            ({"s": CHEST}, 65, 0),
            ({"s": CHEST}, 64, 1),
            ({"s": replace(CHEST, labelled={"lungs": 1.0})}, 64, 0),
        )
    }
    assert len(keys) == 5


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ({}, "data.sites is empty"),
        ({"../x": CHEST}, "cannot be a folder name"),
        ({"a": replace(CHEST, prevalence=1.5)}, r"data\.sites\.a\.prevalence is 1\.5.*\[0, 1\]"),
        ({"a": replace(CHEST, patients=0)}, r"patients is 0"),
        ({"a": replace(CHEST, bits=10)}, r"bits is 10; choose from 8, 12, 16"),
        ({"a": replace(CHEST, transfer_syntax="jpeg")}, r"transfer_syntax is 'jpeg'"),
        ({"a": replace(CHEST, labelled={"pathology": 1.0})}, r"names 'pathology'; a chest site has finding, lesions"),
        ({"a": replace(CHEST, labelled={"lungs": 2.0})}, r"labelled\.lungs is 2\.0"),
    ],
)
def test_a_setting_out_of_range_is_named_in_the_error(tmp_path, sites, message):
    with pytest.raises(ConfigError, match=message):
        PhantomDataModule(tmp_path, sites)


def test_batches_have_the_labels_of_their_sites_only(tmp_path):
    sites = {
        "full": replace(CHEST, patients=8, prevalence=0.5),
        "boxes": replace(CHEST, patients=8, prevalence=0.5, labelled={"lesions": 1.0}, monochrome1=True),
    }
    data = PhantomDataModule(
        tmp_path, sites, SIZE, image_size=64, batch_size=4, num_workers=0, cache_dir=None, preset=PlainPreset()
    )
    data.prepare_data()
    data.setup("fit")
    records = {r.id: r for r in data.records}
    folder = data.folder
    seen = set()
    for batch in [*data.train_dataloader(), *data.val_dataloader()]:
        assert batch.image.shape[2:] == (64, 64)
        for i, meta in enumerate(batch.meta):
            record = records[meta.id]
            seen.add(meta.id)
            for task, target in batch.targets.items():
                assert bool(target.present[i]) == (task in record.truth)
            np.testing.assert_allclose(batch.image[i, 0], read_image(record.file).pixels, atol=2 / 255)
            if meta.site == "full":
                mask = Image.open(folder / "masks" / "full" / f"{record.file.stem}_lungs.png")
                np.testing.assert_array_equal(batch.targets["lungs"].masks[i, 0], np.asarray(mask) > 0)
            expected = record.truth["lesions"]
            torch.testing.assert_close(
                batch.targets["lesions"].boxes[i], torch.tensor(expected.boxes).reshape(-1, 4), atol=1e-3, rtol=0
            )
            assert batch.targets["lesions"].labels[i].tolist() == list(expected.labels)
    assert seen == {i for i, split in data.splits.items() if split != "test"}


def test_ready_made_sets_split_by_patient_and_label_every_task_somewhere():
    for name, sites in SITE_SETS.items():
        PhantomDataModule(sites=name)  # every dial is in range
        for task in tasks_of(sites):
            owners = [s for s in sites.values() if task in tasks_of({"s": s})]
            assert any(s.labelled is None or s.labelled.get(task) for s in owners)


def test_splits_never_share_a_patient_and_all_exist(tmp_path):
    table = pd.read_csv(tree(tmp_path / "set", size=32, s=replace(CHEST, patients=20)) / "labels.csv")
    assert table.groupby("patient").split.nunique().max() == 1
    assert table.drop_duplicates("patient").split.value_counts().to_dict() == {"train": 14, "val": 3, "test": 3}


def test_expose_follows_its_formula():
    absorption = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    shown = expose(absorption, 2.0, 0.5, 0.0, 0.0, False, np.random.default_rng(0))
    np.testing.assert_allclose(shown, 0.5 + 0.5 * (absorption**2 - 0.5), atol=1e-6)
    spreads = [
        (expose(np.full((64, 64), level, np.float32), 1, 1, 0.02, 0, False, np.random.default_rng(1)) - level).std()
        for level in (0.3, 0.5, 0.8)
    ]
    assert all(a < b for a, b in pairwise(spreads))
    assert spreads[1] == pytest.approx(0.02, rel=0.05)
