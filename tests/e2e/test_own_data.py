"""Own data by the command line: fingerprint writes a configuration, with which a model is trained, tested and used."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from mtmedformer.commands.main import main
from tests.fixtures.small_set import write_config, write_small_set

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]


def test_from_a_folder_to_predictions_without_describing_anything(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_small_set(Path("films"))
    generic = str(ROOT / "configs/own_data.yaml")
    small = ["--data.root=films", "--data.num_workers=0"]
    assert main(["fingerprint", "--config", generic, *small, "--output=own.yaml"]) == 0
    text = Path("own.yaml").read_text()
    assert text in capsys.readouterr().out
    assert text.startswith("# mtmedformer fit --config own.yaml\n")
    own = yaml.safe_load(text)
    assert own["data"]["init_args"]["image_size"] == [64, 64]
    assert own["data"]["init_args"]["detection"] == {"boxes": {"flag": "has_det", "classes": ["nodule"]}}
    for key in ("encoder:", "boxes:", "organ:", "label:", "loss:", "image_size:", "batch_size:", "sampler:"):
        lines = text.splitlines()
        (place,) = [i for i, line in enumerate(lines) if line.strip().startswith(key)][:1]
        assert lines[place - 1].strip().startswith("#"), f"{key} has no reason"

    assert main(["fit", "--config", "own.yaml", *QUICK]) == 0
    run = Path("runs/own")
    heads = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["hyper_parameters"]["heads"]
    assert heads.keys() == {"boxes", "organ", "label"}
    assert main(["test", "--ckpt_path", str(run / "checkpoints/best.ckpt"), *QUICK[1:]]) == 0
    tested = json.loads((run / "test_metrics.json").read_text())
    assert {key.split("/")[1] for key in tested} >= {"boxes", "organ", "label"}
    image, folder = "films/images/im000.png", "predicted"
    predict = ["predict", "--ckpt_path", str(run / "checkpoints/last.ckpt"), f"--images={image}"]
    assert main([*predict, f"--output={folder}"]) == 0
    with next(Path(folder).glob("*.csv")).open() as file:
        assert len(list(csv.DictReader(file))) == 1
    capsys.readouterr()
    assert main(["fingerprint", "--config", generic, *small, "--output=own.yaml"]) == 2
    assert "own.yaml: the file exists; choose another name, or remove it" in capsys.readouterr().err


def test_automatic_heads_are_those_of_the_checkpoint_once_there_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2), ("test", 2)):
        for label in ("well", "sick"):
            folder = Path("films", split, label)
            folder.mkdir(parents=True)
            for n in range(count):
                Image.fromarray(rng.integers(0, 255, (64, 64), np.uint8)).save(folder / f"{n}.png")
    arguments = ["--config", str(ROOT / "configs/own_data.yaml"), "--data.root=films", "--data.image_size=64",
                 "--data.num_workers=0", "--model.encoder.channels=16", *QUICK[1:]]  # fmt: skip
    assert main(["fit", *arguments, "--trainer.max_epochs=1"]) == 0
    assert main(["fit", *arguments, "--trainer.max_epochs=2", "--ckpt_path=last"]) == 0
    assert sorted(p.name for p in Path("runs").iterdir()) == ["own_data"], "the run is continued in its folder"
    stored = torch.load("runs/own_data/checkpoints/last.ckpt", weights_only=True)
    assert stored["epoch"] == 1
    assert stored["hyper_parameters"]["heads"]["label"]["init_args"]["classes"] == ["sick", "well"]
    assert main(["test", *arguments, "--ckpt_path=best"]) == 0


@pytest.mark.parametrize("cut", ["data", "sites"])
def test_a_federation_gets_a_configuration_with_the_same_heads_at_all_sites(cut, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_small_set(Path("films"), patients=24)
    table = {"root": "films", "num_workers": 0, "image_size": 64, "test_fraction": 0.25, "val_fraction": 0.25}
    sites = {n: {"class_path": "datamodules.LabelsCSVDataModule", "init_args": table | {"where": {"site": n}}}
             for n in ("north", "south")}  # fmt: skip
    data = {"sites": sites}
    if cut == "data":
        data = {"data": {"class_path": "datamodules.LabelsCSVDataModule", "init_args": table}, "by": "site"}
    config = {"data": {"class_path": "federation.FederatedDataModule", "init_args": data}}
    assert main(["fingerprint", "--config", write_config(config, tmp_path / "sites.yaml"), "--output=out"]) == 0
    own = yaml.safe_load(Path("out/config.yaml").read_text())
    assert own["federation"]["class_path"] == "callbacks.Federation"
    small = ["--model.encoder.name=mtmedformer_tiny", "--model.encoder.channels=16"]
    assert main(["fit", "--config", "out/config.yaml", *small, *QUICK]) == 0
    state = torch.load("runs/config/checkpoints/last.ckpt", weights_only=True)
    assert state["hyper_parameters"]["heads"].keys() == {"boxes", "organ", "label"}
