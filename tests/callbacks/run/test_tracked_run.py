"""A federation logged in MLflow (a local file store) and TensorBoard: everything that W&B gets is read back."""

import json
from pathlib import Path

import pytest

from callbacks.run.mlflow_logger import mlflow_name
from callbacks.run.tracked_run import mlflow_identity
from mtmedformer.commands.main import main
from tests.fixtures.small_set import small_config, write_config, write_small_set

MLFLOW, BOARD = "lightning.pytorch.loggers.MLFlowLogger", "lightning.pytorch.loggers.TensorBoardLogger"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small federation, trained for a round and resumed for another."""
    pytest.importorskip("mlflow", reason="pip install mlflow-skinny")
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    root = tmp_path_factory.mktemp("tracked")
    config = small_config(write_small_set(root / "set"), root, max_epochs=1)
    data = {"class_path": "federation.FederatedDataModule", "init_args": {"data": config["data"], "by": "site"}}
    config |= {"data": data, "federation": {"class_path": "callbacks.Federation", "init_args": {"align": False}}}
    store = {"experiment_name": "study", "tracking_uri": f"file:{root / 'mlruns'}"}
    board = {"save_dir": str(root / "board"), "name": "study", "version": "one"}
    config["trainer"]["logger"] = [
        {"class_path": MLFLOW, "init_args": store},
        {"class_path": BOARD, "init_args": board},
    ]
    assert main(["fit", "--config", write_config(config, root / "c.yaml")]) == 0
    config["trainer"]["max_epochs"] = 2
    assert main(["fit", "--config", write_config(config, root / "c.yaml"), "--ckpt_path=last"]) == 0
    return root


def test_mlflow_gets_metrics_record_config_overlays_model_and_the_sites(folder):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"file:{folder / 'mlruns'}")
    experiment = client.get_experiment_by_name("study").experiment_id
    runs = {run.info.run_name: run for run in client.search_runs([experiment])}
    assert set(runs) == {"run", "north", "south"}, "a resumed training and its sites continue their runs"
    server = runs["run"]
    assert {"val/score", "val/organ/dice", "val/organ/dice.site.north"} <= set(server.data.metrics)
    assert server.data.tags["mtmedformer.note"] == "research use only"
    assert server.data.tags["mlflow.source.name"] == "mtmedformer fit"
    assert json.loads(server.data.tags["mtmedformer.code"])["version"]
    assert server.info.status == "FINISHED"
    files = {file.path for top in client.list_artifacts(server.info.run_id) for file in (
        client.list_artifacts(server.info.run_id, top.path) if top.is_dir else [top])}  # fmt: skip
    assert {"config.yaml", "record.json", "model/best.ckpt", "model/about.json", "overlays/epoch_001.png"} <= files
    for site in ("north", "south"):
        assert runs[site].data.tags["mlflow.parentRunId"] == server.info.run_id
        assert any(name.startswith("train/organ") for name in runs[site].data.metrics)
    written = "".join(f.read_text(errors="ignore") for f in (folder / "mlruns").rglob("*") if f.suffix != ".ckpt"
                      and f.is_file())  # fmt: skip
    assert "secret-patient" not in written


def test_tensorboard_gets_the_record_overlays_and_the_sites(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "board/study/one"))
    events.Reload()
    tags = events.Tags()
    assert "overlays" in tags["images"]
    assert {"record/text_summary", "best_checkpoint/text_summary"} <= set(tags["tensors"])
    assert b"research use only" in events.Tensors("record/text_summary")[0].tensor_proto.string_val[0]
    for site in ("north", "south"):
        of_site = EventAccumulator(str(folder / "board/study/one/sites" / site))
        of_site.Reload()
        assert any(name.startswith("train/organ") for name in of_site.Tags()["scalars"])


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("val/score", "val/score"),
        ("val/organ/dice", "val/organ/dice"),
        ("val/organ/dice/left lung", "val/organ/dice.left lung"),
        ("val/organ/dice/site=north", "val/organ/dice.site.north"),
        ("val/finding/auroc/GGO+", "val/finding/auroc.GGO_"),
    ],
)
def test_no_metric_is_a_folder_of_another_one(name, stored):
    assert mlflow_name(name) == stored


def test_configured_values_of_mlflow_are_kept():
    assert mlflow_identity({}, Path("runs/quickstart-2"), None) == {"run_name": "quickstart-2"}
    assert mlflow_identity({"run_name": "mine", "run_id": None}, Path("runs/x"), None) == {}
