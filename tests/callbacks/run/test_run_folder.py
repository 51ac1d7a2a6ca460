"""Run folders are claimed once, found again, and their CSV goes on where the interrupted run left it."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch.utilities import rank_zero_only

from callbacks import RunFolder, RunLogger, latest_run_folder, run_folder_of
from callbacks.run.run_folder import is_run_folder_of, lock_run
from mtmedformer.errors import ConfigError


def claim_run_folder(root):
    """Choose and create a run folder; return its path."""
    folder = RunFolder(root)
    folder.create()
    folder.release()
    return folder.path


def test_each_run_reserves_its_own_folder(tmp_path):
    root = tmp_path / "runs" / "chest"
    assert [claim_run_folder(root).name for _ in range(3)] == ["chest", "chest-2", "chest-3"]
    assert latest_run_folder(root).name == "chest-3"


def test_a_folder_without_a_run_in_it_is_taken(tmp_path):
    (tmp_path / "chest").mkdir()
    (tmp_path / "chest" / "notes.txt").write_text("mine")
    assert claim_run_folder(tmp_path / "chest") == tmp_path / "chest"


def test_processes_launched_by_a_run_take_its_folder(tmp_path, monkeypatch):
    first = claim_run_folder(tmp_path / "chest")
    claim_run_folder(tmp_path / "chest")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("MTMEDFORMER_RUN_DIR", str(first))
    assert claim_run_folder(tmp_path / "chest") == first


def test_a_folder_is_created_only_on_request_and_reserved_until_then(tmp_path):
    first, second = RunFolder(tmp_path / "chest"), RunFolder(tmp_path / "chest")
    assert (first.path.name, second.path.name) == ("chest", "chest-2")
    assert list(tmp_path.iterdir()) == []
    first.release()
    third = RunFolder(tmp_path / "chest")
    assert third.path.name == "chest"
    third.create()
    second.create()
    assert RunFolder(tmp_path / "chest").path.name == "chest-3"


def test_a_folder_created_by_another_computer_meanwhile_is_an_error(tmp_path):
    folder = RunFolder(tmp_path / "chest")
    (tmp_path / "chest").mkdir()
    (tmp_path / "chest/run.lock").touch()
    with pytest.raises(ConfigError, match="just taken"):
        folder.create()
    folder.release()


def test_the_folders_of_one_root(tmp_path):
    for name, belongs in {"chest": True, "chest-2": True, "chest-x": False, "chest2": False, "a/chest": False}.items():
        assert is_run_folder_of(tmp_path / "chest", tmp_path / name) == belongs


def test_the_run_folder_of_a_checkpoint():
    assert run_folder_of(Path("runs/a/checkpoints/best.ckpt")) == Path("runs/a")
    assert run_folder_of(Path("weights/best.ckpt")) is None


def test_a_resumed_csv_keeps_its_rows_and_takes_new_columns(tmp_path):
    first = RunLogger(str(tmp_path))
    first.log_metrics({"a": 1.0}, step=0)
    first.save()
    second = RunLogger(str(tmp_path))
    second.log_metrics({"a": 2.0, "b": 3.0}, step=1)
    second.save()
    with (tmp_path / "metrics.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [r["a"] for r in rows] == ["1.0", "2.0"]
    assert [r["b"] for r in rows] == ["", "3.0"]


def test_an_incomplete_last_line_is_dropped(tmp_path):
    (tmp_path / "metrics.csv").write_text("epoch,loss,step\n0,1.5,9\n1,1.2")
    logger = RunLogger(str(tmp_path))
    logger.log_metrics({"loss": 1.25}, step=19)
    logger.save()
    with (tmp_path / "metrics.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [(row["epoch"], row["loss"], row["step"]) for row in rows] == [("0", "1.5", "9"), ("", "1.25", "19")]


def test_other_processes_write_no_rows(tmp_path, monkeypatch):
    (tmp_path / "metrics.csv").write_text("epoch,loss\n0,1.5\n")
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = RunLogger(str(tmp_path))
    logger.log_metrics({"loss": 1.0}, 1)
    logger.save()
    assert (tmp_path / "metrics.csv").read_text() == "epoch,loss\n0,1.5\n"


def test_a_run_is_locked_for_other_processes_until_it_ends(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.create()
    tries = (
        "import fcntl, sys; f = open(sys.argv[1], 'r+')\n"
        "try: fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB); print('free')\nexcept OSError: print('locked')"
    )

    def state() -> str:
        command = [sys.executable, "-c", tries, str(folder.path / "run.lock")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    assert state() == "locked"
    folder.release()
    assert state() == "free"
    unlock = lock_run(folder.path)
    assert state() == "locked"
    unlock()
    assert state() == "free"
    lock_run(tmp_path / "no run")()
    assert not (tmp_path / "no run").exists()
