"""The matrix of docs/training_options.md: each option trains right, or is refused in one sentence with exit code 2."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.plugins import HalfPrecision

from mtmedformer.commands.main import main
from tests.fixtures.small_set import small_config, write_config, write_small_set
from tests.mtmedformer.test_module import batch

PAGE = Path(__file__).resolve().parents[2] / "docs/training_options.md"
NEVER = "--trainer.callbacks.patience=0 --trainer.callbacks.mode=min --trainer.callbacks.monitor=val/score"

ROUNDS = "--federation=callbacks.Federation"

TRAINS = {  # options of one row of the page, and the arguments of a run that has all of them
    "true precision": ("trainer.precision bf16-true", "--trainer.precision=bf16-true"),
    "mixed precision": ("bf16-mixed", "--trainer.precision=bf16-mixed"),
    "double precision": ("64-true", "--trainer.precision=64-true"),
    "no end, by time": (
        "trainer.max_time trainer.max_epochs=-1",
        "--trainer.max_epochs=-1 --trainer.max_time=00:00:00:01",
    ),
    "no end, by metric": ("EarlyStopping", f"--trainer.max_epochs=-1 --trainer.callbacks+=EarlyStopping {NEVER}"),
    "by steps": (
        "32-true trainer.max_steps Timer WarmupCosine",
        "--trainer.precision=32-true --trainer.max_epochs=-1 --trainer.max_steps=2 --lr_scheduler=WarmupCosine "
        "--trainer.callbacks+=Timer "
        "--trainer.callbacks.duration=00:01:00:00",
    ),
    "debugging": (
        "trainer.profiler simple trainer.detect_anomaly deterministic benchmark inference_mode num_sanity_val_steps",
        "--trainer.profiler=simple --trainer.detect_anomaly=true --trainer.deterministic=true --trainer.benchmark=true "
        "--trainer.inference_mode=false --trainer.num_sanity_val_steps=2",
    ),
    "little": (
        "trainer.enable_checkpointing=false limit_train_batches limit_val_batches advanced",
        "--trainer.logger=false --trainer.profiler=advanced --trainer.limit_val_batches=0 "
        "--trainer.limit_train_batches=0.5 --trainer.enable_checkpointing=false",
    ),
    "data": (
        "trainer.overfit_batches trainer.reload_dataloaders_every_n_epochs trainer.check_val_every_n_epoch "
        "WeightAveraging trainer.max_epochs",
        "--trainer.overfit_batches=1 --trainer.reload_dataloaders_every_n_epochs=1 --trainer.max_epochs=2 "
        "--trainer.check_val_every_n_epoch=2 --trainer.callbacks+=WeightAveraging",
    ),
    "steps": (
        "trainer.val_check_interval gradient_clip_val gradient_clip_algorithm trainer.accumulate_grad_batches pytorch",
        "--trainer.val_check_interval=0.5 --trainer.gradient_clip_val=1 --trainer.gradient_clip_algorithm=value "
        "--trainer.accumulate_grad_batches=2 --trainer.profiler=pytorch",
    ),
    "several loggers": (
        "trainer.logger",
        "--trainer.logger+=CSVLogger --trainer.logger.save_dir=logs --trainer.logger+=TensorBoardLogger "
        "--trainer.logger.save_dir=logs --trainer.callbacks+=LearningRateMonitor",
    ),
    "torch's plateau": (
        "lr_scheduler ReduceLROnPlateau",
        "--lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau --model.lr_monitor=val/score",
    ),
    "per step": (
        "model.lr_interval step torch.optim.lr_scheduler",
        "--lr_scheduler=StepLR --lr_scheduler.step_size=1 --model.lr_interval=step",
    ),
    "per epoch": (
        "epoch",
        "--lr_scheduler=CyclicLR --lr_scheduler.base_lr=0.001 --lr_scheduler.max_lr=0.01 --model.lr_interval=epoch",
    ),
}

REFUSED = [  # options of the page, arguments, words of the sentence
    ("trainer.precision=16-true", "--trainer.precision=16-true", "underflows"),
    ("trainer.precision=transformer-engine", "--trainer.precision=transformer-engine", "not supported"),
    ("trainer.precision bf16-true federation", f"{ROUNDS} --trainer.precision=bf16-true", "updates of sites"),
    ("64-true", f"{ROUNDS} --trainer.precision=64-true", "updates of sites"),
    ("trainer.barebones", "--trainer.barebones=true", "keeps nothing"),
    ("trainer.strategy ddp_spawn", "--trainer.devices=2 --trainer.strategy=ddp_spawn", "use ddp"),
    ("ddp_fork", "--trainer.devices=2 --trainer.strategy=ddp_fork", "use ddp"),
    ("ddp_notebook", "--trainer.devices=2 --trainer.strategy=ddp_notebook", "use ddp"),
    ("", "--trainer.strategy=DDPStrategy --trainer.strategy.start_method=spawn", "use ddp"),
    ("fsdp", "--trainer.strategy=fsdp", "use ddp"),
    ("deepspeed", "--trainer.strategy=deepspeed_stage_2", "use ddp"),
    ("model_parallel", "--trainer.strategy=model_parallel", "use ddp"),
    ("", "--trainer.strategy=ModelParallelStrategy", "use ddp"),
    ("xla", "--trainer.strategy=xla", "use ddp"),
    (
        "trainer.sync_batchnorm",
        "--trainer.strategy=ddp --trainer.sync_batchnorm=true --model.encoder.name=test_resnet",
        "between GPUs only",
    ),
    ("LearningRateFinder", "--trainer.callbacks+=LearningRateFinder", "sweep"),
    ("BatchSizeFinder", "--trainer.callbacks+=BatchSizeFinder", "data.batch_size"),
    ("BackboneFinetuning", "--trainer.callbacks+=BackboneFinetuning", "layer_decay"),
    ("trainer.profiler=xla", "--trainer.profiler=xla", "TPU"),
    ("trainer.limit_train_batches=0", "--trainer.limit_train_batches=0", "nothing would be trained"),
    ("", "--trainer.limit_train_batches=-1", "invalid value -1"),
    ("trainer.max_epochs=0", "--trainer.max_epochs=0", "nothing would be trained"),
    ("trainer.max_steps=0", "--trainer.max_steps=0", "nothing would be trained"),
    ("trainer.accumulate_grad_batches", "--trainer.accumulate_grad_batches=0", "at least 1"),
    ("trainer.gradient_clip_val", "--trainer.gradient_clip_val=-1", "norm above 0"),
    ("check_val_every_n_epoch", "--trainer.check_val_every_n_epoch=0", "at least 1"),
    ("log_every_n_steps", "--trainer.log_every_n_steps=0", "at least 1"),
    ("trainer.val_check_interval", "--trainer.val_check_interval=0", "at least 1"),
    ("", "--trainer.val_check_interval=3", "an epoch has 2 batches"),
    ("seed_everything", "--seed_everything=99999999999", "whole number from 0"),
    ("optimizer SparseAdam", "--optimizer=SparseAdam", "sparse gradients"),
    (
        "lr_scheduler SequentialLR",
        "--lr_scheduler=SequentialLR --lr_scheduler.schedulers=[] --lr_scheduler.milestones=[]",
        "made of schedules",
    ),
    ("ChainedScheduler", "--lr_scheduler=ChainedScheduler --lr_scheduler.schedulers=[]", "made of schedules"),
    (
        "OneCycleLR",
        "--lr_scheduler=OneCycleLR --lr_scheduler.max_lr=0.01 --lr_scheduler.total_steps=1",
        "ends before the training",
    ),
    ("", "--lr_scheduler=StepLR --lr_scheduler.step_size=0", "StepLR fails with these arguments"),
    ("", "--lr_scheduler=CosineAnnealingLR --lr_scheduler.T_max=0", "CosineAnnealingLR fails with these arguments"),
    ("", "--lr_scheduler=LambdaLR --lr_scheduler.lr_lambda=math.sqrt", "LambdaLR fails with these arguments"),
    ("", "--lr_scheduler=LinearLR", "several classes are called LinearLR"),
    ("", "--optimizer.lr=nan", "nan"),
    ("", "--optimizer.lr=.nan", "Invalid learning rate"),
    ("", "--trainer.strategy=nonsense", "invalid strategy name"),
    ("", "--trainer.accelerator=nonsense", "invalid accelerator name"),
    ("", "--trainer.accelerator=tpu", "torch_xla"),
    ("", "--trainer.accelerator=cpu --trainer.devices=abc", "should be an int > 0"),
    ("", "--trainer.gradient_clip_val=1 --trainer.gradient_clip_algorithm=nonsense", "nonsense is invalid"),
    ("", "--trainer.callbacks+=EarlyStoping", "there is no class EarlyStoping"),
    ("", "--trainer.callbacks+=my.module.Callback", "there is no class my.module.Callback"),
    ("", "--model.lr_interval=batch", "lr_interval"),
]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A configuration file that trains two steps per epoch on eight images."""
    folder = tmp_path_factory.mktemp("options")
    images = write_small_set(folder / "set", patients=6, size=64)
    config = small_config(images, folder, max_epochs=1, limit_train_batches=2, limit_val_batches=1, logger=[])
    config["data"]["init_args"] |= {"batch_size": 2, "val_fraction": 0.2, "test_fraction": 0.0}
    return write_config(config, folder / "config.yaml")


def fit(config, folder, arguments):
    return main(["fit", "--config", config, f"--trainer.default_root_dir={folder}", *shlex.split(arguments)])


@pytest.mark.parametrize("name", TRAINS)
def test_an_option_trains(name, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fit(small, tmp_path / "run", TRAINS[name][1]) == 0
    if "enable_checkpointing=false" in TRAINS[name][1]:
        return
    stored = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert stored["global_step"] >= 1
    assert all(value.isfinite().all() for value in stored["state_dict"].values() if value.is_floating_point())


@pytest.mark.parametrize("arguments, words", [row[1:] for row in REFUSED])
def test_an_option_is_refused_in_one_sentence_and_nothing_is_written(
    arguments, words, small, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert fit(small, tmp_path / "run", arguments) == 2
    message = " ".join(capsys.readouterr().err.split("mtmedformer: ")[-1].split())
    assert words in message
    assert "Traceback" not in message
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("command", ["test", "validate", "predict"])
def test_an_untrained_model_is_not_applied(command, small, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([command, "--config", small]) == 2
    assert "the model is not trained" in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.rglob("*"))


def first_column(heading):
    """Return what is set as code in the first column of the table below a heading of the page."""
    table = PAGE.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| ")]
    return {code for row in rows for code in re.findall(r"`([^`]+)`", row)}


def test_the_page_and_the_matrix_have_the_same_options():
    elsewhere = {option: SCHEDULES[name] for option, name in RESUMED.items()} | dict.fromkeys(DISTRIBUTED, TWO)
    trained = [(words, arguments) for words, arguments in (*TRAINS.values(), *elsewhere.items())]
    refused = [(words, arguments) for words, arguments, _ in REFUSED]
    for words, arguments in (*trained, *refused):
        assert all(word.rpartition(".")[2] in arguments for word in words.split()), words
    assert first_column("What works") == {w for words, _ in trained for w in words.split()} | {"16-mixed"}
    commands = {"test", "validate", "predict"}
    assert first_column("What is refused") == {w for words, _ in refused for w in words.split()} | commands


@pytest.mark.slow
def test_two_processes_train_one_model(small, tmp_path):
    command = [sys.executable, "-m", "mtmedformer.commands.main", "fit", "--config", small, *shlex.split(TWO)]
    run = [*command, f"--trainer.default_root_dir={tmp_path}/run", "--trainer.sync_batchnorm=true"]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "sync_dist" not in done.stderr
    stored = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert stored["global_step"] == 2
    assert all(value.isfinite().all() for value in stored["state_dict"].values() if value.is_floating_point())


def test_the_weights_of_swa_are_those_of_the_last_checkpoint(small, tmp_path):
    swa = "--trainer.callbacks+=StochasticWeightAveraging --trainer.callbacks.swa_lrs=0.01"
    swa += " --trainer.callbacks.swa_epoch_start=1 --trainer.max_epochs=3"
    assert fit(small, tmp_path / "run", swa) == 0
    stored = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    (average,) = (v["average_model_state"] for k, v in stored["callbacks"].items() if "Stochastic" in k)
    assert average.keys() == stored["state_dict"].keys()
    assert all(torch.equal(stored["state_dict"][key], value) for key, value in average.items())


def test_the_weights_of_ema_are_those_of_the_last_checkpoint(small, tmp_path):
    assert fit(small, tmp_path / "run", "--trainer.callbacks+=EMAWeightAveraging --trainer.callbacks.decay=0.5") == 0
    stored = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    averaged, current = stored["state_dict"], stored["current_model_state"]
    assert stored["averaging_state"]["n_averaged"] == 2
    assert any(not torch.equal(averaged[key], current[key]) for key in averaged)


SCHEDULES = {
    "plateau": "--lr_scheduler=ReduceLROnPlateau --lr_scheduler.monitor=val/score --lr_scheduler.patience=0 "
    "--lr_scheduler.mode=min --lr_scheduler.factor=0.1",
    "one cycle": "--lr_scheduler=OneCycleLR --lr_scheduler.max_lr=0.01 --lr_scheduler.total_steps=9",
    "cyclic": "--lr_scheduler=CyclicLR --lr_scheduler.base_lr=0.001 --lr_scheduler.max_lr=0.01 "
    "--lr_scheduler.step_size_up=3 --lr_scheduler.cycle_momentum=false",
    "swa": "--trainer.callbacks+=StochasticWeightAveraging --trainer.callbacks.swa_lrs=0.001 "
    "--trainer.callbacks.swa_epoch_start=1",
    "ema": "--trainer.callbacks+=EMAWeightAveraging",
    "bf16": "--trainer.precision=bf16-true",
    "double": "--trainer.precision=64-true",
    "famo": "--model.loss=HybridLoss --model.loss.weighting=FAMOWeighting --trainer.accumulate_grad_batches=2",
    "rare validation": "--trainer.check_val_every_n_epoch=2",
}

RESUMED = {
    "OneCycleLR": "one cycle",
    "CyclicLR": "cyclic",
    "StochasticWeightAveraging": "swa",
    "EMAWeightAveraging": "ema",
}
"""Options of the page that are resumed, too."""

TWO = "--trainer.strategy=ddp --trainer.devices=2"
DISTRIBUTED = ("trainer.strategy=ddp", "trainer.devices")


@pytest.mark.parametrize("name", [pytest.param(k, marks=[] if k == "plateau" else pytest.mark.slow) for k in SCHEDULES])
def test_a_resumed_run_equals_an_uninterrupted_one(name, small, tmp_path):
    options = f"{SCHEDULES[name]} --trainer.max_epochs=3"
    assert fit(small, tmp_path / "whole", options) == 0
    stop = " --trainer.callbacks+=tests.fixtures.stopping.StopAt --trainer.callbacks.epoch=1 --trainer.callbacks.batch="
    for batch_of_stop in (0, 1):  # within the epoch, and in its last step
        folder = tmp_path / f"broken{batch_of_stop}"
        assert fit(small, folder, options + stop + str(batch_of_stop)) == 130
        assert fit(small, folder, options + " --ckpt_path=last") == 0
        whole, resumed = (
            torch.load(one / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
            for one in (tmp_path / "whole", folder)
        )
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_the_truth_keeps_its_precision_where_the_weights_are_halved():
    data = batch({"health": [True], "nodules": [True], "organ": [True]})
    data.targets["nodules"].boxes[0][:] = torch.tensor([100.25, 300.5, 511.75, 400.0])
    given = HalfPrecision("bf16-true").convert_input(data)
    assert given.targets["nodules"].boxes[0].tolist() == [[100.25, 300.5, 511.75, 400.0]]
