"""``predict --images``: from a short command line to a data set prepared as in training."""

from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from mtmedformer.commands.load.preparation import preparation
from mtmedformer.commands.predict_images import with_images
from mtmedformer.errors import ConfigError

CHEST = {"class_path": "datamodules.ChestPreset", "init_args": {"rotation": 5.0}}


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    data = {
        "class_path": "datamodules.PhantomDataModule",
        "init_args": {"sites": "chest", "image_size": 96, "preset": CHEST},
    }
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump({"data": data}))
    file = tmp_path / "run/checkpoints/best.ckpt"
    file.touch()
    return file


def expand(*arguments: str) -> tuple[list[str], dict]:
    with ExitStack() as stack:
        argv = with_images(["predict", *arguments], stack)
        return argv, yaml.safe_load(Path(argv[argv.index("--config") + 1]).read_text())


def test_images_are_prepared_as_in_training(checkpoint):
    argv, config = expand("--ckpt_path", str(checkpoint), "--images", "a", "b c", "--output", "out")
    assert config["data"]["class_path"] == "datamodules.ImageFolderDataModule"
    assert config["data"]["init_args"] == {"images": ["a", "b c"], "image_size": 96, "preset": CHEST}
    assert config["trainer"]["callbacks"][0]["init_args"] == {
        "folder": "out",
        "dicom": True,
        "overlays": True,
        "refuse_unfamiliar": False,
        "gsps": False,
        "secondary_capture": False,
    }
    assert argv[3:] == ["--ckpt_path", str(checkpoint), "--trainer.default_root_dir=out"]


def test_flags_and_other_arguments_go_through(checkpoint):
    argv, config = expand(
        *("--images=a", f"--ckpt_path={checkpoint}", "--data.image_size=[64,32]", "--dicom=false"),
        *("--output=out", "--overlays", "false", "--images", "b", "--trainer.devices=1"),
    )
    assert config["data"]["init_args"]["images"] == ["a", "b"]
    assert config["trainer"]["callbacks"][0]["init_args"] == {
        "folder": "out",
        "dicom": False,
        "overlays": False,
        "refuse_unfamiliar": False,
        "gsps": False,
        "secondary_capture": False,
    }
    assert "--data.image_size=[64,32]" in argv
    assert "--trainer.devices=1" in argv


def test_other_commands_are_left_alone():
    for argv in (["fit", "--images", "x"], ["predict", "--ckpt_path", "x"], [], ["--help"]):
        with ExitStack() as stack:
            assert with_images(argv, stack) == argv


def test_mistakes_are_reported(checkpoint, tmp_path):
    path = f"--ckpt_path={checkpoint}"
    for arguments, message in (
        ([path, "--images", "a"], "needs --output"),
        ([path, "--output", "a"], "--output needs --images"),
        ([path, "--images", "--output", "a"], "expected at least one argument"),
        ([path, "--images", "a", "--output", "b", "--dicom", "maybe"], "neither true nor false"),
        (["--images", "a", "--output", "b"], "must name a checkpoint"),
        (["--ckpt_path=last", "--images", "a", "--output", "b"], "must name a checkpoint"),
        ([path, "--images", "a", "--output", "b", "--data", "X"], "exclude each other"),
    ):
        with pytest.raises(ConfigError, match=message):
            expand(*arguments)


def test_without_a_run_the_preparation_must_be_given(tmp_path):
    file = tmp_path / "model.ckpt"
    file.touch()
    arguments = ("--ckpt_path", str(file), "--images", "a", "--output", "b")
    with pytest.raises(ConfigError, match=r"--data\.image_size"):
        expand(*arguments)
    _, config = expand(*arguments, "--data.image_size=64")
    assert config["data"]["init_args"] == {"images": ["a"]}


def test_a_federation_is_looked_through():
    one = {"class_path": "datamodules.LabelsCSVDataModule", "init_args": {"image_size": 64, "preset": CHEST}}
    other = {"class_path": "datamodules.LabelsCSVDataModule", "init_args": {"image_size": 32, "preset": CHEST}}
    federated = "federation.FederatedDataModule"
    expected = {"image_size": 64, "preset": CHEST}
    assert preparation({"class_path": federated, "init_args": {"data": one, "sites": None}}) == expected
    assert preparation({"class_path": federated, "init_args": {"sites": {"a": one, "b": one}}}) == expected
    with pytest.raises(ConfigError, match="sites of this run prepare images differently"):
        preparation({"class_path": federated, "init_args": {"sites": {"a": one, "b": other}}})
    assert preparation(None) == {}
