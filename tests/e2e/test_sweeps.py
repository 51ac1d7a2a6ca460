"""Every sweep of the project: rendered by the agent of W&B, parsed by the command line, and run without W&B."""

import csv
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from mtmedformer.commands.main import main
from mtmedformer.commands.sweep.sweep_file import read_sweep
from tests.fixtures.small_set import small_config, write_config

ROOT = Path(__file__).resolve().parents[2]
SWEEPS = sorted((ROOT / "configs/sweeps").glob("*.yaml"))
STOP = {"monitor": "val/organ/dice", "mode": "max", "patience": 2}
SMALL_SITES = "{a: {patients: 12}, b: {patients: 12}}"


def extremes(spec):
    """Return the values of a parameter to render: all of a list, both ends of a range."""
    return [spec["value"]] if "value" in spec else spec.get("values") or [spec["min"], spec["max"]]


def by_agent(config, values, monkeypatch):
    """Return the command line that ``wandb agent`` would start for these values, by its own code."""
    from wandb import wandb_agent

    started = []

    class Process:
        def __init__(self, command=None, **options):
            started.extend(command)

    agent = wandb_agent.Agent.__new__(wandb_agent.Agent)
    agent._sweep_command, agent._function, agent._in_jupyter = list(config["command"]), None, False
    agent._forward_signals, agent._run_processes = False, {}
    monkeypatch.setattr(wandb_agent, "AgentProcess", Process)
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    given = {key: {"value": value} for key, value in values.items()}
    agent._command_run({"args": given, "program": config["program"], "run_id": "r"})
    return started


@pytest.mark.parametrize("file", SWEEPS, ids=lambda p: p.stem)
def test_the_command_that_wandb_renders_is_parsed(file, monkeypatch, capsys, tmp_path):
    from wandb.sdk.launch.sweeps.utils import load_sweep_config

    config = load_sweep_config(str(file))
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    most = max(len(extremes(spec)) for spec in config["parameters"].values())
    for turn in range(most):
        values = {k: extremes(spec)[turn % len(extremes(spec))] for k, spec in config["parameters"].items()}
        words = by_agent(config, values, monkeypatch)
        assert words[:2] == ["/usr/bin/env", "mtmedformer"]
        assert words[2:] == read_sweep(file).arguments(values), "the command without W&B is the same"
        with pytest.raises(SystemExit) as end:
            main([*words[2:], "--print_config"])
        assert end.value.code == 0
        printed = yaml.safe_load(capsys.readouterr().out)
        for key, value in values.items():
            assert found(printed, key.split(".")) == value, key


def found(config, keys):
    """Return a value of a printed configuration, whose classes have ``init_args`` on the way."""
    for key in keys:
        config = config.get("init_args", config) if key not in config else config
        config = config[key]
    return config["class_path"] if isinstance(config, dict) and "class_path" in config else config


def rows_of(file):
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


@pytest.mark.slow
@pytest.mark.parametrize("file", SWEEPS, ids=lambda p: p.stem)
def test_the_command_in_the_first_line_runs(file, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    words = file.read_text().splitlines()[0].removeprefix("# mtmedformer ").split()
    data = "--data.data" if file.stem == "federation" else "--data"
    small = {"root": tmp_path / "phantom", "cache_dir": tmp_path / "cache", "sites": SMALL_SITES}
    small |= {"size": 96, "image_size": 64, "num_workers": 0}
    settings = [f"{data}.{key}={value}" for key, value in small.items()]
    more = ["--trainer.max_epochs=2", "--trainer.accelerator=cpu", "--model.encoder.channels=16"]
    output = ["--trials=2", "--jobs=2", f"--output={tmp_path / 'out'}"]
    assert main([*words, *output, *settings, *more]) == 0, capsys.readouterr().out
    rows = rows_of(tmp_path / "out/results.csv")
    assert [row["trial"] for row in rows if float(row["value"]) > 0] == [row["trial"] for row in rows]
    assert len(rows) == 2
    assert {"val/finding/auroc", "val/lungs/dice"} <= rows[0].keys()
    for number in range(2):
        assert (tmp_path / f"out/trials/{number:04d}/checkpoints/best.ckpt").is_file()
    best = capsys.readouterr().out.rstrip().splitlines()[-1]
    with pytest.raises(SystemExit) as end:
        main([*shlex.split(best)[1:], "--print_config"])
    assert end.value.code == 0


@pytest.mark.slow
def test_the_same_command_continues_after_ctrl_c(images, tmp_path):
    """The interrupted trial continues from its checkpoint, and ended trials are not repeated."""
    config = small_config(images, tmp_path, max_epochs=30)
    config["trainer"]["callbacks"] = [{"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": STOP}]
    sweep = {
        "method": "random",
        "metric": {"name": "val/score", "goal": "maximize"},
        "parameters": {"optimizer.lr": {"min": 0.001, "max": 0.004}},
        "command": ["${program}", "fit", "--config", write_config(config, tmp_path / "c.yaml"), "${args}"],
    }
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(sweep))
    folder = tmp_path / "out/trials/0000"
    words = [sys.executable, "-m", "mtmedformer", "sweep", "--config", str(tmp_path / "s.yaml"), "--trials=1"]
    words.append(f"--output={tmp_path / 'out'}")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 150
    while not (folder / "checkpoints/best.ckpt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 130, printed
    assert "the same command continues" in printed
    begun = {int(row["epoch"]) for row in rows_of(folder / "metrics.csv")}
    assert max(begun) < 30
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 to continue" in done.stdout
    epochs = [int(row["epoch"]) for row in rows_of(folder / "metrics.csv") if row["val/score"]]
    assert epochs == sorted(set(epochs)), "no epoch was trained twice"
    assert len(rows_of(tmp_path / "out/results.csv")) == 1
    assert not (tmp_path / "out/trials/0000-2").exists()
