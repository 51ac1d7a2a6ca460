"""A disk that is full or read-only, on a real file system of a few hundred kilobytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mtmedformer.commands.main import main
from tests.e2e.test_federation import federated
from tests.fixtures.small_set import small_config, write_config
from tests.fixtures.stored_models import OF_FIT, description, write_checkpoint

QUIET = "--trainer.enable_progress_bar=false"


@pytest.fixture
def small_disk(tmp_path):
    """Return a function that mounts an empty file system with options; skip where the test may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        subprocess.run(["umount", folder], capture_output=True, check=False)
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, check=False
        )
        if done.returncode:
            pytest.skip("a file system can be mounted by root only")
        return folder

    yield mount
    subprocess.run(["umount", "--lazy", folder], capture_output=True, check=False)


def errors(capsys) -> str:
    return " ".join(capsys.readouterr().err.split()).replace("- ", "-")


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_a_full_disk_ends_a_training_in_words_with_the_last_checkpoint_whole(images, small_disk, tmp_path, capsys):
    for size, checkpoint in (("40k", False), ("1200k", False), ("3m", True)):
        disk = small_disk(f"size={size}")
        config = small_config(images, tmp_path, max_epochs=2, limit_train_batches=2, default_root_dir=str(disk / "run"))
        assert main(["fit", "--config", write_config(config, tmp_path / "config.yaml")]) == 1, size
        message = errors(capsys)
        assert "run/" in message.split("mtmedformer: ")[1]
        assert "no space left" in message
        assert not list(disk.rglob(".*.part"))
        files = list(disk.rglob("*.ckpt"))
        assert bool(files) == checkpoint
        for file in files:
            torch.load(file, weights_only=True)


@pytest.mark.parametrize("placement", ["sequential", "isolated"])
def test_a_full_disk_ends_a_federation_in_words_and_it_is_continued(images, small_disk, tmp_path, capsys, placement):
    disk = small_disk("size=2000k")
    config = federated(images, tmp_path, rounds=1, placement=placement)
    config["trainer"]["default_root_dir"] = str(disk / "run")
    file = write_config(config, tmp_path / "config.yaml")
    assert main(["fit", "--config", file]) == 1
    message = errors(capsys).split("mtmedformer: ")[1]
    assert "no space left" in message
    assert str(disk / "run/updates") in message
    assert [path.name for path in disk.rglob("*.ckpt")] == ["last.ckpt"]
    torch.load(disk / "run/checkpoints/last.ckpt", weights_only=True)
    assert not [*disk.rglob(".*.part"), *disk.rglob("updates")]
    assert json.loads((disk / "run/run_state.json").read_text())["state"] == "failed"
    subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
    assert main(["fit", "--config", file, "--ckpt_path=last"]) == 0
    assert (disk / "run/checkpoints/best.ckpt").is_file()


def test_a_full_disk_ends_predict_and_test_in_words(images, small_disk, tmp_path, capsys):
    model = write_checkpoint(tmp_path / "model", description("health", "organ"), **OF_FIT)
    films = str(images / "images")
    config = write_config({"data": small_config(images, tmp_path)["data"]}, tmp_path / "data.yaml")
    disk = small_disk("size=150k")
    to_predict = ["predict", "--ckpt_path", str(model), "--images", films, "--output", str(disk / "out"), QUIET]
    assert main([*to_predict, "--data.num_workers=0"]) == 1
    assert "no space left" in errors(capsys)
    assert list(disk.rglob("images/*.json")), "what was finished stays"
    disk = small_disk("size=8k")
    assert (
        main(["test", "--ckpt_path", str(model), "--config", config, f"--trainer.default_root_dir={disk}/run", QUIET])
        == 1
    )
    assert "no space left" in errors(capsys)


def test_a_read_only_disk_is_one_sentence(images, small_disk, tmp_path, capsys):
    model = write_checkpoint(tmp_path / "model", **OF_FIT)
    disk = small_disk("ro")
    config = write_config(small_config(images, tmp_path, default_root_dir=str(disk / "run")), tmp_path / "config.yaml")
    films = ["--images", str(images / "images/im000.png"), "--output", str(disk / "out")]
    for argv in (
        ["fit", "--config", config],
        ["predict", "--ckpt_path", str(model), *films, QUIET, "--data.num_workers=0"],
        ["export", "--ckpt_path", str(model), "--output", str(disk / "x"), "--format=safetensors"],
    ):
        assert main(argv) == 2, argv[0]
        assert "read-only" in errors(capsys).lower(), argv[0]


@pytest.mark.timeout(120)
def test_too_few_open_files_and_a_removed_folder_are_words_at_the_start(tmp_path):
    gone = tmp_path / "gone"
    for prepare, words in (("ulimit -n 64", "ulimit -n 128"), (f"cd {gone} && rmdir {gone}", "current folder")):
        gone.mkdir(exist_ok=True)
        command = f"{prepare} && exec {sys.executable} -m mtmedformer test --ckpt_path x"
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 2
        assert words in " ".join(done.stderr.split())
        assert "Traceback" not in done.stderr
