"""A whole federation by the command line, on a small set of two sites."""

import csv
import json
import os
import signal
from pathlib import Path

import lightning as L
import pytest
import torch

from mtmedformer.cli import main
from tests.small_set import small_config, write_config, write_small_set


def federated(images: Path, runs: Path, rounds: int = 2, **federation: object) -> dict:
    """Return the small configuration, its set cut by site, trained in rounds."""
    config = small_config(images, runs, max_epochs=rounds)
    data = config["data"]
    data["init_args"] |= {"val_fraction": 0.25, "test_fraction": 0.25}
    config["data"] = {"class_path": "federation.FederatedDataModule", "init_args": {"data": data, "by": "site"}}
    config["federation"] = {
        "class_path": "callbacks.Federation",
        "init_args": {"aggregator": {"class_path": "federation.FedAvg"}, **federation},
    }
    return config


def weights_of(file: Path) -> dict[str, torch.Tensor]:
    return torch.load(file, weights_only=True)["state_dict"]


def same(a: Path, b: Path) -> bool:
    """Compare the weights of two checkpoints bit by bit."""
    one, other = weights_of(a), weights_of(b)
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


class KillAt(L.Callback):
    """Sends this process Ctrl-C during one step of a site's training; counts steps over all rounds and sites."""

    steps = 0

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        KillAt.steps += 1
        if KillAt.steps == self.step:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_small_set(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """A finished federation of three rounds: its folder and its configuration file."""
    runs = tmp_path_factory.mktemp("runs")
    config = write_config(federated(images, runs, rounds=3), runs / "config.yaml")
    assert main(["fit", "--config", config]) == 0
    return runs / "run", config


def test_fit_runs_rounds_and_counts_them(trained):
    folder, _ = trained
    for name in ("config.yaml", "metrics.csv", "sites.json", "sites.png", "checkpoints/best.ckpt"):
        assert (folder / name).is_file(), name
    last = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    assert last["epoch"] == 2
    assert last["global_step"] == 3, "one server step a round"
    rows = rows_of(folder / "metrics.csv")
    assert len([r for r in rows if r.get("val/score")]) == 3
    logged = set().union(*(row.keys() for row in rows))
    assert {
        "val/organ/dice/site=north",
        "val/organ/dice/site=south",
        "val/site_worst",
        "client/north/val/score",
        "client/south/train/loss_epoch",
        "client/north/train/nodules/loss",
    } <= logged
    assert "client/south/train/nodules/loss" not in logged, "the south labels no boxes"


def test_the_matrix_of_sites_and_tasks_is_written(trained):
    folder, _ = trained
    north, south = json.loads((folder / "sites.json").read_text())
    assert (north["site"], south["site"]) == ("north", "south")
    assert south["labels"]["nodules"] == 0
    assert north["labels"]["nodules"] == north["images"] > 0


def test_the_site_without_a_task_sends_nothing_of_its_head(trained):
    folder, _ = trained
    state = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["callbacks"]["Federation"]
    for told in state["history"]:
        assert set(told["sites"]["south"]["blocks"]) == {"encoder", "heads.health", "heads.organ"}
        assert set(told["sites"]["north"]["blocks"]) == {"encoder", "heads.health", "heads.organ", "heads.nodules"}
    assert "loss" not in told["sites"]["north"]["blocks"], "the loss weights stay home"


def test_a_federated_checkpoint_is_a_plain_one(trained, capsys):
    folder, _ = trained
    best = str(folder / "checkpoints/best.ckpt")
    assert main(["test", "--ckpt_path", best, "--trainer.enable_progress_bar=false"]) == 0
    report = json.loads((folder / "test_metrics.json").read_text())
    assert {"test/organ/dice", "test/organ/dice/site=north", "test/organ/dice/site=south"} <= set(report)
    assert main(["predict", "--ckpt_path", best, "--trainer.enable_progress_bar=false"]) == 0
    assert (folder / "predictions/predictions.csv").is_file()


def test_nothing_of_a_patient_is_in_the_run_folder(trained):
    folder, _ = trained
    for file in folder.rglob("*"):
        if file.is_file() and "predictions" not in file.parts:
            content = file.read_bytes()
            assert b"secret-patient" not in content, file
            if file.name != "quarantine.csv":
                assert b"images/im0" not in content, file
                assert b"im000" not in content, file
