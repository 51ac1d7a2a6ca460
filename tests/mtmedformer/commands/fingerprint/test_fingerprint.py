from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from lightning import LightningDataModule
from PIL import Image
from rich.console import Console
from scipy import ndimage
from sklearn.metrics import roc_auc_score

from datamodules.audit.image_statistics import ImageStatistics, Structure
from datamodules.audit.shortcuts import find_shortcuts
from datamodules.records import ClassTruth, Record
from federation import FederatedDataModule
from mtmedformer.batch import Task
from mtmedformer.commands.fingerprint.command import fingerprint, main
from mtmedformer.commands.fingerprint.suggestions import suggest
from mtmedformer.commands.main import main as command_line
from mtmedformer.errors import ConfigError, DataError
from tests.fixtures.real_data import real

SIZE = (96, 80)


def film(seed):
    rng = np.random.default_rng(seed)
    image = ndimage.gaussian_filter(rng.normal(size=SIZE), 8) * 8 + ndimage.gaussian_filter(rng.normal(size=SIZE), 1.2)
    return np.round(255 * (image - image.min()) / np.ptp(image)).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    """60 films of 30 patients at two sites: site b has no boxes, AP films are mostly ill, one film is there twice."""
    rng, rows = np.random.default_rng(0), []
    for i in range(60):
        patient, site = i // 2, "a" if i % 4 < 2 else "b"
        ill = patient % 5 < 2
        view = "AP" if rng.random() < (0.9 if ill else 0.1) else "PA"
        pixels = film(i)
        if i == 59:
            pixels = np.round(film(0) * 0.8 + 20).astype(np.uint8)  # the first film again, under another patient
        Image.fromarray(pixels).save(tmp_path / f"film{i}.png")
        mask = np.zeros(SIZE, np.uint8)
        mask[20:60, 10:60] = 255
        Image.fromarray(mask).save(tmp_path / f"mask{i}.png")
        split = ("train", "train", "train", "val", "test")[(patient // 5) % 5]
        if i in (0, 1):
            split = "train"
        if i in (58, 59):
            split = "test"
        boxes = [[10, 12, 30, 28]] if ill else []
        rows.append(
            {
                "image": f"film{i}.png",
                "site": site,
                "patient": f"SECRET{patient}",
                "split": split,
                "view": view,
                "label": "ill" if ill else "normal",
                "boxes": json.dumps(boxes),
                "has_det": int(site == "a"),
                "mask_lung": f"mask{i}.png",
            }
        )
    pd.DataFrame(rows).to_csv(tmp_path / "labels.csv", index=False)
    config = {
        "seed_everything": 3,
        "model": {"class_path": "no.such.Model"},
        "trainer": {"max_epochs": 5, "nonsense": True},
        "optimizer": {"class_path": "torch.optim.SGD"},
        "data": {
            "class_path": "LabelsCSVDataModule",
            "init_args": {
                "root": str(tmp_path),
                "image_size": 64,
                "num_workers": 0,
                "cache_dir": None,
                "classification": {"finding": {"column": "label", "classes": ["normal", "ill"]}},
                "detection": {"lesions": {"labels": None, "classes": ["lesion"], "flag": "has_det"}},
                "segmentation": {"lungs": {"columns": {"lung": "mask_lung"}}},
            },
        },
    }
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def test_command_describes_a_folder(folder, capsys):
    out = folder / "out" / "deep"
    assert main(["--config", str(folder / "fit.yaml"), "--output", str(out)]) == 0
    found = json.loads((out / "fingerprint.json").read_text())
    text = capsys.readouterr().out

    assert found["images"] == 60
    assert found["patients"] == 30
    assert sum(s["images"] for s in found["splits"].values()) == 60
    train_b = found["labelled"]["b"]["train"]
    assert "lesions" not in train_b  # unknown there, not negative
    assert train_b["lungs"]["labelled"] == train_b["lungs"]["positive"] == train_b["finding"]["labelled"]
    table = pd.read_csv(folder / "labels.csv")
    here = table[(table.site == "a") & (table.split == "train")]
    assert found["labelled"]["a"]["train"]["lesions"] == {
        "labelled": len(here),
        "positive": int((here.label == "ill").sum()),
    }
    assert found["classes"]["finding"]["ill"]["test"] == int(((table.split == "test") & (table.label == "ill")).sum())

    assert found["original_size"]["height"]["50"] == 96
    assert found["original_size"]["most_common"] == [[96, 80, 60]]
    assert found["spacing_mm"] is None
    lesion = found["structures"]["lesions"]["lesion"]
    assert lesion["original_px"]["50"] == pytest.approx(np.sqrt(20 * 16), rel=1e-3)
    assert lesion["input_px"]["50"] == pytest.approx(np.sqrt(20 * 16) * 64 / 96, rel=1e-3)
    lung = found["structures"]["lungs"]["lung"]
    assert lung["original_px"]["50"] == pytest.approx(np.sqrt(40 * 50), rel=0.03)
    every = np.concatenate([np.asarray(Image.open(folder / f"film{i}.png")).ravel() for i in range(60)]) / 255
    mean = np.average(
        [found["intensity"][s]["quantiles"]["50"] for s in "ab"], weights=[(table.site == s).sum() for s in "ab"]
    )
    assert mean == pytest.approx(np.median(every), abs=0.03)

    pairs = found["leaks"]["across_splits"]
    assert [(p["first"], p["second"]) for p in pairs] == [("film0", "film59")]
    assert any("cross splits" in w and "film59" in w for w in found["warnings"])
    view = [s for s in found["shortcuts"] if s["source"] == "view" and s["task"] == "finding"]
    assert view
    assert all(s["warning"] and s["auc"] > 0.75 for s in view)
    assert any("view alone predicts" in w for w in found["warnings"])
    assert found["suggestion"]["strides"][0] == 4

    sentence, of_view = sorted(found["implausible"], key=lambda one: "view" in one)
    assert "images of view 'PA' shows 'ill'" in of_view
    assert "lesions: all" in sentence
    assert "have the same ones" in sentence

    for words in ("Labelled images", "Suggested", "cross splits", "fingerprint.png", "Implausible: lesions"):
        assert words in " ".join(text.split())
    everything = text + json.dumps(found)
    assert "SECRET" not in everything
    with Image.open(out / "fingerprint.png") as picture:
        assert min(picture.size) > 800
        assert np.asarray(picture.convert("L")).std() > 20


def test_command_line_overrides_the_file(folder):
    arguments = ["--config", str(folder / "fit.yaml"), f"--output={folder / 'o'}", "--data.init_args.tasks=[finding]"]
    assert main([*arguments, "--data.init_args.where={site: b}"]) == 0
    found = json.loads((folder / "o" / "fingerprint.json").read_text())
    assert list(found["tasks"]) == ["finding"]
    assert list(found["labelled"]) == ["b"]
    assert found["structures"] == {}


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "cannot be read as YAML"),
        ("a: [", "cannot be read as YAML"),
        ("just text", "has no keys"),
        ("model: {}", "data"),
        ("data: {class_path: NoSuchDataModule}", "NoSuchDataModule"),
        ("data: {class_path: LabelsCSVDataModule, init_args: {no_such_key: 1}}", "no_such_key"),
    ],
)
def test_a_wrong_file_is_a_sentence(tmp_path, content, words):
    file = tmp_path / "c.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=words):
        main(["--config", str(file), "--output", str(tmp_path)])


def test_no_data_at_all_is_an_error(folder):
    (folder / "labels.csv").unlink()
    with pytest.raises(DataError, match=r"labels\.csv"):
        main(["--config", str(folder / "fit.yaml"), "--output", str(folder / "o")])


def test_an_output_that_is_a_file_is_an_error(folder):
    with pytest.raises(ConfigError, match="choose a folder"):
        main(["--config", str(folder / "fit.yaml"), "--output", str(folder / "labels.csv")])


PHANTOM = {"image_size": 64, "num_workers": 0, "cache_dir": None}
CUT = {
    "by": "site",
    "data": {
        "class_path": "datamodules.PhantomDataModule",
        "init_args": {
            **PHANTOM,
            "tasks": ["finding", "lungs"],
            "sites": {"north": {"patients": 16}, "south": {"patients": 12, "labelled": {"finding": 1.0}}},
        },
    },
}
NAMED = {
    "sites": {
        name: {
            "class_path": "datamodules.PhantomDataModule",
            "init_args": {**PHANTOM, "image_size": size, "tasks": tasks, "sites": {"one": {"patients": patients}}},
        }
        for name, patients, tasks, size in (("north", 16, ["finding", "lungs"], 64), ("south", 12, ["finding"], 96))
    }
}


@pytest.mark.parametrize("federation", [CUT, NAMED], ids=["by", "sites"])
def test_a_federation_is_described_site_by_site_and_as_a_whole(tmp_path, capsys, federation):
    config = {"data": {"class_path": "federation.FederatedDataModule", "init_args": federation}, "federation": {}}
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(config))
    out = tmp_path / "out"
    assert command_line(["fingerprint", f"--config={tmp_path / 'fit.yaml'}", f"--output={out}"]) == 0
    whole = json.loads((out / "fingerprint.json").read_text())
    north, south = (whole["sites"][name] for name in ("north", "south"))
    assert (north["patients"], south["patients"], whole["patients"]) == (16, 12, 28)
    assert whole["images"] == north["images"] + south["images"]
    for split, counts in whole["splits"].items():
        assert counts["images"] == sum(site["splits"].get(split, {"images": 0})["images"] for site in (north, south))
    assert list(whole["labelled"]) == ["north", "south"] == [name for s in (north, south) for name in s["labelled"]]
    assert whole["labelled"]["north"] == north["labelled"]["north"]
    assert "lungs" in north["labelled"]["north"]["train"]
    assert "lungs" not in south["labelled"]["south"]["train"], "unknown there, not negative"
    assert whole["structures"]["lungs"] == north["structures"]["lungs"]
    assert set(whole["intensity"]) == {"north", "south"}
    assert whole["tasks"] == north["tasks"]
    size_warning = "The sites use different input sizes (image_size): north [64, 64], south [96, 96]."
    assert (size_warning in whole["warnings"]) == (federation is NAMED)
    text = capsys.readouterr().out
    for words in ("Sites; counts are images (patients)", "north", "south", "28 patients at 2 site(s)", "Written"):
        assert words in " ".join(text.split())
    with Image.open(out / "fingerprint.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 20


def test_a_site_without_records_and_other_data_modules_cannot_be_described(tmp_path):
    with pytest.raises(ConfigError, match="LightningDataModule cannot be described"):
        fingerprint(LightningDataModule(), tmp_path)
    with pytest.raises(ConfigError, match="site one: LightningDataModule is no"):
        fingerprint(FederatedDataModule(sites={"one": LightningDataModule()}), tmp_path)


# parts


def facts(index, patient=None, view="PA", ill=False, size=(1000, 800), structures=(), split="train"):
    record = Record(
        str(index),
        Path(f"{index}.png"),
        str(index if patient is None else patient),
        {"finding": ClassTruth((float(not ill), float(ill)))},
        view=view,
    )
    histogram, thumbnail = np.full(64, 1 / 64), np.zeros((64, 64), np.uint8)
    return ImageStatistics(record, split, view, None, size, size, None, histogram, tuple(structures), thumbnail)


TASKS = {
    "finding": Task("finding", "classification", ("normal", "ill")),
    "lesions": Task("lesions", "detection", ("mass",)),
}


def test_shortcut_auc_of_one_binary_property_is_that_of_its_indicator():
    rng = np.random.default_rng(0)
    ill = rng.random(600) < 0.3
    bedside = rng.random(600) < np.where(ill, 0.7, 0.3)
    images = [
        facts(i, view="AP" if b else "PA", ill=bool(y)) for i, (b, y) in enumerate(zip(bedside, ill, strict=True))
    ]
    found = {s.source: s for s in find_shortcuts(images, TASKS) if s.finding == "ill"}
    assert found["view"].auc == pytest.approx(roc_auc_score(ill, bedside), abs=0.02)
    assert found["view"].warning
    assert found["view"].positives == ill.sum()
    assert "site" not in found  # one site only: nothing to compare


def test_every_group_column_is_a_possible_shortcut():
    def grouped(i):
        one = facts(i, ill=i % 4 == 0, patient=i)
        groups = {"scanner": "Acme" if i % 4 == 0 else "Other", "sex": "FM"[i // 4 % 2], "client": one.record.site}
        return replace(one, record=replace(one.record, groups=groups))

    found = {s.source: s for s in find_shortcuts([grouped(i) for i in range(200)], TASKS) if s.finding == "ill"}
    assert found["scanner"].auc > 0.95
    assert found["scanner"].warning
    assert not found["sex"].warning
    assert "client" not in found  # the groups of the sites


def test_no_shortcut_where_the_property_is_chance_even_with_a_value_per_patient():
    rng = np.random.default_rng(1)
    images = [facts(i, view=str(i), ill=bool(rng.random() < 0.5), size=(100 + i, 100)) for i in range(300)]
    assert not any(s.warning for s in find_shortcuts(images, TASKS))


def test_a_patients_own_images_do_not_make_a_shortcut():
    rng = np.random.default_rng(2)
    ill = rng.random(60) < 0.5
    images = [facts(f"{p}-{k}", patient=p, view=f"v{p}", ill=bool(ill[p])) for p in range(60) for k in range(5)]
    assert not any(s.warning for s in find_shortcuts(images, TASKS))


@pytest.mark.parametrize(
    "side, size, image_size, stride",
    [
        (400.0, (1000, 1000), (256, 256), 8),  # large: small input, no stride 4
        (30.0, (1000, 1000), (416, 416), 4),  # 12 px wanted of 30: 400, rounded up to 32
        (45.0, (3518, 1700), (960, 480), 4),  # a mammogram keeps its shape
        (10.0, (3518, 2800), (1024, 832), 4),  # limited
        (10.0, (400, 400), (416, 416), 4),  # never much more than there is
        (9.0, (28, 28), (32, 32), 4),
    ],
)
def test_suggested_size_follows_the_smallest_lesions(side, size, image_size, stride):
    box = Structure("lesions", "mass", side, 1.0, None)
    wish = suggest([facts(i, size=size, structures=[box]) for i in range(20)], TASKS, batch_size=8)
    assert wish.image_size == image_size
    assert wish.strides[0] == stride
    span = side / wish.pixels_per_pixel
    assert span >= 12 * 0.99 or any("may be missed" in reason for reason in wish.reasons)


def test_suggested_sampler():
    def wish(positive, count=100, tasks=TASKS):
        return suggest([facts(i, ill=i < positive) for i in range(count)], tasks, batch_size=8).sampler

    assert wish(5) == "positive"
    assert wish(50) == "shuffle"
    assert wish(0) == "shuffle"
    three = {"finding": Task("finding", "classification", ("common", "rare"))}
    assert wish(3, tasks=three) == "sqrt"
    assert wish(97, tasks=three) == "sqrt"
    assert wish(30, tasks=three) == "shuffle"


def test_real_data_fingerprint(tmp_path):
    from datamodules import LabelsCSVDataModule, PlainPreset
    from datamodules.labels_csv.columns import BoxColumns, ClassColumns, MaskColumns

    data = LabelsCSVDataModule(
        root=real("covid_cxr"),
        classification={"finding": ClassColumns(column="label", flag="has_cls")},
        detection={"lesions": BoxColumns(flag="has_det")},
        segmentation={"lungs": MaskColumns(columns={"lung": "mask_lungs"}, flag="has_lungs")},
        image_size=128,
        num_workers=0,
        cache_dir=None,
        preset=PlainPreset(),
        limit=60,
    )
    text = io.StringIO()
    found = fingerprint(data, tmp_path, Console(file=text, width=120))
    assert found.images > 60
    assert set(found.tasks) == {"finding", "lesions", "lungs"}
    assert 0.2 < found.intensity["journals"].quantiles["50"] < 0.8
    assert found.suggestion.image_size[0] >= 256
    assert "lungs" in text.getvalue()
