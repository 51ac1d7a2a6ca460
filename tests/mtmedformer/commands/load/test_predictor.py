"""``mtmedformer.load``: predictions in pixels of the image, and files that are refused."""

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mtmedformer
from mtmedformer.calibration import TaskCalibration, plain, tempered
from mtmedformer.commands.export.command import export
from mtmedformer.errors import ConfigError, DataError
from tests.fixtures.dicom_files import film, write_dicom
from tests.fixtures.stored_models import description, write_checkpoint

CALIBRATION = {
    "health": TaskCalibration(10, 2.5, thresholds={"sick": {"youden": 0.3}}),
    "organ": TaskCalibration(10, 0.5),
    "nodules": TaskCalibration(10),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def model(checkpoint):
    return mtmedformer.load(checkpoint)


@pytest.fixture(scope="module")
def picture():
    """A 12-bit image, wider than high."""
    rng = np.random.default_rng(0)
    return (rng.random((70, 130)) * 3000 + np.linspace(0, 1000, 130)).astype(np.uint16)


def same(a, b, tolerance=0.0):
    """Compare two predictions."""
    assert a.classes.keys() == b.classes.keys()
    for task, classes in a.classes.items():
        assert classes == pytest.approx(b.classes[task], abs=tolerance or 1e-12)
    for task, boxes in a.boxes.items():
        assert [box.name for box in boxes] == [box.name for box in b.boxes[task]]
        for one, other in zip(boxes, b.boxes[task], strict=True):
            assert one.xyxy == pytest.approx(other.xyxy, abs=1e3 * tolerance or 1e-9)
    for task, masks in a.masks.items():
        assert all((mask == b.masks[task][name]).mean() >= 1 - tolerance for name, mask in masks.items())


def test_predictions_are_typed_and_in_pixels_of_the_image(model, picture):
    found = model.predict(picture, score=0.0)
    assert found.size == picture.shape
    assert set(found.classes["health"]) == {"well", "sick"}
    assert sum(found.classes["health"].values()) == pytest.approx(1, abs=1e-6)
    assert found.masks["organ"]["organ"].shape == picture.shape
    assert found.masks["organ"]["organ"].dtype == bool
    assert found.boxes["nodules"]
    for box in found.boxes["nodules"]:
        x0, y0, x1, y1 = box.xyxy
        assert box.name in {"round", "spiky"}
        assert 0 <= x0 < x1 <= 130
        assert 0 <= y0 < y1 <= 70
    assert found.note == "research use only"
    assert found.calibrated == ()
    assert model.tasks["nodules"].classes == ("round", "spiky")


def test_an_array_and_its_file_have_the_same_prediction(model, picture, tmp_path):
    Image.fromarray(picture).save(tmp_path / "twelve.png")
    same(model.predict(picture), model.predict(tmp_path / "twelve.png"))
    eight = (picture // 16).astype(np.uint8)
    Image.fromarray(eight).save(tmp_path / "eight.png")
    same(model.predict(eight), model.predict(str(tmp_path / "eight.png")))
    same(model.predict(picture), model.predict(picture / np.float64(4095)))


def test_a_dicom_file_is_read_with_its_spacing(model, tmp_path):
    write_dicom(tmp_path / "a.dcm", film(80, 64))
    found = model.predict(tmp_path / "a.dcm")
    assert found.size == (80, 64)
    assert found.masks["organ"]["organ"].shape == (80, 64)


def test_the_predictor_and_the_module_agree(model, picture):
    """By hand: letterbox into 64 x 96, predict, and nothing else."""
    from mtmedformer.geometry import letterbox, warp

    frame = letterbox((0.0, 0.0, 130.0, 70.0), (64, 96))
    pixels = np.rint(warp(picture.astype(np.float32) / np.float32(4095), frame) * 65535) / 65535
    with torch.inference_mode():
        expected = model.module.predict(torch.from_numpy(pixels.astype(np.float32))[None, None])
    found = model.predict(picture)
    assert list(found.classes["health"].values()) == pytest.approx(expected["health"][0].tolist(), abs=1e-6)
    scale = frame.to_original[0]
    best = expected["nodules"][0]["boxes"][0].numpy() * scale + [frame.to_original[2], frame.to_original[5]] * 2
    assert found.boxes["nodules"][0].xyxy == pytest.approx(best.clip(0, [130, 70, 130, 70]), abs=1e-3)


def test_a_calibration_is_applied_and_reported(checkpoint, model, picture, tmp_path):
    own = mtmedformer.load(write_checkpoint(tmp_path, calibration=plain(CALIBRATION)))
    found, raw = own.predict(picture), model.predict(picture)
    expected = tempered(np.array([list(raw.classes["health"].values())]), 2.5, exclusive=True)[0]
    assert list(found.classes["health"].values()) == pytest.approx(expected, abs=1e-6)
    assert expected[0] != pytest.approx(raw.classes["health"]["well"], abs=1e-3)
    assert set(found.calibrated) == {"health", "organ"}
    assert own.calibration["health"].thresholds == {"sick": {"youden": 0.3}}


def test_an_export_and_its_checkpoint_agree(picture, tmp_path):
    file = write_checkpoint(tmp_path / "run", calibration=plain(CALIBRATION))
    export(file, tmp_path / "out", "safetensors")
    one, other = mtmedformer.load(file), mtmedformer.load(tmp_path / "out")
    same(one.predict(picture), other.predict(picture))
    assert one.calibration == other.calibration
    assert other.image_size == (64, 96)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "owned",))

    for name, content in (("weights", {"state_dict": Evil()}), ("beside", {"state_dict": {}, "more": Evil()})):
        file = tmp_path / f"{name}.ckpt"
        torch.save(content, file, pickle_module=pickle)
        with pytest.raises(ConfigError, match=f"{name}.ckpt: refused"):
            mtmedformer.load(file)
    (tmp_path / "out").mkdir()
    export(write_checkpoint(tmp_path / "run"), tmp_path / "out", "safetensors")
    (tmp_path / "out/model.safetensors").write_bytes((tmp_path / "weights.ckpt").read_bytes())
    with pytest.raises(ConfigError, match=r"model\.safetensors: missing or damaged"):
        mtmedformer.load(tmp_path / "out")
    assert not (tmp_path / "owned").exists()


def planted(folder, monkeypatch):
    """Put a module on the path that writes a file when it is imported, with a working head."""
    (folder / "planted_head.py").write_text(
        f"import pathlib\npathlib.Path({str(folder / 'imported')!r}).touch()\n"
        "from mtmedformer.heads import SegmentationHead\n\n\nclass Head(SegmentationHead):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "planted_head", raising=False)
    return folder / "imported"


def test_a_class_of_another_project_is_not_imported(tmp_path, monkeypatch, picture):
    imported = planted(tmp_path, monkeypatch)
    model = description()
    model["init_args"]["heads"]["organ"]["class_path"] = "planted_head.Head"
    file = write_checkpoint(tmp_path / "run", model)
    assert imported.exists(), "the trusted class was imported"
    imported.unlink()
    sys.modules.pop("planted_head")
    with pytest.raises(ConfigError, match=r"planted_head\.Head.*trusted=True"):
        mtmedformer.load(file)
    assert not imported.exists()
    found = mtmedformer.load(file, trusted=True).predict(picture)
    assert imported.exists()
    assert found.masks["organ"]["organ"].shape == picture.shape


@pytest.mark.parametrize(
    "path",
    [
        "mtmedformer.commands.lightning_cli.CommandLine",
        "mtmedformer.__main__.main",
        "mtmedformer.commands.main.main",
        "mtmedformer.load",
        "mtmedformer.module.AdamW",
        "mtmedformer.errors.ConfigError",
        "mtmedformer.heads.detection.nn",
        "mtmedformer.heads.nothing.Here",
        "torch.nn.Linear",
        "os.system",
        "mtmedformer_evil.heads.Head",
        "datamodules.PhantomDataModule",
        "",
        "Head",
        7,
    ],
)
def test_parts_of_the_project_that_are_no_model_are_refused(path, tmp_path):
    file = write_checkpoint(tmp_path)
    stored = torch.load(file, weights_only=True)
    stored["hyper_parameters"]["heads"]["organ"] = {"class_path": path, "init_args": {}}
    torch.save(stored, file)
    with pytest.raises(ConfigError, match=r"best\.ckpt"):
        mtmedformer.load(file)


def test_a_string_is_not_used_as_a_class(tmp_path):
    file = write_checkpoint(tmp_path)
    stored = torch.load(file, weights_only=True)
    stored["hyper_parameters"]["heads"]["organ"] = "planted_head.Head"
    torch.save(stored, file)
    with pytest.raises(ConfigError, match="cannot be built"):
        mtmedformer.load(file)


def test_parts_of_training_are_not_used(tmp_path, picture):
    """The loss may be of a class that is not here, and files and downloads to start from are not touched."""
    file = write_checkpoint(tmp_path)
    expected = mtmedformer.load(file).predict(picture)
    stored = torch.load(file, weights_only=True)
    stored["hyper_parameters"] |= {
        "loss": {"class_path": "my_lab.Loss"},
        "init_weights": "/nowhere.ckpt",
        "compile": "inductor",
    }
    stored["hyper_parameters"]["encoder"]["init_args"] |= {
        "pretrained": True,
        "checkpoint_path": "/nowhere.pth",
        "model_kwargs": {"checkpoint_path": "/nowhere.pth"},
    }
    torch.save(stored, file)
    same(mtmedformer.load(file).predict(picture), expected)


def test_dropped_heads_stay_dropped(tmp_path, picture):
    model = description()
    model["init_args"]["tasks"] = ["organ"]
    found = mtmedformer.load(write_checkpoint(tmp_path, model)).predict(picture)
    assert (found.classes, found.boxes, set(found.masks)) == ({}, {}, {"organ"})


def test_the_preparation_of_images_can_be_given(tmp_path, picture):
    from datamodules import PlainPreset

    file = write_checkpoint(tmp_path)
    expected = mtmedformer.load(file).predict(picture)
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(ConfigError, match="image_size="):
        mtmedformer.load(file).predict(picture)
    same(mtmedformer.load(file, image_size=(64, 96), preset=PlainPreset()).predict(picture), expected)
    with pytest.raises(ConfigError, match="at least 16"):
        mtmedformer.load(file, image_size=8)


def test_a_preset_comes_from_the_run_and_from_this_project(tmp_path, picture):
    from datamodules import BreastPreset

    file = write_checkpoint(tmp_path)
    config = tmp_path / "config.yaml"
    section = "data: {class_path: X, init_args: {image_size: 64, preset: {class_path: %s, init_args: {margin: 0.1}}}}"
    config.write_text(section % "datamodules.BreastPreset")
    model = mtmedformer.load(file)
    assert isinstance(model.preset, BreastPreset)
    assert model.preset.margin == 0.1
    assert model.image_size == (64, 64)
    for path in ("planted.Preset", "datamodules.images.presets.dataclass", "datamodules.PhantomSite"):
        config.write_text(section % path)
        with pytest.raises(ConfigError, match="refused"):
            mtmedformer.load(file)


@pytest.mark.parametrize(
    "image, words",
    [
        (np.zeros((64, 64, 3), np.uint8), "shape"),
        (np.zeros((64, 64), np.uint8), "everywhere"),
        (np.arange(64.0).reshape(8, 8), r"float64 from 0.0 to 63.0"),
        (np.full((8, 8), np.nan), "nan"),
        (np.arange(64).reshape(8, 8), "int64"),
    ],
)
def test_arrays_of_no_known_range_are_refused(model, image, words):
    with pytest.raises(DataError, match=words):
        model.predict(image)


def test_files_that_cannot_be_used_are_named(model, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    with pytest.raises(DataError, match=r"broken\.png"):
        model.predict(tmp_path / "broken.png")
    with pytest.raises(ConfigError, match="no such file"):
        mtmedformer.load(tmp_path / "none.ckpt")
    with pytest.raises(ConfigError, match=r"model\.json is missing"):
        mtmedformer.load(tmp_path)


def test_damaged_models_are_refused(tmp_path):
    file = write_checkpoint(tmp_path)
    stored = torch.load(file, weights_only=True)
    name = "heads.organ.logits.bias"
    changes = {
        "NaN": {"state_dict": stored["state_dict"] | {name: torch.full((1,), float("nan"))}},
        "another model": {"state_dict": {k: v for k, v in stored["state_dict"].items() if k != name}},
        "in Python": {"hyper_parameters": {}},
        "calibration": {"calibration": {"organ": {"colour": 1}}},
    }
    for words, change in changes.items():
        torch.save(stored | change, file)
        with pytest.raises(ConfigError, match=words):
            mtmedformer.load(file)
