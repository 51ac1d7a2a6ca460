"""Calibration, maps and the posterior as a user asks for them on the command line, in a federation of two sites."""

import csv
import json

import pytest
import torch
from PIL import Image

from federation.bayes.posterior import Posterior
from mtmedformer.commands.main import main
from tests.fixtures.small_set import small_config, write_config

QUIET = "--trainer.enable_progress_bar=false"
ADD = "--trainer.callbacks+="


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """A federation of two rounds that was calibrated and whose posterior was tuned."""
    runs = tmp_path_factory.mktemp("runs")
    config = small_config(images, runs, max_epochs=2)
    data = config["data"]
    data["init_args"] |= {"val_fraction": 0.25, "test_fraction": 0.25}
    config["data"] = {"class_path": "federation.FederatedDataModule", "init_args": {"data": data, "by": "site"}}
    config["federation"] = {"class_path": "callbacks.Federation"}
    arguments = ["fit", "--config", write_config(config, runs / "config.yaml"), f"{ADD}Calibrate"]
    arguments += ["--trainer.callbacks.operating_points=[sensitivity=0.8,youden]"]
    arguments += [f"{ADD}TunePosterior", "--trainer.callbacks.grid=[0,0.01,0.1]", "--trainer.callbacks.samples=2"]
    assert main(arguments) == 0
    return runs / "run"


def rows_of(file):
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_the_checkpoint_holds_its_calibration_and_the_folder_the_posterior(trained):
    stored = torch.load(trained / "checkpoints/best.ckpt", weights_only=True)
    assert set(stored["calibration"]) >= {"health", "organ"}
    assert 0.1 <= stored["calibration"]["health"]["temperature"] <= 10
    assert set(stored["calibration"]["health"]["thresholds"]["sick"]) == {"sensitivity=0.8", "youden"}
    logged = set().union(*(row.keys() for row in rows_of(trained / "metrics.csv")))
    assert {"val/health/temperature", "val/organ/nll_calibrated"} <= logged
    tuning = Posterior.load(trained / "posterior.safetensors").tuning
    assert set(tuning["tasks"]) == {"health", "nodules", "organ"}
    assert all(set(one["nll"]) == {"0", "0.01", "0.1"} for one in tuning["tasks"].values())


def test_test_command_uses_the_calibration_and_reports_its_effect(trained, tmp_path, capsys):
    arguments = ["test", "--ckpt_path", str(trained / "checkpoints/best.ckpt"), QUIET]
    assert main([*arguments, f"--trainer.default_root_dir={tmp_path}"]) == 0
    reliability = json.loads((tmp_path / "reliability.json").read_text())
    assert {"ece", "ece_raw", "nll", "nll_raw", "temperature", "thresholds", "bins"} <= reliability["health"].keys()
    assert "ece raw" in capsys.readouterr().out


@pytest.mark.parametrize("refused", [False, True])
def test_predict_averages_over_the_posterior_or_names_the_reason(trained, tmp_path, capsys, refused):
    posterior = Posterior.load(trained / "posterior.safetensors")
    for one in posterior.tuning["tasks"].values():
        one["scale"] = 0.0 if refused else 0.1
    file = tmp_path / "posterior.safetensors"
    posterior.save(file)
    arguments = ["predict", "--ckpt_path", str(trained / "checkpoints/best.ckpt"), QUIET]
    arguments += [f"--trainer.default_root_dir={tmp_path}", f"{ADD}Explanations"]
    arguments += ["--trainer.callbacks.grad_cam=[nodules]"]
    arguments += [f"{ADD}PosteriorPrediction", f"--trainer.callbacks.posterior={file}"]
    arguments += ["--trainer.callbacks.samples=2", "--trainer.callbacks.maps=true"]
    assert main(arguments) == (2 if refused else 0)
    if refused:
        assert "health: posterior" in capsys.readouterr().err
        return
    rows = rows_of(tmp_path / "predictions/predictions.csv")
    assert any("mutual" in key for key in rows[0])
    for kind in ("explanations", "uncertainty"):
        pictures = sorted((tmp_path / "predictions" / kind).rglob("*.png"))
        assert len(pictures) == len(rows)
        assert min(Image.open(pictures[0]).size) > 100
