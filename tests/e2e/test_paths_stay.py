"""Paths of the site, through a whole training and test: they stay out of everything that is handed on."""

import shutil
from pathlib import Path

import pytest
import wandb

from mtmedformer.commands.main import main
from tests.e2e.test_federation import federated
from tests.fixtures.small_set import small_config, write_config
from tests.fixtures.stored_models import OF_FIT, write_checkpoint

MARKER = "st_mary_oncology"


def files_with(marker: str, folder: Path) -> set[str]:
    """Return the files below a folder that contain a text, as paths below it."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {file.relative_to(folder).as_posix() for file in files if marker.encode() in file.read_bytes()}


@pytest.mark.parametrize("kind", ["one computer", "federation"])
def test_no_path_of_the_data_in_what_is_handed_on(images, tmp_path, monkeypatch, kind):
    root = tmp_path / MARKER / "films"
    shutil.copytree(images, root)
    weights = write_checkpoint(tmp_path / MARKER / "model", **OF_FIT)
    runs = tmp_path / "runs"
    monkeypatch.setenv("WANDB_DIR", str(runs))
    config = federated(root, runs, rounds=1) if kind == "federation" else small_config(root, runs, max_epochs=1)
    config["model"]["init_args"]["init_weights"] = str(weights)
    config["trainer"]["logger"] = {"class_path": "WandbLogger", "init_args": {"project": "p", "save_dir": str(runs)}}
    runs.mkdir()
    file = write_config(config, tmp_path / "config.yaml")
    assert main(["fit", "--config", file]) == 0
    wandb.finish()
    assert main(["test", "--config", file, "--ckpt_path=last"]) == 0
    wandb.finish()
    assert len(list(runs.rglob("*.wandb"))) >= 2
    for name in ("report.html", "model_card.md", "checkpoints/last.ckpt", "checkpoints/best.ckpt"):
        assert (runs / "run" / name).is_file(), name
    assert files_with(MARKER, runs) == {"run/config.yaml", "run/config_test.yaml"}, "the site's own files"
