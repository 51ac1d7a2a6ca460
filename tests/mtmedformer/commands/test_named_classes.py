"""A checkpoint and the configuration beside it: nothing foreign is imported, nothing odd ends in a traceback."""

import sys
from pathlib import Path

import pytest
import torch
import yaml

from mtmedformer.commands.main import main
from mtmedformer.commands.named_classes import check_stored, own_words
from mtmedformer.errors import ConfigError
from mtmedformer.storage.hashing import WEIGHTS_DIGEST, state_hash
from tests.fixtures.stored_models import OF_FIT, description, write_checkpoint

COMMANDS = ("predict", "test", "validate", "fit", "predict --images")


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """A module of another project that leaves a file behind when it is imported; returns that file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "foreign.py").write_text(
        f"open({str(tmp_path / 'imported')!r}, 'w').close()\n"
        "from datamodules import ChestPreset, PhantomDataModule\nfrom mtmedformer import MultiTaskModule\n"
        "class Own(ChestPreset): ...\nclass Data(PhantomDataModule): ...\nclass Model(MultiTaskModule): ...\n"
    )
    (tmp_path / "object.yaml").write_text("class_path: foreign.Own\n")
    yield tmp_path / "imported"
    sys.modules.pop("foreign", None)


def stored(folder: Path, hyper_parameters=lambda given: given, data=lambda given: given) -> Path:
    """Write a run whose model and data are changed by functions."""
    file = write_checkpoint(folder, **OF_FIT)
    checkpoint = torch.load(file, weights_only=True)
    checkpoint["hyper_parameters"] = hyper_parameters(checkpoint["hyper_parameters"])
    torch.save(checkpoint, file)
    section = {"class_path": "datamodules.PhantomDataModule", "init_args": {"root": str(folder), "image_size": 64}}
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": data(section)}))
    return file


def run(command: str, file: Path, *more: str) -> int:
    name, *images = command.split()
    output = ["--images", str(file.parent), "--output", str(file.parent / "out")] if images else []
    return main([name, "--ckpt_path", str(file), *output, *more])


def with_argument(section: dict, **arguments) -> dict:
    return section | {"init_args": section["init_args"] | arguments}


MODELS = {
    "the model": lambda given: given | {"_class_path": "foreign.Model"},
    "the encoder": lambda given: given | {"encoder": {"class_path": "foreign.Own"}},
    "a deep part": lambda given: (
        given | {"heads": {"x": {"class_path": "mtmedformer.x", "init_args": {"a": [{"class_path": "foreign.Own"}]}}}}
    ),
    "text for the encoder": lambda given: given | {"encoder": "foreign.Own"},
    "text for the optimizer": lambda given: given | {"optimizer": "os.system"},
    "a program": lambda given: given | {"encoder": {"class_path": "subprocess.Popen", "init_args": {"args": ["true"]}}},
    "a file for the encoder": lambda given: given | {"encoder": "object.yaml"},
}
DATA = {
    "the data": lambda given: given | {"class_path": "foreign.Data"},
    "the preset": lambda given: with_argument(given, preset={"class_path": "foreign.Own"}),
    "text for the preset": lambda given: with_argument(given, preset="foreign.Own"),
    "a file for the preset": lambda given: with_argument(given, preset="object.yaml"),
    "a file for the data": lambda given: "object.yaml",
}


@pytest.mark.parametrize("change", MODELS.values(), ids=MODELS)
def test_a_checkpoint_names_no_class_of_another_project(change, foreign, tmp_path, capsys):
    file = stored(tmp_path / "run", change)
    for command in COMMANDS:
        assert run(command, file) == 2, command
        assert "refused, because it names" in " ".join(capsys.readouterr().err.split()), command
    assert not foreign.exists()


@pytest.mark.parametrize("change", DATA.values(), ids=DATA)
def test_the_configuration_beside_it_names_none_either(change, foreign, tmp_path, capsys):
    file = stored(tmp_path / "run", data=change)
    for command in ("test", "predict --images"):
        code = run(command, file)
        assert code == 2, command
        assert len(capsys.readouterr().err.strip().split("mtmedformer: ")) == 2, "one sentence"
    assert not foreign.exists()


def test_the_user_may_name_or_trust_his_own_class(foreign, tmp_path, capsys):
    file = stored(tmp_path / "run", data=DATA["the data"])
    assert run("test", file, "--trusted", "--data.image_size=x") == 2
    assert "image_size" in capsys.readouterr().err, "past the check: his own mistake is found next"
    assert foreign.exists()
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump({"model": {"class_path": "foreign.Model"}}))
    section = {"class_path": "foreign.Model", "init_args": {}}
    check_stored(section, "x", own_words(["test", "--config", str(own)]))
    check_stored(section, "x", own_words(["test", "--model=foreign.Model"]))
    with pytest.raises(ConfigError, match=r"foreign\.Model"):
        check_stored(section, "x", own_words(["test", "--model=foreign.Other"]))


def test_ordinary_configurations_pass():
    files = [file for file in Path("configs").rglob("*.yaml") if "sweep" not in file.parts]
    sections = [yaml.safe_load(file.read_text()).get(key) for file in files for key in ("model", "data")]
    checked = [one for one in sections if isinstance(one, dict) and "class_path" in one]
    assert len(checked) > 20
    for section in checked:
        check_stored(section, "x")
    names = {"name": "vit_small_patch14_dinov2.lvd142m", "root": "/data/set.v2", "table": "labels.csv"}
    check_stored({"class_path": "datamodules.LabelsCSVDataModule", "init_args": names}, "x")


ODD = {
    "no dict": lambda given: 5,
    "a tensor": lambda given: given | {"layer_decay": torch.zeros(3)},
    "missing": lambda given: {key: value for key, value in given.items() if key != "encoder"},
    "unknown": lambda given: given | {"colour": "red"},
    "a list": lambda given: given | {"heads": [1, 2]},
    "too wide": lambda given: given | {"encoder": with_argument(given["encoder"], channels=10**6)},
    "too many": lambda given: (
        given | {"heads": given["heads"] | {"nodules": with_argument(given["heads"]["nodules"], num_convs=10**9)}}
    ),
    "negative": lambda given: given | {"encoder": with_argument(given["encoder"], channels=-16)},
    "too long": lambda given: given | {"encoder": with_argument(given["encoder"], name="x" * 10**6)},
    "no number": lambda given: given | {"encoder": with_argument(given["encoder"], channels="wide")},
    "unprintable": lambda given: (
        given | {"heads": {"organ": with_argument(given["heads"]["organ"], classes=["\x1b[31m"])}}
    ),
}


@pytest.mark.parametrize("change", ODD.values(), ids=ODD)
def test_odd_hyperparameters_are_one_sentence(change, tmp_path, capsys):
    file = stored(tmp_path / "run", change)
    for load in (lambda: run("test", file), lambda: main(["export", "--ckpt_path", str(file), "--output", "x"])):
        assert load() == 2
        error = capsys.readouterr().err
        assert error.startswith("mtmedformer: ")
        assert "Traceback" not in error
        assert "\x1b" not in error


@pytest.mark.parametrize("text", ["a: [1\n b: {", "\x00", "data: " + "[" * 5000, "[]", "data: !!python/object:os.x {}"])
def test_a_broken_configuration_beside_it_is_one_sentence(text, tmp_path, capsys):
    file = stored(tmp_path / "run")
    (tmp_path / "run/config.yaml").write_text(text)
    assert run("test", file) == 2
    assert "config.yaml: " in " ".join(capsys.readouterr().err.split())


def test_references_that_multiply_are_refused_in_bounded_time(tmp_path, capsys):
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    for before, after in zip("abcdefgh", "bcdefghi", strict=True):
        lines.append(f"{after}: &{after} [{', '.join([f'*{before}'] * 10)}]")
    file = stored(tmp_path / "run")
    lines.append("data: {class_path: datamodules.PhantomDataModule, init_args: {where: *i}}")
    (tmp_path / "run/config.yaml").write_text("\n".join(lines))
    assert run("test", file) == 2
    assert "too large" in capsys.readouterr().err


def test_exchanged_or_damaged_weights_are_found(tmp_path, capsys):
    file = stored(tmp_path / "run")
    checkpoint = torch.load(file, weights_only=True)
    checkpoint[WEIGHTS_DIGEST] = state_hash(checkpoint["state_dict"])
    next(iter(checkpoint["state_dict"].values())).view(-1)[0] += 1
    torch.save(checkpoint, file)
    more = ["--data.limit=20", "--data.root", str(tmp_path / "phantom"), "--data.cache_dir", str(tmp_path / "cache")]
    assert run("test", file, *more) == 2
    assert "do not have the digest" in " ".join(capsys.readouterr().err.split())
    assert main(["export", "--ckpt_path", str(file), "--output", str(tmp_path / "x")]) == 2
    assert "do not have the digest" in " ".join(capsys.readouterr().err.split())
    config = {"model": with_argument(description(), init_weights=str(file))}
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(tmp_path / "fit.yaml"), "--data=datamodules.PhantomDataModule", *more]) == 2
    assert "do not have the digest" in " ".join(capsys.readouterr().err.split())
