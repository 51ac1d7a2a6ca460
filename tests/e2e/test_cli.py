"""The command line as a user calls it, in this process, on a small set."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import mtmedformer
from mtmedformer.commands.main import COMMANDS, main
from tests.fixtures.small_set import small_config, write_config


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """A finished run: its folder and the configuration file it came from."""
    runs = tmp_path_factory.mktemp("runs")
    config = write_config(small_config(images, runs, max_epochs=3), runs / "config.yaml")
    assert main(["fit", "--config", config]) == 0
    return runs / "run", config


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def weights_of(file: Path) -> dict[str, torch.Tensor]:
    return torch.load(file, weights_only=True)["state_dict"]


def test_fit_writes_all_files_of_a_run_folder(trained, capsys):
    folder, _ = trained
    for name in ("config.yaml", "metrics.csv", "quarantine.csv", "checkpoints/best.ckpt", "checkpoints/last.ckpt"):
        assert (folder / name).is_file(), name
    assert len(list((folder / "overlays").glob("*.png"))) == 1
    logged = set().union(*(row.keys() for row in rows_of(folder / "metrics.csv")))
    assert {
        "val/score",
        "val/health/auroc",
        "val/nodules/map50",
        "val/organ/dice",
        "train/organ/loss",
        "loss_weight/organ",
    } <= logged
    assert yaml.safe_load((folder / "config.yaml").read_text())["optimizer"]["init_args"]["lr"] == 0.002
    stored = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    assert "WandbRecord" not in stored["callbacks"], "there is no W&B logger"


def test_no_patient_id_is_in_the_run_folder(trained):
    folder, _ = trained
    for file in folder.rglob("*"):
        if file.is_file():
            assert b"secret-patient" not in file.read_bytes(), file


def test_a_checkpoint_alone_is_enough_to_test(trained, capsys):
    folder, _ = trained
    before = (folder / "config.yaml").read_text()
    assert (
        main(["test", "--ckpt_path", str(folder / "checkpoints/best.ckpt"), "--trainer.enable_progress_bar=false"]) == 0
    )
    report = json.loads((folder / "test_metrics.json").read_text())
    for key in ("auroc", "auroc_ci_low", "auroc_ci_high"):
        assert f"test/health/{key}" in report
    assert {"test/organ/dice", "test/organ/dice/site=north", "test/organ/dice/site=south"} <= set(report)
    assert 0 <= report["test/organ/dice_ci_low"] <= report["test/organ/dice"] <= report["test/organ/dice_ci_high"] <= 1
    assert not any(
        "nodules" in k and "site=south" in k and v is not None and "n_images" not in k for k, v in report.items()
    )
    assert "95 % interval" in capsys.readouterr().out
    assert (folder / "config.yaml").read_text() == before


def test_validate_prints_the_table(trained, capsys):
    folder, _ = trained
    checkpoint = str(folder / "checkpoints/best.ckpt")
    assert main(["validate", "--ckpt_path", checkpoint, "--trainer.enable_progress_bar=false"]) == 0
    out = capsys.readouterr().out
    for word in ("Validation", "health", "nodules", "organ", "dice", "score"):
        assert word in out


def test_fingerprint_reads_the_same_configuration(trained, tmp_path, capsys):
    _, config = trained
    assert main(["fingerprint", "--config", config, "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "fingerprint.json").read_text())
    assert (tmp_path / "fingerprint.png").is_file()
    text = json.dumps(found)
    assert "north" in text
    assert "secret-patient" not in text
    assert "nodules" in capsys.readouterr().out


def test_predictions_are_in_the_pixels_of_the_original_images(trained):
    folder, _ = trained
    arguments = ["--ckpt_path", str(folder / "checkpoints/best.ckpt"), "--trainer.enable_progress_bar=false"]
    assert main(["predict", *arguments, "--data.image_size=[48,64]"]) == 0
    rows = rows_of(folder / "predictions/predictions.csv")
    masks = list((folder / "predictions/masks/organ").glob("*.png"))
    assert len(rows) == len(masks) > 0
    assert all(abs(float(r["health:well"]) + float(r["health:sick"]) - 1) < 2e-4 for r in rows)
    assert np.asarray(Image.open(masks[0])).shape == (64, 64)
    for box in json.loads((folder / "predictions/boxes.json").read_text())["annotations"]:
        x, y, w, h = box["bbox"]
        assert 0 <= x <= x + w <= 64
        assert 0 <= y <= y + h <= 64


def test_a_second_run_has_its_own_folder(images, tmp_path):
    config = write_config(small_config(images, tmp_path, max_epochs=1), tmp_path / "c.yaml")
    assert main(["fit", "--config", config]) == 0
    first = (tmp_path / "run/checkpoints/last.ckpt").read_bytes()
    assert main(["fit", "--config", config]) == 0
    assert (tmp_path / "run/checkpoints/last.ckpt").read_bytes() == first
    assert (
        weights_of(tmp_path / "run-2/checkpoints/last.ckpt").keys()
        == weights_of(tmp_path / "run/checkpoints/last.ckpt").keys()
    )
    for name, value in weights_of(tmp_path / "run-2/checkpoints/last.ckpt").items():
        assert torch.equal(value, weights_of(tmp_path / "run/checkpoints/last.ckpt")[name]), "same seed, same weights"


@pytest.mark.parametrize(("epoch", "batch"), [(0, 1), (1, 2)])
def test_a_run_resumed_after_ctrl_c_equals_an_uninterrupted_one(images, tmp_path, epoch, batch):
    config = small_config(images, tmp_path, max_epochs=2)
    whole = write_config(config, tmp_path / "whole.yaml")
    assert main(["fit", "--config", whole]) == 0
    config["trainer"]["default_root_dir"] = str(tmp_path / "broken")
    file = write_config(config, tmp_path / "broken.yaml")
    callback = f"{{class_path: tests.fixtures.stopping.StopAt, init_args: {{epoch: {epoch}, batch: {batch}}}}}"
    assert main(["fit", "--config", file, f"--trainer.callbacks=[{callback}]"]) == 130
    assert main(["fit", "--config", file, "--ckpt_path=last"]) == 0
    expected, resumed = (weights_of(tmp_path / run / "checkpoints/last.ckpt") for run in ("run", "broken"))
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    assert not (tmp_path / "broken-2").exists()
    losses = [r["train/loss_epoch"] for r in rows_of(tmp_path / "broken/metrics.csv") if r["train/loss_epoch"]]
    assert len(losses) == 2


def test_the_command_line_overrides_the_checkpoint(trained, tmp_path):
    folder, config = trained
    last = str(folder / "checkpoints/last.ckpt")
    assert (
        main(
            [
                "test",
                "--config",
                config,
                "--ckpt_path",
                last,
                "--model.heads.nodules.init_args.score_threshold=0.9",
                f"--trainer.default_root_dir={tmp_path}",
            ]
        )
        == 0
    )
    saved = yaml.safe_load((tmp_path / "config_test.yaml").read_text())
    assert saved["model"]["init_args"]["heads"]["nodules"]["init_args"]["score_threshold"] == 0.9


def test_a_model_is_tested_on_data_with_some_of_its_tasks(trained, tmp_path, caplog):
    folder, config = trained
    found = {}
    for name, arguments in {"all": [], "some": ["--data.tasks=[organ]"]}.items():
        where = f"--trainer.default_root_dir={tmp_path / name}"
        best = str(folder / "checkpoints/best.ckpt")
        assert main(["test", "--config", config, "--ckpt_path", best, where, *arguments]) == 0
        found[name] = json.loads((tmp_path / name / "test_metrics.json").read_text())
        assert ("Not evaluated, because the data have no labels for it: health, nodules" in caplog.text) == bool(
            arguments
        )
    assert found["some"]["test/organ/dice"] == found["all"]["test/organ/dice"]
    evaluated = {key.split("/")[1] for key, value in found["some"].items() if value is not None and "/n_" not in key}
    assert evaluated - {"score", "loss"} == {"organ"}


def test_a_head_cannot_be_trained_on_data_without_its_task(trained, capsys):
    _, config = trained
    assert main(["fit", "--config", config, "--data.tasks=[organ]"]) == 2
    assert "the data set has no task of this name; it has organ" in " ".join(capsys.readouterr().err.split())


def test_another_learning_rate_on_resume_is_an_error(trained, capsys):
    folder, config = trained
    arguments = ["--ckpt_path", str(folder / "checkpoints/last.ckpt"), "--trainer.max_epochs=4", "--optimizer.lr=0.5"]
    assert main(["fit", "--config", config, *arguments]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "optimizer.lr=0.5" in message
    assert "0.002" in message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model.encoder.name=pvt_v2_b9"], ["pvt_v2_b9", "pvt_v2_b5"]),
        (["--model.heads.organ.init_args.classes=[liver]"], ["liver", "organ"]),
        (["--model.tasks=[lungs]"], ["lungs", "health, nodules, organ"]),
        (["--model.loss=HybridLoss", "--model.loss.weights.bones=2"], ["bones", "organ"]),
        (["--trainer.max_epocs=3"], ["max_epocs", "max_epochs"]),
        (["--data.image_sise=3"], ["image_sise", "image_size"]),
        (["--ckpt_path=runs/none.ckpt"], ["runs/none.ckpt", "no such file"]),
        (["--data.root=/nowhere"], ["/nowhere"]),
    ],
)
def test_mistakes_are_reported_in_one_paragraph(trained, capsys, arguments, words):
    _, config = trained
    assert main(["fit", "--config", config, *arguments]) == 2
    message = " ".join(capsys.readouterr().err.split())
    for word in words:
        assert word in message
    assert "Traceback" not in message
    assert len(message) < 1500


def tree(*folders: Path) -> dict[Path, bytes | None]:
    """Return every file below some folders with its bytes, and every folder."""
    return {p: p.read_bytes() if p.is_file() else None for folder in folders for p in folder.rglob("*")}


CLASSES = "--model.heads.organ.init_args.classes=[liver]"


@pytest.mark.parametrize(
    "arguments",
    [
        ["fit", CLASSES],
        ["fit", "--data.tasks=[organ]"],
        ["fit", "--data.root=/nowhere"],
        ["fit", "--trainer.max_epocs=3"],
        ["fit", "--seed_everything=-5"],
        ["fit", "--trainer.barebones=true"],
        ["fit", "--trainer.precision=16-true"],
        ["fit", "--trainer.devices=2", "--trainer.strategy=ddp_spawn"],
        ["fit", "--trainer.callbacks+=LearningRateMonitor", "--trainer.logger=false"],
        ["fit", "--trainer.logger=WandbLogger", "--trainer.logger.project=a/b"],
        ["fit", "--trainer.logger=WandbLogger", "--trainer.logger.offline=true", "--trainer.logger.log_model=all"],
        ["fit", "--optimizer.lr=-1"],
        ["fit", "--optimizer=LBFGS", "--model.layer_decay=0.5"],
        ["fit", "--lr_scheduler=OneCycleLR", "--lr_scheduler.max_lr=0.01"],
        ["fit", "--ckpt_path=last"],
        ["fit", "--ckpt_path="],
        ["fit", "--ckpt_path=BEST", "--model.encoder.channels=8"],
        ["fit", "--ckpt_path=BEST", "--optimizer.lr=0.5"],
        ["fit", "--ckpt_path=ALONE", "--optimizer.lr=0.5"],
        ["fit", "--ckpt_path=ALONE", "--optimizer.weight_decay=0.3"],
        ["fit", "--ckpt_path=ALONE", "--model.layer_decay=0.5"],
        ["fit", "--trainer.logger=lightning.pytorch.loggers.WandbLogger", CLASSES],
        ["fit", "--trainer.callbacks+=StartWeights", "--data.root=/nowhere"],
        ["test", "--ckpt_path=BEST", "--data.root=/nowhere"],
        ["test"],
        ["test", "--ckpt_path=moved.ckpt"],
        ["validate", "--ckpt_path="],
        ["test", "--ckpt_path=BEST", CLASSES],
        ["predict", "--ckpt_path=BEST", "--data.root=/nowhere"],
        ["predict", "--ckpt_path=BEST", CLASSES],
        ["predict", "--ckpt_path=BEST", "--images", "nothing.png", "--output", "predicted"],
    ],
    ids=lambda a: " ".join(a),
)
def test_a_command_that_fails_at_the_start_changes_nothing_on_disk(arguments, trained, tmp_path, monkeypatch, capsys):
    folder, config = trained
    monkeypatch.chdir(tmp_path)
    best, alone = folder / "checkpoints/best.ckpt", tmp_path / "alone.ckpt"
    shutil.copy(best, alone)  # without config.yaml beside it
    arguments = [a.replace("BEST", str(best)).replace("ALONE", str(alone)) for a in arguments]
    if "--images" not in arguments:
        settings = ["--config", config, "--data.cache_dir=cache", "--trainer.default_root_dir=runs/new"]
        arguments = [arguments[0], *settings, *arguments[1:]]
    before = tree(folder.parent, tmp_path)
    assert main(arguments) == 2
    assert tree(folder.parent, tmp_path) == before
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [
        "--model.heads.lungs.init_args.classes=[liver]",
        "--federation.participation=[[nobody]]",
        "--trainer.gradient_clip_val=1",
        "--trainer.max_epochs=-1",
        "--federation.site_trainer.max_epochs=0",
    ],
)
def test_a_federation_that_fails_at_the_start_changes_nothing_on_disk(wrong, tmp_path, monkeypatch):
    quickstart = str(Path("configs/federation/quickstart.yaml").resolve())
    monkeypatch.chdir(tmp_path)
    data = ["--data.data.size=64", "--data.data.image_size=64", "--data.data.num_workers=0"]
    assert main(["fit", "--config", quickstart, *data, *wrong.split()]) == 2
    assert not tree(tmp_path), "no run folder, no cache, no generated phantom"


@pytest.mark.parametrize("cut", ["partition: {class_path: federation.EqualShares, init_args: {sites: 2}}", "by: site"])
def test_an_unknown_site_is_refused_before_anything_is_cached(cut, images, tmp_path, monkeypatch, capsys):
    config = small_config(images, tmp_path, max_epochs=1)
    config["data"] = {
        "class_path": "federation.FederatedDataModule",
        "init_args": {"data": config["data"], **yaml.safe_load(cut)},
    }
    config["federation"] = {"class_path": "callbacks.Federation", "init_args": {"participation": [["nobody"]]}}
    (tmp_path / "work").mkdir()
    file = write_config(config, tmp_path / "c.yaml")
    monkeypatch.chdir(tmp_path / "work")
    before = tree(tmp_path)
    assert main(["fit", "--config", file]) == 2
    assert "no site is called nobody" in capsys.readouterr().err
    assert tree(tmp_path) == before


def test_resuming_with_another_configuration_leaves_the_run_as_it_is(images, tmp_path, capsys):
    config = small_config(images, tmp_path, max_epochs=1, limit_train_batches=2)
    file = write_config(config, tmp_path / "c.yaml")
    assert main(["fit", "--config", file]) == 0
    run, other = tmp_path / "run", tmp_path / "other"
    best = f"--ckpt_path={run / 'checkpoints/best.ckpt'}"
    more = ["--config", file, "--trainer.max_epochs=2"]
    before = tree(run)

    assert main(["fit", *more, "--ckpt_path=last", "--data.val_fraction=0.3"]) == 2
    assert "data.val_fraction=0.3, but the run was trained with 0.15" in " ".join(capsys.readouterr().err.split())
    assert main(["fit", *more, best, "--data.val_fraction=0.3", f"--trainer.default_root_dir={other}"]) == 0
    assert main(["fit", *more, best, f"--trainer.default_root_dir={other}"]) == 0
    assert tree(run) == before
    assert not (tmp_path / "run-2").exists()
    for folder in (other, tmp_path / "other-2"):
        assert torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["epoch"] == 1
        assert yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["max_epochs"] == 2

    assert main(["fit", *more, best]) == 0, "the same configuration, for more epochs"
    assert not (tmp_path / "run-2").exists()
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["epoch"] == 1


@pytest.mark.parametrize(
    "argument, suggestion",
    [
        ("--data.limitt=3", "data: Option 'limitt' is not accepted; did you mean limit?"),
        ("--model.heads.organ.init_args.clases=[organ]", "did you mean classes?"),
        ("--model.encoder.nam=x", "did you mean name?"),
        ("--optimizer.lrr=3", "did you mean lr?"),
        ("--trainer.max_epocs=3", "did you mean trainer.max_epochs"),
    ],
)
def test_suggestions_are_options_of_the_configured_class(argument, suggestion, trained, capsys):
    _, config = trained
    assert main(["fit", "--config", config, argument]) == 2
    assert suggestion in " ".join(capsys.readouterr().err.split())


def test_an_option_of_another_class_is_not_suggested(trained, capsys):
    _, config = trained
    assert main(["fit", "--config", config, "--model.encoder.batch_size=3"]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "Option 'batch_size' is not accepted" in message
    assert "did you mean" not in message


def test_a_checkpoint_that_would_run_code_is_refused(trained, tmp_path, capsys):
    _, config = trained
    import pickle

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "owned",))

    file = tmp_path / "evil.ckpt"
    torch.save({"state_dict": Evil()}, file, pickle_module=pickle)
    assert main(["test", "--config", config, "--ckpt_path", str(file)]) == 2
    assert not (tmp_path / "owned").exists()
    assert "evil.ckpt" in capsys.readouterr().err


def test_weights_to_start_from_are_reported(trained, tmp_path, capsys):
    folder, config = trained
    weights = folder / "checkpoints/best.ckpt"
    arguments = [f"--model.init_weights={weights}", f"--trainer.default_root_dir={tmp_path / 'run'}"]
    assert main(["fit", "--config", config, *arguments, "--trainer.max_epochs=1"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "best.ckpt: " in out
    assert "tensors filled" in out


def test_single_task_and_cnn_baselines_train_with_one_option(images, tmp_path):
    config = write_config(small_config(images, tmp_path, max_epochs=1), tmp_path / "c.yaml")
    assert main(["fit", "--config", config, "--model.tasks=[organ]"]) == 0
    assert not any(k.startswith("heads.nodules") for k in weights_of(tmp_path / "run/checkpoints/last.ckpt"))
    assert main(["fit", "--config", config, "--model.encoder.name=mtmedformer_tiny_cnn"]) == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["--trainer.precision=bf16-mixed"],
        ["--trainer.accumulate_grad_batches=2", "--trainer.gradient_clip_val=1.0"],
        ["--trainer.callbacks+=lightning.pytorch.callbacks.EMAWeightAveraging"],
        ["--model.loss=HybridLoss", "--model.loss.weighting=UncertaintyWeighting"],
        ["--model.loss=HybridLoss", "--model.loss.weighting=DynamicWeightAverage"],
        ["--model.loss=HybridLoss", "--model.loss.weighting=FAMOWeighting"],
        [
            "--model.loss=HybridLoss",
            "--model.loss.weighting=GradientAggregation",
            "--trainer.accumulate_grad_batches=2",
        ],
        ["--model.layer_decay=0.8", "--model.encoder.grad_checkpointing=true"],
        ["--data.sampler=sqrt"],
        ["--model.optimizer=SGD", "--model.optimizer.lr=0.01", "--model.lr_scheduler=WarmupCosine"],
        ["--model.compile=aot_eager", "--data.sampler=shuffle"],
    ],
)
def test_options_train(images, tmp_path, arguments):
    config = write_config(small_config(images, tmp_path, max_epochs=1, limit_train_batches=4), tmp_path / "c.yaml")
    assert main(["fit", "--config", config, *arguments]) == 0
    last = rows_of(tmp_path / "run/metrics.csv")
    assert any(float(r["train/loss_epoch"]) > -100 for r in last if r.get("train/loss_epoch"))


def test_wandb_gets_config_metrics_and_overlays(images, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    config = write_config(small_config(images, tmp_path, max_epochs=1), tmp_path / "c.yaml")
    logger = (
        f"{{class_path: lightning.pytorch.loggers.WandbLogger, init_args: {{project: test, save_dir: {tmp_path}}}}}"
    )
    assert main(["fit", "--config", config, f"--trainer.logger={logger}"]) == 0
    import wandb

    run = wandb.run
    assert run is not None
    assert run.config["optimizer"]["init_args"]["lr"] == 0.002
    assert run.summary["val/organ/dice"] >= 0
    assert any("overlays" in p.name for p in Path(run.dir).joinpath("media").rglob("*.png"))
    run.finish()
    assert (tmp_path / "run/metrics.csv").is_file(), "the CSV is written besides other loggers"


@pytest.mark.parametrize("arguments, code", [(["--help"], 0), (["--version"], 0), ([], 2), (["trian"], 2)])
def test_every_command_is_listed_without_importing_torch(arguments, code):
    script = (
        "import sys; from mtmedformer.commands.main import main; code = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules and 'lightning' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    text = done.stdout if code == 0 else done.stderr
    if arguments == ["--version"]:
        assert mtmedformer.__version__ in text
        return
    assert all(name in text for name in COMMANDS)
    if arguments == ["trian"]:
        assert "'trian'" in text


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_its_own_help(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    assert f"mtmedformer {name}" in capsys.readouterr().out.replace("[options] ", "")


def test_python_m_runs_the_command_line():
    done = subprocess.run([sys.executable, "-m", "mtmedformer", "--help"], capture_output=True, text=True, check=True)
    assert "fit" in done.stdout


class Worse(L.Callback):
    """Makes every epoch but the first worse than the first."""

    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module._log_metrics = lambda split, metrics: pl_module.log("val/score", 1.0 - trainer.current_epoch)


def test_the_last_checkpoint_is_of_the_last_epoch(images, tmp_path):
    config = write_config(small_config(images, tmp_path, max_epochs=3, limit_train_batches=2), tmp_path / "c.yaml")
    sys.modules["test_cli"] = sys.modules[__name__]
    assert main(["fit", "--config", config, "--trainer.callbacks+=test_cli.Worse"]) == 0
    epochs = {
        name: torch.load(tmp_path / f"run/checkpoints/{name}.ckpt", weights_only=True)["epoch"]
        for name in ("best", "last")
    }
    assert epochs == {"best": 0, "last": 2}
