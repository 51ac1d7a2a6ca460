"""The record of a run in W&B, offline, and other loggers in its place."""

import csv
import importlib.util
import json
import subprocess
from pathlib import Path

import pytest
import torch

from callbacks.run.data_identity import data_identity
from callbacks.run.wandb_run import code_version, run_identity
from datamodules import LabelsCSVDataModule
from mtmedformer.commands.main import main
from tests.fixtures.small_set import small_config, write_config, write_small_set

WANDB = "lightning.pytorch.loggers.WandbLogger"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_small_set(tmp_path_factory.mktemp("set"))


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    wandb.teardown()  # it has read the environment of whatever ran before
    yield
    if wandb.run is not None:
        wandb.run.finish()


@pytest.fixture
def artifacts(monkeypatch):
    """The artifacts that runs have logged: name, aliases, metadata, files."""
    from wandb.sdk.wandb_run import Run

    seen, log = [], Run.log_artifact

    def watched(self, artifact, aliases=None, **options):
        entries = artifact.manifest.entries
        seen.append((artifact.name, aliases, dict(artifact.metadata), {k: e.size for k, e in entries.items()}))
        return log(self, artifact, aliases=aliases, **options)

    monkeypatch.setattr(Run, "log_artifact", watched)
    return seen


def config_of(images, folder, **logger):
    config = small_config(images, folder, max_epochs=1)
    config["trainer"]["logger"] = {"class_path": WANDB, "init_args": {"project": "t", **logger}}
    return config


def fit(config, folder, *more):
    assert main(["fit", "--config", write_config(config, folder / "c.yaml"), *more]) == 0


def test_a_run_has_name_tags_record_and_artifact_and_is_continued_on_resume(images, tmp_path, artifacts):
    import wandb

    config = config_of(images, tmp_path)
    fit(config, tmp_path)
    run = wandb.run
    assert (run.name, run.group, run.job_type) == ("run", "run", "fit")
    assert {"mtmedformer_tiny", "LabelsCSV", "health", "nodules", "organ"} <= set(run.tags)
    record = run.config["record"]
    assert record["note"] == "research use only"
    assert record["code"]["version"]
    assert record["data"]["images"]["train"] > record["data"]["patients"]["train"] > 1
    assert set(record["data"]["labelled"]["train"]) == {"health", "nodules", "organ"}
    assert "secret-patient" not in json.dumps(dict(run.config))
    best = tmp_path / "run/checkpoints/best.ckpt"
    ((name, aliases, facts, files),) = artifacts
    assert (name.split(":")[0], aliases) == (f"model-{run.id}", ["best"])
    assert files == {"best.ckpt": best.stat().st_size}
    assert facts["monitor"] == "val/score"
    assert facts["score"] == pytest.approx(run.summary["val/score"])
    kept = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["callbacks"]["WandbRecord"]
    assert kept == {"run": run.id}
    before = run.id
    run.finish()

    config["trainer"]["max_epochs"] = 2
    fit(config, tmp_path, "--ckpt_path=last")
    assert wandb.run.id == before, "a resumed training continues its run"
    wandb.run.finish()

    config["trainer"]["max_epochs"] = 1
    fit(config, tmp_path)
    assert wandb.run.id != before
    assert (wandb.run.name, wandb.run.group) == ("run-2", "run"), "runs of one configuration lie together"


def test_configured_values_are_kept(images, tmp_path, artifacts):
    import wandb

    configured = {"name": "mine", "id": "abc", "group": "study", "tags": ["pilot"], "job_type": "x", "log_model": True}
    fit(config_of(images, tmp_path, **configured), tmp_path)
    run = wandb.run
    assert (run.id, run.name, run.group, run.job_type) == ("abc", "mine", "study", "x")
    assert {"pilot", "mtmedformer_tiny"} <= set(run.tags)
    assert all(aliases != ["best"] for _, aliases, _, _ in artifacts), "Lightning logs the checkpoints itself"


@pytest.mark.parametrize(
    "variable, open_still",
    [
        (None, set()),
        ("WANDB_RUN_GROUP", {"group"}),
        ("WANDB_NAME", {"name"}),
        ("WANDB_JOB_TYPE", {"job_type"}),
        ("WANDB_RUN_ID", {"id", "name", "group"}),
        ("WANDB_SWEEP_ID", {"id", "name", "group"}),
    ],
)
def test_values_of_the_environment_and_a_sweep_are_kept(variable, open_still, monkeypatch):
    if variable:
        monkeypatch.setenv(variable, "x")
    values = run_identity({"id": None}, Path("runs/quickstart-12"), "fit", None, rounds=False)
    assert {"id", "name", "group", "job_type"} - values.keys() == open_still
    if not variable:
        assert (values["name"], values["group"], values["job_type"]) == ("quickstart-12", "quickstart", "fit")


def test_the_runs_of_a_federation_are_in_one_group(images, tmp_path, artifacts, monkeypatch):
    import wandb

    started, init = [], wandb.init

    def watched(*args, **kwargs):
        run = init(*args, **kwargs)
        started.append((run.name, run.group, run.job_type))
        return run

    monkeypatch.setattr(wandb, "init", watched)
    config = config_of(images, tmp_path)
    config["data"]["init_args"] |= {"val_fraction": 0.25, "test_fraction": 0.25}
    data = {"class_path": "federation.FederatedDataModule", "init_args": {"data": config["data"], "by": "site"}}
    config |= {"data": data, "federation": {"class_path": "callbacks.Federation"}}
    fit(config, tmp_path)
    server = wandb.run
    assert started == [
        ("run", server.id, "server"),
        ("north", server.id, "site"),
        ("south", server.id, "site"),
    ]
    assert "federated" in server.tags
    assert "LabelsCSV" in server.tags
    sites = server.config["record"]["data"]["sites"]
    assert set(sites) == {"north", "south"}
    assert sites["north"]["digest"] != sites["south"]["digest"]
    assert len(artifacts) == 1, "the sites' trainings have no artifact of their own"


@pytest.mark.parametrize("logger", ["CSVLogger", "TensorBoardLogger"])
def test_other_loggers_get_config_and_metrics(images, tmp_path, logger):
    if logger == "TensorBoardLogger":
        pytest.importorskip("tensorboard", reason="pip install tensorboard")
    config = config_of(images, tmp_path)
    arguments = {"save_dir": str(tmp_path / "logs"), "name": "x", "version": "one"}
    config["trainer"]["logger"] = {"class_path": f"lightning.pytorch.loggers.{logger}", "init_args": arguments}
    fit(config, tmp_path)
    folder = tmp_path / "logs/x/one"
    if logger == "CSVLogger":
        with (folder / "metrics.csv").open(newline="") as lines:
            assert any(row["val/score"] for row in csv.DictReader(lines))
        return
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    assert {"val/score", "val/organ/dice", "train/organ/loss"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"], "overlays"
    assert (folder / "hparams.yaml").is_file()
    assert (tmp_path / "run/metrics.csv").is_file()


def data_of(images, **changes):
    section = small_config(images, images)["data"]["init_args"] | {"cache_dir": None, "image_size": 32} | changes
    from jsonargparse import ArgumentParser

    from datamodules.labels_csv.columns import ClassColumns  # noqa: F401  the table's columns, built by jsonargparse

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(LabelsCSVDataModule, "data")
    made = parser.instantiate(parser.parse_object({"data": section})).data
    made.setup("fit")
    return made


def test_the_digest_changes_with_the_data_only(images, tmp_path):
    first = data_identity(data_of(images))
    assert first == data_identity(data_of(images, num_workers=0, batch_size=2))
    moved = write_small_set(tmp_path / "elsewhere")
    assert data_identity(data_of(moved)) == first
    assert data_identity(data_of(images, seed=1))["digest"] != first["digest"], "another split"
    table = moved / "labels.csv"
    text = table.read_text()
    assert ",well," in text
    table.write_text(text.replace(",well,", ",sick,", 1))
    changed = data_identity(data_of(moved))
    assert changed["digest"] != first["digest"], "a corrected class"
    picture = next(iter((moved / "images").glob("*.png")))
    table.write_text(text)
    picture.write_bytes((moved / "images/im001.png").read_bytes())
    assert data_identity(data_of(moved))["digest"] != first["digest"], "another image"
    assert "secret" not in json.dumps(first)
    assert "im0" not in json.dumps(first)


def test_other_data_modules_are_recorded_by_name_only():
    import lightning as L

    assert data_identity(L.LightningDataModule()) == {"dataset": "LightningDataModule"}
    assert data_identity(None) == {"dataset": "NoneType"}


def test_the_code_version_is_the_commit_of_this_code(tmp_path, monkeypatch):
    import callbacks.run.wandb_run as record

    home = Path(record.__file__).resolve().parents[2]
    head = subprocess.run(["git", "-C", str(home), "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        pytest.skip("not a checkout")
    assert code_version()["commit"] == head.stdout.strip()
    assert isinstance(code_version()["changed"], bool)
    (tmp_path / "mtmedformer").mkdir()
    (tmp_path / "mtmedformer/__init__.py").touch()
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.setattr(record.mtmedformer, "__file__", str(tmp_path / "mtmedformer/__init__.py"))
    assert set(code_version()) == {"version"}, "somebody else's repository around an installation"
    monkeypatch.setenv("PATH", "")
    assert set(code_version()) == {"version"}


def test_a_logger_whose_package_is_missing_is_reported_in_a_sentence(images, tmp_path, capsys):
    if importlib.util.find_spec("tensorboard") or importlib.util.find_spec("tensorboardX"):
        pytest.skip("TensorBoard is installed")
    config = config_of(images, tmp_path)
    arguments = {"save_dir": str(tmp_path)}
    config["trainer"]["logger"] = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": arguments}
    assert main(["fit", "--config", write_config(config, tmp_path / "c.yaml")]) == 2
    message = capsys.readouterr().err
    assert "pip install" in message
    assert "Traceback" not in message
