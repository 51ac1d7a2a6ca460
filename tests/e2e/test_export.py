"""``mtmedformer export`` as a user calls it, and the example that uses what it wrote."""

import csv
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mtmedformer
from mtmedformer.commands.main import main
from tests.fixtures.small_set import small_config, write_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """A finished run that calibrated itself: its folder, its configuration and its export."""
    runs = tmp_path_factory.mktemp("runs")
    config = small_config(images, runs, max_epochs=2)
    config["trainer"]["callbacks"] = [{"class_path": "callbacks.Calibrate"}]
    file = write_config(config, runs / "config.yaml")
    assert main(["fit", "--config", file]) == 0
    assert main(["export", "--ckpt_path", f"{runs}/run/checkpoints/best.ckpt", "--output", f"{runs}/out"]) == 0
    return runs / "run", file, runs / "out"


def test_the_command_prints_its_check(trained, tmp_path, capsys):
    folder, _, _ = trained
    checkpoint = str(folder / "checkpoints/best.ckpt")
    assert main(["export", f"--ckpt_path={checkpoint}", f"--output={tmp_path / 'a'}"]) == 0
    printed = capsys.readouterr().out
    for word in ("health", "nodules.boxes", "organ", "model.onnx", "model.safetensors", "research use only"):
        assert word in printed.replace("Research", "research")
    gaps = [float(gap) for gap in re.findall(r"\d\.\de-?\d+", printed)]
    assert len(gaps) >= 5
    assert max(gaps) < 1e-2
    assert main(["export", f"--ckpt_path={checkpoint}", f"--output={tmp_path / 'b'}", "--format=safetensors"]) == 0
    assert not (tmp_path / "b/model.onnx").exists()


def test_python_and_the_command_line_predict_the_same(trained, images, tmp_path):
    """The checkpoint, the export and ``mtmedformer predict`` give the same results for one file, in its own pixels."""
    folder, _, out = trained
    film = images / "images/im003.png"
    Image.fromarray(np.tile(np.asarray(Image.open(film)), (1, 2))).save(tmp_path / "wide.png")
    checkpoint = folder / "checkpoints/best.ckpt"
    command = ["predict", f"--ckpt_path={checkpoint}", "--images", str(tmp_path / "wide.png")]
    assert main([*command, f"--output={tmp_path / 'printed'}", "--trainer.enable_progress_bar=false"]) == 0
    (row,) = _rows(tmp_path / "printed/predictions.csv")
    for path in (checkpoint, out):
        found = mtmedformer.load(path).predict(tmp_path / "wide.png")
        assert found.size == (64, 128)
        assert found.calibrated, "the run calibrated itself"
        for name in ("well", "sick"):
            assert float(row[f"health:{name}"]) == pytest.approx(found.classes["health"][name], abs=2e-4)
        (png,) = (tmp_path / "printed/masks/organ").rglob("*.png")
        assert np.array_equal(np.asarray(Image.open(png)) > 0, found.masks["organ"]["organ"])


def _rows(file):
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_training_continues_from_an_export(trained, tmp_path, capsys):
    _, file, out = trained
    arguments = [f"--model.init_weights={out / 'model.safetensors'}", f"--trainer.default_root_dir={tmp_path / 'run'}"]
    command = ["fit", "--config", file, "--config", str(out / "config.yaml"), *arguments, "--trainer.max_epochs=1"]
    assert main(command) == 0
    filled = re.search(r"model\.safetensors: (\d+) of (\d+) tensors filled", capsys.readouterr().out)
    assert filled is not None
    assert filled[1] == filled[2]
    fresh = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert fresh["hyper_parameters"]["init_weights"] is None, "a checkpoint names no file of the computer"


def test_three_lines_of_python_in_a_fresh_process(trained, images):
    film = str(images / "images/im000.png")
    code = f"import mtmedformer\nm = mtmedformer.load({str(trained[2])!r})\nprint(m.predict({film!r}).classes)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "'sick'" in done.stdout


@pytest.mark.parametrize("which", ["checkpoint", "export"])
def test_the_example_runs(trained, images, which, capsys):
    folder, _, out = trained
    path = out if which == "export" else folder / "checkpoints/best.ckpt"
    example = runpy.run_path(str(ROOT / "docs/examples/use_a_model.py"))
    example["main"](str(path), str(images / "images/im000.png"))
    printed = capsys.readouterr().out
    for words in (
        "im000.png: 64 x 64 pixels (research use only)",
        "health: well 0.",
        "(calibrated)",
        "organ: organ covers",
    ):
        assert words in printed


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "--ckpt_path, --output"),
        (["--ckpt_path=none.ckpt", "--output=x"], "none.ckpt: no such file"),
        (["--ckpt_path=CKPT", "--output=x", "--format=coreml"], "coreml"),
        (["--ckpt_path=CKPT", "--output=/proc/none"], "/proc/none"),
    ],
)
def test_a_mistake_is_explained(trained, arguments, words, capsys):
    checkpoint = str(trained[0] / "checkpoints/best.ckpt")
    assert main(["export", *(argument.replace("CKPT", checkpoint) for argument in arguments)]) == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_an_export_contains_no_patient_and_no_path(trained, images):
    for file in trained[2].iterdir():
        content = file.read_bytes()
        assert b"secret-patient" not in content, file
        assert str(images).encode() not in content, file
