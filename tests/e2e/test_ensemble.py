"""``--ckpt_path=[a,b,c]`` of ``test``, ``predict`` and ``export`` as a user calls them."""

import copy
import csv
import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import yaml

import mtmedformer
from mtmedformer.calibration import TaskCalibration, plain
from mtmedformer.commands import folds
from mtmedformer.commands.export.onnx_outputs import decode, read_heads
from mtmedformer.commands.main import main
from tests.fixtures.small_set import small_config, write_config
from tests.fixtures.stored_models import OF_FIT, description, write_checkpoint

QUIET = "--trainer.enable_progress_bar=false"
CALIBRATION = plain({"health": TaskCalibration(10, 2.0, thresholds={"sick": {"youden": 0.4}})})


def model(**changes):
    described = copy.deepcopy(description("health", "nodules", "organ"))
    described["init_args"]["heads"]["nodules"]["init_args"]["classes"] = ["nodule"]
    for head, arguments in changes.items():
        described["init_args"]["heads"][head]["init_args"] |= arguments
    return described


def write_run(folder: Path, images: Path, weights: int, described=None, **data) -> Path:
    """Write the run of an untrained model on the small set."""
    config = small_config(images, folder.parent)["data"]
    config["init_args"] |= {"seed": 0} | data
    more = {"calibration": CALIBRATION} if weights < 2 else {}
    file = write_checkpoint(folder, described or model(), weights, **OF_FIT, **more)
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": config}))
    return file


@pytest.fixture(scope="module")
def runs(images, tmp_path_factory) -> Path:
    """Three folds of one training, the first two calibrated."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in range(3):
        write_run(folder / f"fold{seed}", images, seed, fold=seed, folds=3)
    return folder


def several(runs: Path) -> str:
    return f"[{','.join(str(runs / f'fold{n}/checkpoints/best.ckpt') for n in range(3))}]"


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_predict_writes_the_mean_and_the_disagreement(runs, images, tmp_path):
    films = [str(images / f"images/im00{n}.png") for n in range(2)]
    output = tmp_path / "out"
    arguments = ["--images", *films, f"--output={output}", "--overlays=false", QUIET, "--data.num_workers=0"]
    assert main(["predict", f"--ckpt_path={several(runs)}", *arguments]) == 0
    alone = [mtmedformer.load(runs / f"fold{n}/checkpoints/best.ckpt") for n in range(3)]
    together = mtmedformer.load([runs / f"fold{n}/checkpoints/best.ckpt" for n in range(3)])
    rows = rows_of(output / "predictions.csv")
    assert len({row["model"] for row in rows}) == 1
    assert rows[0]["model"] == together.module.digest() not in {one.module.digest() for one in alone}
    for row, film in zip(rows, films, strict=True):
        sick = [one.predict(film).classes["health"]["sick"] for one in alone]
        assert len({round(value, 3) for value in sick}) == 3, "models that differ"
        assert float(row["health:sick"]) == pytest.approx(np.mean(sick), abs=1e-4)
        assert together.predict(film).classes["health"]["sick"] == pytest.approx(np.mean(sick), abs=1e-6)
        assert float(row["health:disagreement"]) > 0
        assert {"nodules:disagreement", "organ:disagreement"} <= row.keys()
        assert "health:sick:found" not in row, "the third member has no threshold"
    settings = json.loads((output / "about_predictions.json").read_text())["settings"]
    assert settings["members"] == [one.module.digest() for one in alone[1:]]


def test_test_measures_the_ensemble_in_a_folder_of_its_own(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    assert main(["test", "--ckpt_path=[fold*/checkpoints/best.ckpt]", QUIET]) == 0
    (folder,) = runs.glob("ensemble-*")
    metrics = json.loads((folder / "test_metrics.json").read_text())
    assert metrics["test/health/n_images"] > 0
    assert "ensemble of 3" in (folder / "model_card.md").read_text()
    assert len(yaml.safe_load((folder / "config_test.yaml").read_text())["ckpt_path"]) == 3
    assert not list(runs.glob("fold*/test_metrics.json"))


def test_an_exported_ensemble_is_the_ensemble(runs, images, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", f"--ckpt_path={several(runs)}", f"--output={out}"]) == 0
    assert "model-3.safetensors" in capsys.readouterr().out
    film = images / "images/im003.png"
    together = mtmedformer.load([runs / f"fold{n}/checkpoints/best.ckpt" for n in range(3)])
    expected, found = (one.predict(film) for one in (together, mtmedformer.load(out)))
    assert found.classes == expected.classes
    assert found.uncertainty == expected.uncertainty
    image = torch.rand(2, 1, 96, 64, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    outputs = dict(zip(names, session.run(names, {"image": image.numpy()}), strict=True))
    decoded = decode(outputs, read_heads(out), (96, 64))
    with torch.inference_mode():
        predicted = together.module.predict_whole(image)
    for name in ("health", "organ"):
        assert torch.allclose(decoded[name], predicted[name], atol=1e-4)
    for ours, theirs in zip(predicted["nodules"], decoded["nodules"], strict=True):
        assert len(ours["boxes"]) == len(theirs["boxes"]) > 0
        assert torch.allclose(ours["scores"], theirs["scores"], atol=1e-4)
    (out / "model-2.safetensors").write_bytes((out / "model-3.safetensors").read_bytes())
    with pytest.raises(mtmedformer.errors.ConfigError, match=r"model-2\.safetensors.*exchanged"):
        mtmedformer.load(out)


def test_members_that_do_not_belong_together_are_refused_in_one_sentence(runs, images, tmp_path, capsys):
    first = runs / "fold0/checkpoints/best.ckpt"
    cases = {
        "classes of task 'health' is ['well', 'sick']": write_run(
            tmp_path / "a", images, 4, model(health={"classes": ["sick", "well"]})
        ),
        "image_size is [64, 64]": write_run(tmp_path / "b", images, 4, image_size=[64, 96]),
        "has a task 'nodules'": write_run(tmp_path / "c", images, 4, description("health", "organ")),
        "data.seed=0": write_run(tmp_path / "d", images, 4, seed=7),
    }
    for words, other in cases.items():
        assert main(["test", f"--ckpt_path=[{first},{other}]", QUIET]) == 2
        assert words in " ".join(capsys.readouterr().err.split())
    for command, text, words in (
        ("fit", f"[{first},{first}]", "takes one checkpoint here"),
        ("test", f"[{first},{first}]", "named twice"),
        ("test", f"[{first}]", "at least two"),
        ("predict", f"[{first},{runs}/none.ckpt]", "no such file"),
    ):
        assert main([command, f"--ckpt_path={text}", QUIET]) == 2
        assert words in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.glob("**/ensemble-*")), "nothing was written"


def test_folds_without_a_test_split_are_not_tested_on_images_of_the_training(images, tmp_path, capsys):
    files = [write_run(tmp_path / f"fold{n}", images, n, fold=n, folds=2, test_fraction=0.0) for n in range(2)]
    assert main(["test", f"--ckpt_path=[{files[0]},{files[1]}]", QUIET]) == 2
    assert "no test split" in capsys.readouterr().err


def test_folds_are_trained_and_their_ensemble_is_tested_with_one_command(images, tmp_path, monkeypatch, capsys):
    """Two folds of one step each; the second call trains nothing, another configuration is refused."""
    config = small_config(images, tmp_path, max_epochs=1, limit_train_batches=1)
    file = write_config(config, tmp_path / "config.yaml")
    command = ["folds", "--config", file, "--folds", "2", "--jobs", "2", f"--output={tmp_path / 'folds'}"]
    assert main(command) == 0
    assert "Test, with 95 % intervals" in capsys.readouterr().out
    assert len(rows_of(tmp_path / "folds/folds.csv")) == 2
    assert (tmp_path / "folds/ensemble/test_metrics.json").is_file()
    first = (tmp_path / "folds/fold0/checkpoints/best.ckpt").stat().st_mtime_ns
    assert main([*command, "--seed_everything=1"]) == 2
    assert "choose another folder" in " ".join(capsys.readouterr().err.split())
    monkeypatch.setattr(folds, "run_lightning", lambda argv: 0)
    assert main(command) == 0
    assert (tmp_path / "folds/fold0/checkpoints/best.ckpt").stat().st_mtime_ns == first
