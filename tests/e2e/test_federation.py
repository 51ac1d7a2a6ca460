"""A whole federation by the command line, on a small set of two sites."""

import csv
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml

from federation.server.run_state import read_state
from mtmedformer.commands.main import main
from tests.fixtures.real_data import real
from tests.fixtures.site_tables import ALL, write_table
from tests.fixtures.small_set import small_config, write_config


def federated(images: Path, runs: Path, rounds: int = 2, **federation: object) -> dict:
    """Return the small configuration, its set cut by site, trained in rounds."""
    config = small_config(images, runs, max_epochs=rounds)
    data = config["data"]
    data["init_args"] |= {"val_fraction": 0.25, "test_fraction": 0.25}
    config["data"] = {"class_path": "federation.FederatedDataModule", "init_args": {"data": data, "by": "site"}}
    config["federation"] = {
        "class_path": "callbacks.Federation",
        "init_args": {"aggregator": {"class_path": "federation.FedAvg"}, **federation},
    }
    return config


def weights_of(file: Path) -> dict[str, torch.Tensor]:
    return torch.load(file, weights_only=True)["state_dict"]


def same(a: Path, b: Path) -> bool:
    """Compare the weights of two checkpoints bit by bit."""
    one, other = weights_of(a), weights_of(b)
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


class KillAt(L.Callback):
    """Sends this process Ctrl-C during one step of a site's training; counts steps over all rounds and sites."""

    steps = 0

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        KillAt.steps += 1
        if KillAt.steps == self.step:
            os.kill(os.getpid(), signal.SIGINT)


class FailAt(L.Callback):
    """Lets one site fail in its training, by an error or by the end of its process, while a file is there."""

    def __init__(self, site: str, switch: str, kill: bool = False) -> None:
        self.site, self.switch, self.kill = site, Path(switch), kill

    def on_train_start(self, trainer, pl_module):
        if trainer.datamodule.site == self.site and self.switch.exists():
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("secret-patient-007.png cannot be read")


def fail_at(site: str, switch: Path, kill: bool = False) -> str:
    """Return the option that lets a site fail while the switch is on."""
    sys.modules["test_federation_e2e"] = sys.modules[__name__]
    arguments = json.dumps({"site": site, "switch": str(switch), "kill": kill})
    return f"--federation.site_trainer.callbacks=[{{class_path: test_federation_e2e.FailAt, init_args: {arguments}}}]"


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """A finished federation of three rounds: its folder and its configuration file."""
    runs = tmp_path_factory.mktemp("runs")
    config = write_config(federated(images, runs, rounds=3), runs / "config.yaml")
    assert main(["fit", "--config", config]) == 0
    return runs / "run", config


def test_fit_runs_rounds_and_counts_them(trained):
    folder, _ = trained
    for name in ("config.yaml", "metrics.csv", "sites.json", "sites.png", "checkpoints/best.ckpt"):
        assert (folder / name).is_file(), name
    last = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    assert last["epoch"] == 2
    assert last["global_step"] == 3, "one server step per round"
    rows = rows_of(folder / "metrics.csv")
    assert len([r for r in rows if r.get("val/score")]) == 3
    logged = set().union(*(row.keys() for row in rows))
    assert {
        "val/organ/dice/site=north",
        "val/organ/dice/site=south",
        "val/site_worst",
        "site/north/val/score",
        "site/south/train/loss_epoch",
        "site/north/train/nodules/loss",
    } <= logged
    assert "site/south/train/nodules/loss" not in logged, "the site south has no boxes"


def test_a_run_that_another_process_trains_is_not_resumed(trained, tmp_path, capsys):
    folder, config = trained
    hold = "import fcntl, sys; f = open(sys.argv[1], 'r+'); fcntl.lockf(f, 2); print(1, flush=True); input()"
    command = [sys.executable, "-c", hold, str(folder / "run.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline()
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        assert main(["fit", "--config", config, "--ckpt_path=last"]) == 2
        assert "another process trains this run now" in " ".join(capsys.readouterr().err.split())
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
        other.communicate("\n")
    assert main(["fit", "--config", config, "--ckpt_path=last"]) == 0, "the other process has ended"


def test_the_matrix_of_sites_and_tasks_is_written(trained):
    folder, _ = trained
    north, south = json.loads((folder / "sites.json").read_text())
    assert (north["site"], south["site"]) == ("north", "south")
    assert south["labels"]["nodules"] == 0
    assert north["labels"]["nodules"] == north["images"] > 0


def test_a_site_without_labels_of_a_task_does_not_send_its_head(trained):
    folder, _ = trained
    state = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["callbacks"]["Federation"]
    for record in state["history"]:
        assert set(record["sites"]["south"]["blocks"]) == {"encoder", "heads.health", "heads.organ"}
        assert set(record["sites"]["north"]["blocks"]) == {"encoder", "heads.health", "heads.organ", "heads.nodules"}
    assert "loss" not in record["sites"]["north"]["blocks"], "the loss weights are not sent"


def test_a_federated_checkpoint_is_a_plain_one(trained, capsys):
    folder, _ = trained
    best = str(folder / "checkpoints/best.ckpt")
    assert main(["test", "--ckpt_path", best, "--trainer.enable_progress_bar=false"]) == 0
    report = json.loads((folder / "test_metrics.json").read_text())
    assert {"test/organ/dice", "test/organ/dice/site=north", "test/organ/dice/site=south"} <= set(report)
    assert main(["predict", "--ckpt_path", best, "--trainer.enable_progress_bar=false"]) == 0
    assert (folder / "predictions/predictions.csv").is_file()


def test_no_patient_id_is_in_the_run_folder(trained):
    folder, _ = trained
    for file in folder.rglob("*"):
        if file.is_file() and "predictions" not in file.parts:
            content = file.read_bytes()
            assert b"secret-patient" not in content, file
            if file.name != "quarantine.csv":
                assert b"images/im0" not in content, file
                assert b"im000" not in content, file


@pytest.mark.parametrize("step", [3, 12], ids=["in the first round", "in the second"])
def test_a_run_resumed_after_ctrl_c_within_a_site_equals_an_uninterrupted_one(images, trained, tmp_path, step):
    whole, _ = trained
    config = federated(images, tmp_path, rounds=3)
    file = write_config(config, tmp_path / "config.yaml")
    sys.modules["test_federation_e2e"] = sys.modules[__name__]
    KillAt.steps = 0
    callback = f"[{{class_path: test_federation_e2e.KillAt, init_args: {{step: {step}}}}}]"
    assert main(["fit", "--config", file, f"--federation.site_trainer.callbacks={callback}"]) == 130
    assert KillAt.steps == step, "it stopped at the very step"
    assert main(["fit", "--config", file, "--ckpt_path=last"]) == 0
    assert same(whole / "checkpoints/last.ckpt", tmp_path / "run/checkpoints/last.ckpt")
    assert len([r for r in rows_of(tmp_path / "run/metrics.csv") if r.get("val/score")]) == 3


def test_a_missing_site_changes_the_exit_code_and_the_state(images, tmp_path, capsys):
    file = write_config(federated(images, tmp_path, rounds=2), tmp_path / "config.yaml")
    switch = tmp_path / "switch"
    switch.touch()
    assert main(["fit", "--config", file, fail_at("south", switch)]) == 3
    printed = capsys.readouterr()
    assert "without south (raised RuntimeError)" in printed.out
    state = json.loads((tmp_path / "run/run_state.json").read_text())
    assert (state["state"], state["round"]) == ("degraded", 2)
    assert main(["fit", "--config", file, fail_at("south", switch), "--federation.policy.quorum=2"]) == 1
    printed = capsys.readouterr()
    assert "1 of 2 sites were admitted and federation.policy.quorum requires 2" in " ".join(printed.err.split())
    assert "secret-patient" not in printed.out + printed.err
    assert json.loads((tmp_path / "run-2/run_state.json").read_text())["state"] == "failed"
    switch.unlink()
    assert main(["fit", "--config", file, "--ckpt_path=last"]) == 0, "the site is back"
    assert json.loads((tmp_path / "run-2/run_state.json").read_text())["state"] == "finished"


def launch(config: dict, folder: Path, *arguments: str, processes: int = 1) -> Path:
    """Train in fresh processes; return the checkpoint."""
    file = write_config(config, folder / "config.yaml")
    several = [f"--trainer.devices={processes}", "--trainer.strategy=ddp"] if processes > 1 else []
    command = [sys.executable, "-m", "mtmedformer", "fit", "--config", file, *several, *arguments]
    environment = {k: v for k, v in os.environ.items() if k not in {"LOCAL_RANK", "MTMEDFORMER_RUN_DIR"}}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "run" / "checkpoints" / "last.ckpt"


def one_thread(images: Path, folder: Path, rounds: int = 2, **federation: object) -> dict:
    folder.mkdir(exist_ok=True)
    return federated(images, folder, rounds=rounds, **federation)


@pytest.mark.slow
def test_two_processes_and_a_resume_with_one_give_the_same_bits(images, tmp_path):
    alone = launch(one_thread(images, tmp_path / "one"), tmp_path / "one")
    config = one_thread(images, tmp_path / "two")
    both = launch(config, tmp_path / "two", processes=2)
    assert same(alone, both)
    rows = [rows_of(p.parent.parent / "metrics.csv")[-1] for p in (alone, both)]
    keys = {k for k in rows[0] if k.startswith(("val/", "site/")) and rows[0][k]}
    assert {k: rows[0][k] for k in keys} == {k: rows[1][k] for k in keys}, "validation is whole on every process"
    config["trainer"]["max_epochs"] = 3
    config["lr_scheduler"] = {"class_path": "torch.optim.lr_scheduler.ConstantLR", "init_args": {"factor": 1.0}}
    three = one_thread(images, tmp_path / "three", rounds=3)
    three["lr_scheduler"] = config["lr_scheduler"]
    expected = launch(three, tmp_path / "three")
    part = one_thread(images, tmp_path / "part", rounds=2)
    part["lr_scheduler"] = config["lr_scheduler"]
    stopped = launch(part, tmp_path / "part", processes=2)
    part["trainer"]["max_epochs"] = 3
    assert same(expected, launch(part, tmp_path / "part", f"--ckpt_path={stopped}"))


@pytest.mark.slow
def test_two_isolated_sites_at_once_give_the_same_bits_as_one_after_the_other(images, trained, tmp_path):
    whole, _ = trained
    config = one_thread(images, tmp_path / "apart", rounds=3, placement="isolated", sites_at_once=2)
    assert same(whole / "checkpoints/last.ckpt", launch(config, tmp_path / "apart"))
    assert not (tmp_path / "apart/run/updates").exists()


@pytest.mark.slow
def test_placement_ddp_is_reproducible(images, tmp_path):
    runs = []
    for name in ("a", "b"):
        config = one_thread(images, tmp_path / name, rounds=1, placement="ddp")
        runs.append(launch(config, tmp_path / name, processes=2))
    assert same(*runs)
    state = torch.load(runs[0], weights_only=True)["callbacks"]["Federation"]
    alone = launch(one_thread(images, tmp_path / "one", rounds=1), tmp_path / "one")
    reference = torch.load(alone, weights_only=True)["callbacks"]["Federation"]
    for site in ("north", "south"):
        blocks, expected = (s["history"][0]["sites"][site]["blocks"] for s in (state, reference))
        assert blocks.keys() == expected.keys()
        assert blocks["encoder"]["num_examples"] == pytest.approx(expected["encoder"]["num_examples"], abs=1)


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["per_rank", "ddp"])
def test_sigterm_within_a_site_ends_every_process_soon_and_the_run_can_be_resumed(images, tmp_path, placement):
    config = one_thread(images, tmp_path / "a", rounds=40, placement=placement)
    file = write_config(config, tmp_path / "config.yaml")
    command = [sys.executable, "-m", "mtmedformer", "fit", "--config", file, "--trainer.devices=2"]
    environment = {k: v for k, v in os.environ.items() if k not in {"LOCAL_RANK", "MTMEDFORMER_RUN_DIR"}}
    log = (tmp_path / "log.txt").open("w")
    process = subprocess.Popen(
        [*command, "--trainer.strategy=ddp"], env=environment | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log
    )
    last = tmp_path / "a/run/checkpoints/last.ckpt"
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline and "round 2/40" not in (tmp_path / "log.txt").read_text():
        time.sleep(0.2)
    process.terminate()
    began = time.monotonic()
    try:
        process.wait(timeout=60)
    finally:
        process.kill()
    assert time.monotonic() - began < 45
    assert process.returncode == 143
    search = ["pgrep", "-f", str(tmp_path / "config.yaml")]
    while (left := subprocess.run(search, capture_output=True, text=True).stdout) and time.monotonic() - began < 45:
        time.sleep(0.2)  # the other processes end a moment after the first
    assert left == "", "no process is left behind"
    done = torch.load(last, weights_only=True)["epoch"] + 1
    assert done >= 2
    config["trainer"]["max_epochs"] = done + 1
    config["lr_scheduler"] = None
    config["federation"]["init_args"]["optimizer_state"] = "reset"
    assert main(["fit", "--config", write_config(config, tmp_path / "more.yaml"), f"--ckpt_path={last}"]) == 0
    assert torch.load(last, weights_only=True)["epoch"] + 1 == done, "another configuration gets a new run folder"
    more = tmp_path / "a/run-2/checkpoints/last.ckpt"
    assert torch.load(more, weights_only=True)["global_step"] == done + 1


@pytest.mark.slow
def test_a_killed_process_ends_the_run_and_the_resumed_run_has_the_same_bits(images, trained, tmp_path):
    whole, _ = trained
    config = federated(images, tmp_path, rounds=3)
    code = (
        "import sys, test_federation as t; sys.modules['test_federation_e2e'] = t; "
        "from mtmedformer.commands.main import main; "
    )
    script = tmp_path / "fit.py"
    script.write_text(code + "sys.exit(main())")
    switch = tmp_path / "switch"
    file = write_config(config, tmp_path / "config.yaml")
    options = [fail_at("south", switch, kill=True), "--trainer.devices=2", "--trainer.strategy=ddp"]
    environment = {k: v for k, v in os.environ.items() if k not in {"LOCAL_RANK", "MTMEDFORMER_RUN_DIR"}}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{Path.cwd()}:{Path(__file__).parent}"}
    with (tmp_path / "log.txt").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, script, "fit", "--config", file, *options], env=environment, stderr=log, stdout=log
        )
        began = time.monotonic()
        while time.monotonic() - began < 150 and "round 1/3" not in (tmp_path / "log.txt").read_text():
            time.sleep(0.1)
        switch.touch()  # the second process, which trains the south, is killed in its next round
        try:
            assert process.wait(timeout=100) != 0
        finally:
            process.kill()
    search = ["pgrep", "-f", str(tmp_path / "config.yaml")]
    while (left := subprocess.run(search, capture_output=True, text=True).stdout) and time.monotonic() - began < 250:
        time.sleep(0.2)
    assert left == "", "no process is left behind"
    state = read_state(tmp_path / "run")
    assert state.state == "failed", state
    assert main(["fit", "--config", file, "--ckpt_path=last"]) == 0
    assert same(whole / "checkpoints/last.ckpt", tmp_path / "run/checkpoints/last.ckpt")


@pytest.mark.slow
def test_placement_sequential_with_two_devices_is_refused(images, tmp_path):
    config = one_thread(images, tmp_path / "a", rounds=1, placement="sequential")
    file = write_config(config, tmp_path / "config.yaml")
    command = [sys.executable, "-m", "mtmedformer", "fit", "--config", file, "--trainer.devices=2"]
    done = subprocess.run([*command, "--trainer.strategy=ddp"], capture_output=True, text=True, timeout=280)
    assert done.returncode == 2
    assert "federation.placement=sequential" in " ".join(done.stderr.split())


def wandb_logger(folder: Path) -> dict:
    settings = {"project": "t", "save_dir": str(folder)}
    return {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": settings}


def test_wandb_has_a_run_for_the_server_and_one_per_site(images, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    started = []
    import wandb

    init = wandb.init

    @functools.wraps(init)  # its signature is read, and remembered, for what a configuration may say
    def watched(*args, **kwargs):
        run = init(*args, **kwargs)
        started.append((run.id, run.group, run.job_type, run.name))
        return run

    monkeypatch.setattr(wandb, "init", watched)
    config = federated(images, tmp_path, rounds=1)
    logger = {
        "class_path": "lightning.pytorch.loggers.WandbLogger",
        "init_args": {"project": "t", "save_dir": str(tmp_path)},
    }
    config["trainer"] |= {"logger": logger, "log_every_n_steps": 1}
    assert main(["fit", "--config", write_config(config, tmp_path / "c.yaml")]) == 0
    (server, *_), north, south = started
    assert north == (f"{server}-north", server, "site", "north")
    assert south == (f"{server}-south", server, "site", "south")
    assert wandb.run.id == server
    seen = set(wandb.run.summary.keys())
    assert "val/site_worst" in seen
    assert "train/nodules/loss" not in seen, "the server's own run is untouched by the sites'"
    wandb.run.finish()
    started.clear()
    config["trainer"]["max_epochs"] = 2
    assert main(["fit", "--config", write_config(config, tmp_path / "c.yaml"), "--ckpt_path=last"]) == 0
    assert [run for run, *_ in started] == [server, f"{server}-north", f"{server}-south"], "a resume goes on with them"
    wandb.run.finish()


def test_a_sweep_has_one_wandb_run_per_trial(images, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    monkeypatch.setenv("WANDB_RUN_ID", "the-only-one")
    import wandb

    wandb.teardown()  # it has read the environment already, where a run went before
    config = federated(images, tmp_path, rounds=1)
    logger = {
        "class_path": "lightning.pytorch.loggers.WandbLogger",
        "init_args": {"project": "t", "save_dir": str(tmp_path)},
    }
    config["trainer"]["logger"] = logger
    assert main(["fit", "--config", write_config(config, tmp_path / "c.yaml")]) == 0
    assert wandb.run.id == "the-only-one"
    assert "site/north/train/loss_epoch" in set(wandb.run.summary.keys())
    wandb.run.finish()
    wandb.teardown()  # the next test is not part of the sweep
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--federation.aggregator=FedAverage"], ["FedAverage"]),
        (["--federation.site_trainer.max_epoch=2"], ["max_epoch"]),
        (["--federation.placement=everywhere"], ["everywhere", "per_rank"]),
        (["--data.by=hospital"], ["hospital", "site"]),
        (["--trainer.gradient_clip_val=1"], ["federation.site_trainer.gradient_clip_val"]),
    ],
)
def test_mistakes_are_reported_in_one_paragraph(trained, capsys, arguments, words):
    _, config = trained
    assert main(["fit", "--config", config, *arguments]) == 2
    message = " ".join(capsys.readouterr().err.split())
    for word in words:
        assert word in message


def test_options_reach_the_sites_from_the_command_line(images, tmp_path):
    config = write_config(federated(images, tmp_path, rounds=1), tmp_path / "c.yaml")
    options = [
        "--federation.site_trainer.max_steps=2",
        "--federation.site_trainer.gradient_clip_val=1.0",
        "--federation.optimizer_state=keep",
        "--federation.aggregator=BayesianAggregator",
        "--federation.aggregator.granularity=row",
        "--federation.validate_sites=true",
    ]
    assert main(["fit", "--config", config, *options]) == 0
    state = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["callbacks"]["Federation"]
    assert {name: site["steps"] for name, site in state["sites"].items()} == {"north": 2, "south": 2}
    assert state["sites"]["north"]["optimizers"]
    assert "organ/dice" in state["history"][0]["sites"]["south"]["trained"]


def test_the_same_data_without_the_federation_key_is_trained_on_pooled(images, tmp_path):
    config = federated(images, tmp_path, rounds=1)
    del config["federation"]
    assert main(["fit", "--config", write_config(config, tmp_path / "c.yaml")]) == 0
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] > 3


CONFIGS = sorted(Path("configs/federation").glob("*.yaml"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda p: p.stem)
def test_every_configuration_is_short_and_begins_with_its_command(file):
    lines = file.read_text().splitlines()
    assert lines[0].startswith("# mtmedformer fit --config configs/federation/")
    assert str(file) in lines[0]
    assert len(lines) <= 60
    assert yaml.safe_load(file.read_text())["federation"]


SMALL = [
    "--trainer.max_epochs=1",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--federation.site_trainer.limit_train_batches=1",
    "--data.data.image_size=64",
    "--data.data.num_workers=0",
]


@pytest.mark.parametrize("name", ["quickstart", "two_organs"])
def test_generated_configurations_run(name, tmp_path, monkeypatch, capsys):
    config = str(Path("configs/federation", f"{name}.yaml").resolve())
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", config, *SMALL, "--data.data.limit=48", "--data.data.size=64"]) == 0
    assert "Sites, and what each has labelled" in capsys.readouterr().out
    run = tmp_path / yaml.safe_load(Path(config).read_text())["trainer"]["default_root_dir"]
    records = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["callbacks"]["Federation"]["history"][0][
        "sites"
    ]
    if name == "two_organs":
        assert {"heads.finding", "heads.pathology"} <= {b for site in records.values() for b in site["blocks"]}
        assert not any({"heads.finding", "heads.pathology"} <= set(site["blocks"]) for site in records.values())
    else:
        assert "heads.lesions" not in records["south"]["blocks"]
        assert "heads.lungs" not in records["east"]["blocks"]


@pytest.mark.parametrize(
    "name, folder, sites",
    [
        ("chest_sites", "covid_cxr", {"eurorad", "journals", "radiopaedia", "sirm_italy"}),
        ("mammography_sites", "mini_mias", {"tissue_D", "tissue_F", "tissue_G"}),
        ("pneumonia_sites", "pneumonia_cxr", {"guangzhou_children", "nih_adults", "openist"}),
    ],
)
def test_real_configurations_run(name, folder, sites, tmp_path, monkeypatch):
    config, root = str(Path("configs/federation", f"{name}.yaml").resolve()), real(folder).resolve()
    monkeypatch.chdir(tmp_path)
    arguments = [f"--data.data.root={root}", "--data.data.limit=60"]
    assert main(["fit", "--config", config, *SMALL, *arguments]) == 0
    found = json.loads((tmp_path / "runs" / name / "sites.json").read_text())
    assert {site["site"] for site in found} == sites


@pytest.mark.slow
def test_the_configuration_for_several_processes_runs(tmp_path):
    configs = [str(Path("configs/federation", f"{name}.yaml").resolve()) for name in ("quickstart", "ddp")]
    command = [sys.executable, "-m", "mtmedformer", "fit", "--config", configs[0], "--config", configs[1], *SMALL]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    more = ["--trainer.devices=2", "--data.data.limit=48", "--data.data.size=64"]
    done = subprocess.run([*command, *more], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "runs/federation_ddp/checkpoints/last.ckpt").is_file()


def test_sites_that_cannot_train_are_named_and_the_run_is_finished(tmp_path, capsys):
    rows = [("north", "train")] * 4 + [("north", "val")] * 2 + [("south", "test")] * 3
    root = write_table(tmp_path / "set", [(*row, ALL) for row in rows] + [("blank", "", ())] * 2)
    config = federated(root, tmp_path / "runs", rounds=1)
    config["model"]["init_args"]["heads"] = {
        "finding": {"class_path": "mtmedformer.ClassificationHead", "init_args": {"classes": ["sick", "well"]}}
    }
    data = config["data"]["init_args"]["data"]["init_args"]
    data["classification"] = {"finding": {"column": "label", "classes": ["sick", "well"]}}
    data["image_size"] = 32
    del data["detection"], data["segmentation"]
    file = write_config(config, tmp_path / "config.yaml")
    assert main(["fit", "--config", file]) == 0
    run = tmp_path / "runs/run"
    assert read_state(run).state == "finished"
    shown = " ".join(capsys.readouterr().out.split())
    assert "site south: no labelled training image (0 for validation, 3 for testing)" in shown
    assert "site blank: none of its 2 images has a label for finding; the site is left out" in shown
    assert "round 1/1 · 1 site" in shown
    assert "without south" not in shown
    assert main(["test", f"--ckpt_path={run / 'checkpoints/last.ckpt'}"]) == 0
    assert "/site=south" in (run / "test_metrics.json").read_text()
    data["image_size"] = 64
    sites = {"a": config["data"]["init_args"]["data"], "b": json.loads(json.dumps(config["data"]["init_args"]["data"]))}
    sites["b"]["init_args"]["image_size"] = 32
    config["data"]["init_args"] = {"sites": sites}
    before = sorted(tmp_path.rglob("*"))
    assert main(["fit", "--config", write_config(config, tmp_path / "config.yaml")]) == 2
    assert "differ in size (64x64 at a, 32x32 at b)" in " ".join(capsys.readouterr().err.split())
    assert sorted(tmp_path.rglob("*")) == before
