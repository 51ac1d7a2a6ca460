"""Trainings of a study: their keys, when one is finished, and what happens to those that fail or are stopped."""

import io
import os
import signal
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from mtmedformer.commands import child_runs
from mtmedformer.commands.compare import runner, trainings
from mtmedformer.commands.compare.code_version import code_version
from mtmedformer.commands.compare.study import Study, Variant
from mtmedformer.commands.compare.trainings import Evaluation, Status, Training, prepare, salt_of, trainings_of
from mtmedformer.errors import ConfigError

CONFIG = {
    "trainer": {"max_epochs": 2, "callbacks": None, "num_workers": 3},
    "data": {"init_args": {"fold": None, "folds": 5, "seed": 0}},
}


@pytest.fixture
def study(monkeypatch):
    def resolved(study, variant):
        return yaml.safe_load(yaml.safe_dump(CONFIG)) | {"variant": dict(variant.overrides)}

    monkeypatch.setattr(trainings, "resolved", resolved)
    variants = {"a": Variant("a", overrides={"x": 1}), "b": Variant("b", overrides={"x": 2})}
    return Study("s", (), variants, "a", ("dice",), seeds=(0, 1))


def finish(training, models="global"):
    training.folder.mkdir(parents=True, exist_ok=True)
    Status(code_version(), fitted=True, evaluated={"test": Evaluation(models)}).write(training.folder)


def test_every_variant_is_trained_with_every_seed_on_every_fold(study, tmp_path):
    found = trainings_of(replace(study, folds=(0, 1)), tmp_path)
    assert [(c.variant, c.run) for c in found[:3]] == [("a", "seed0-fold0"), ("b", "seed0-fold0"), ("a", "seed0-fold1")]
    assert len({c.key for c in found}) == len({c.folder for c in found}) == 8
    assert found[2].config["data"]["init_args"]["fold"] == 1
    assert found[-1].config["seed_everything"] == 1
    split = trainings_of(replace(study, splits=(7,)), tmp_path)[0]
    assert (split.run, split.config["data"]["init_args"]["seed"]) == ("seed0-split7", 7)


def test_data_without_folds_is_refused(study, tmp_path, monkeypatch):
    monkeypatch.setitem(CONFIG, "data", {"init_args": {"size": 3}})
    with pytest.raises(ConfigError, match="no fold to set"):
        trainings_of(replace(study, folds=(0, 1)), tmp_path)


def test_a_key_depends_on_the_configuration_and_the_code_only(study, tmp_path, monkeypatch):
    first = trainings_of(study, tmp_path)[0]
    assert trainings_of(study, tmp_path)[0].key == first.key
    monkeypatch.setitem(CONFIG["trainer"], "num_workers", 0)
    assert trainings_of(study, tmp_path)[0].key == first.key, "the number of loading processes changes no result"
    monkeypatch.setitem(CONFIG["trainer"], "max_epochs", 3)
    longer = trainings_of(study, tmp_path)[0]
    assert longer.key != first.key
    monkeypatch.setattr(trainings, "code_version", lambda: "another")
    assert trainings_of(study, tmp_path)[0].key != longer.key


def test_a_training_with_other_kept_weights_is_not_finished(study, tmp_path):
    last = trainings_of(study, tmp_path)[0]
    finish(last)
    best = replace(study, checkpoint="best")
    assert trainings_of(study, tmp_path)[0].finished("test")
    for any_code in (False, True):
        assert not trainings_of(best, tmp_path, any_code)[0].finished("test")


def test_trainings_of_another_code_are_used_on_request_only(study, tmp_path, monkeypatch):
    old = trainings_of(study, tmp_path)[0]
    finish(old)
    monkeypatch.setattr(trainings, "code_version", lambda: "another")
    assert not trainings_of(study, tmp_path)[0].finished("test")
    kept, waiting = trainings_of(study, tmp_path, any_code=True)[:2]
    assert kept.folder == old.folder
    assert kept.finished("test")
    assert not kept.finished("val")
    assert waiting.folder.name == "another"


def test_a_training_folder_contains_its_configuration_and_status(study, tmp_path):
    training = trainings_of(study, tmp_path)[0]
    prepare(training, study, salt_of(tmp_path))
    config = yaml.safe_load((training.folder / "config.yaml").read_text())
    assert config["trainer"]["default_root_dir"] == str(training.folder / "run")
    names = [c["class_path"].split(".")[-1] for c in config["trainer"]["callbacks"]]
    assert names == ["PerImageResults", "StartWeights"]
    assert salt_of(tmp_path).read_text() not in (training.folder / "config.yaml").read_text(), (
        "loggers upload this file"
    )
    assert training.config["trainer"]["callbacks"] is None, "the configuration of the training itself is not changed"
    assert not training.finished("test")
    finish(training)
    prepare(training, study, salt_of(tmp_path))
    assert training.finished("test"), "an existing status is kept"


def test_the_salt_is_drawn_once_and_readable_by_its_owner_only(tmp_path):
    salt = salt_of(tmp_path / "study").read_text()
    assert salt == salt_of(tmp_path / "study").read_text() != salt_of(tmp_path / "other").read_text()
    assert (tmp_path / "study/salt").stat().st_mode & 0o077 == 0


def test_rows_of_the_global_model_and_of_the_sites_own_models(study, tmp_path):
    training = trainings_of(study, tmp_path)[0]
    finish(training)
    shared = training.folder / "run/test_rows.npz"
    assert training.rows("test") == training.rows("test", own=True) == [shared]
    own = [training.folder / f"run/sites/{site}/test_rows.npz" for site in ("east", "west")]
    for file in own:
        file.parent.mkdir(parents=True)
        file.touch()
    assert training.rows("test") == [shared]
    assert training.rows("test", own=True) == own
    finish(training, models="own")
    assert training.rows("test") == own


WORK = """
import json, pathlib, sys, time
folder = pathlib.Path(sys.argv[3])
status = folder / "status.json"
print("mtmedformer: data.root: no such folder" if folder.name == "bad" else "at work", flush=True)
if folder.name == "slow":
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        (folder / "saved").touch()
        raise SystemExit(1)
if folder.name == "bad":
    raise SystemExit(2)
time.sleep(0.3)
settings = __import__("os").environ
(folder / "where").write_text(settings.get("CUDA_VISIBLE_DEVICES", "-") + settings.get("WANDB_RUN_GROUP", ""))
status.write_text(json.dumps({"code": "", "evaluated": {"test": {"models": "global"}}}))
"""


@pytest.fixture
def fake_work(monkeypatch, tmp_path):
    """Let a few lines stand for the training of a training."""
    script = tmp_path / "work.py"
    script.write_text(textwrap.dedent(WORK))
    real = child_runs.subprocess.Popen

    def popen(command, **settings):
        return real([sys.executable, str(script), *command[1:]], **settings)

    monkeypatch.setattr(child_runs.subprocess, "Popen", popen)


def waiting(folder: Path, *names):
    found = []
    for name in names:
        (folder / name).mkdir()
        found.append(Training("v", name, {"trainer": {"max_epochs": 1}}, name, folder / name))
    return found


def run(waiting, jobs, console, **settings):
    return runner.run_trainings(waiting, jobs, "test", console, **settings)


def test_a_failed_training_stops_no_other_and_its_error_is_printed(tmp_path, fake_work):
    console = Console(file=io.StringIO(), width=300)
    found = waiting(tmp_path, "one", "bad", "two")
    failed = run(found, 2, console, gpus=2, environment=lambda training: {"WANDB_RUN_GROUP": " study"})
    assert [training.run for training in failed] == ["bad"]
    assert found[0].finished("test")
    assert found[2].finished("test")
    assert {(tmp_path / name / "where").read_text() for name in ("one", "two")} <= {"0 study", "1 study"}
    printed = console.file.getvalue()
    assert "mtmedformer: data.root: no such folder" in printed
    assert "3/3" in printed


def test_trainings_save_after_ctrl_c(tmp_path, fake_work):
    (slow,) = waiting(tmp_path, "slow")

    def press():
        deadline = time.monotonic() + 20
        while not (slow.folder / "log.txt").is_file() or b"at work" not in (slow.folder / "log.txt").read_bytes():
            if time.monotonic() > deadline:
                return
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run([slow], 1, Console(file=io.StringIO()))
    assert (slow.folder / "saved").exists()
    assert time.monotonic() - began < 30
