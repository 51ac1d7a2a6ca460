"""The white level of 16-bit images, from the training to every use of the model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import mtmedformer
from mtmedformer.commands.load.preparation import data_state
from mtmedformer.commands.main import main
from tests.fixtures.dicom_files import film
from tests.fixtures.small_set import small_config, write_config, write_small_set

QUIET = ("--trainer.enable_progress_bar=false", "--data.num_workers=0")


def deepen(folder: Path, bits: int) -> None:
    """Replace the films of a set by 16-bit files of fewer bits, some of them dark."""
    for number, file in enumerate(sorted((folder / "images").glob("*.png"))):
        values = film(64, 64, bits=bits, seed=number) // (1 + number % 4)
        Image.fromarray(values.astype(np.uint16)).save(file)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder, runs = write_small_set(tmp_path_factory.mktemp("set")), tmp_path_factory.mktemp("runs")
    deepen(folder, 14)
    config = small_config(folder, runs, max_epochs=1, limit_train_batches=1)
    assert main(["fit", "--config", write_config(config, runs / "config.yaml"), *QUIET]) == 0
    return runs / "run"


def dark(folder: Path) -> Path:
    """Write a 14-bit film that uses 12 bits; alone it would count as a 12-bit one."""
    Image.fromarray(film(64, 64, bits=12)).save(folder / "dark.png")
    return folder / "dark.png"


def test_the_level_is_kept_and_used_by_resume_test_and_predict(run, tmp_path):
    checkpoint = run / "checkpoints/last.ckpt"
    assert data_state(torch.load(checkpoint, weights_only=True)) == {"white_level": 16383}
    config = yaml.safe_load((run / "config.yaml").read_text())
    deepen(Path(config["data"]["init_args"]["root"]), 12)  # the set has changed, the level has not
    assert main(["test", "--ckpt_path", str(checkpoint), *QUIET]) == 0
    resumed = ["fit", "--config", str(run / "config.yaml"), "--ckpt_path", str(checkpoint), "--trainer.max_epochs=2"]
    assert main([*resumed, f"--trainer.default_root_dir={tmp_path / 'more'}", *QUIET]) == 0
    again = torch.load(tmp_path / "more/checkpoints/last.ckpt", weights_only=True)
    assert data_state(again) == {"white_level": 16383}
    output = tmp_path / "out"
    film_alone = dark(tmp_path)
    arguments = ["--images", str(film_alone), "--output", str(output), "--dicom=false"]
    assert main(["predict", "--ckpt_path", str(checkpoint), *arguments, *QUIET]) == 0
    about = [json.loads(file.read_text()) for file in output.rglob("*.json")]
    assert any("16383" in json.dumps(one) for one in about)


def test_load_and_export_know_the_level(run, tmp_path):
    predictor = mtmedformer.load(run / "checkpoints/last.ckpt")
    assert predictor.white_level == 16383
    exported = tmp_path / "model"
    assert (
        main(
            [
                "export",
                "--ckpt_path",
                str(run / "checkpoints/last.ckpt"),
                "--output",
                str(exported),
                "--format=safetensors",
            ]
        )
        == 0
    )
    assert json.loads((exported / "model.json").read_text())["preparation"]["white_level"] == 16383
    assert mtmedformer.load(exported).white_level == 16383


def test_the_fingerprint_finds_the_level(run, tmp_path, capsys):
    config = str(run / "config.yaml")
    root = Path(yaml.safe_load((run / "config.yaml").read_text())["data"]["init_args"]["root"])
    deepen(root, 14)
    assert main(["fingerprint", "--config", config, "--output", str(tmp_path / "found")]) == 0
    assert json.loads((tmp_path / "found/fingerprint.json").read_text())["white_level"] == 16383
    assert "White level of the 16-bit images: 16383" in capsys.readouterr().out
