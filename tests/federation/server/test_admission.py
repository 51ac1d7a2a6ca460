"""Admission of updates to a round, the quorum, and the state file of a run."""

import json
import os
import subprocess
import sys

import pytest
import torch

from federation.exchange.update import norms_of
from federation.server.admission import Fault, Policy, RoundError, outliers
from federation.server.run_state import RunState, read_state, write_state
from mtmedformer.errors import ConfigError, DataError
from tests.fixtures.toy_federation import make_update, toy


@pytest.mark.parametrize(
    "quorum, sites, needed",
    [(0.5, 4, 2), (0.5, 5, 3), (0.1, 5, 1), (1, 5, 1), (3, 5, 3), (9, 5, 5), (0.5, 1, 1), (1.0, 4, 1)],
)
def test_the_quorum_is_a_share_or_a_number_of_sites(quorum, sites, needed):
    assert Policy(quorum=quorum).needed(sites) == needed


@pytest.mark.parametrize(
    "settings", [{"quorum": 0}, {"quorum": 1.5}, {"deadline": 0}, {"retries": -1}, {"outlier": 0.0}]
)
def test_a_policy_out_of_range_is_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        Policy(**settings)


def test_a_round_below_its_quorum_ends_the_run_and_names_the_missing_sites():
    faults = [Fault("south", "out of memory")]
    Policy(quorum=1).check(0, 2, 1, faults)
    with pytest.raises(RoundError, match=r"round 3: 1 of 2 .*quorum requires 2; south: out of memory"):
        Policy(quorum=2).check(2, 2, 1, faults)
    with pytest.raises(RoundError, match="missing=fail"):
        Policy(missing="fail").check(0, 2, 1, faults)
    Policy(missing="fail").check(0, 2, 2, [])
    assert RoundError.exit_code == 1


def test_a_change_far_larger_than_the_others_is_an_outlier_and_a_small_one_is_not():
    usual = {f"s{i}": {"encoder": 1.0 + 0.1 * i, "heads.lungs": 2.0} for i in range(5)}
    assert outliers(usual, 6.0) == {}
    found = outliers(usual | {"bad": {"encoder": 100.0, "heads.lungs": 2.0}}, 6.0)
    assert list(found) == ["bad"]
    assert "encoder 80 times the median" in found["bad"]
    assert outliers(usual | {"bad": {"encoder": 7.0}}, 6.0) == {}, "never below 7.4 times the median"
    assert outliers(usual | {"idle": {"encoder": 1e-6}}, 6.0) == {}
    assert outliers(usual | {"bad": {"encoder": 1e9}}, None) == {}
    assert outliers({"a": {"encoder": 1.0}, "b": {"encoder": 1e9}}, 6.0) == {}, (
        "of two sites, it is unknown which is wrong"
    )


def test_sites_that_differ_widely_are_not_outliers():
    varied = {f"s{i}": {"encoder": 2.0**i} for i in range(7)}
    assert outliers(varied, 6.0) == {}


def test_norms_are_computed_per_block():
    state, schema = toy()
    update = make_update("a", state, schema)
    flat = torch.cat([delta.flatten() for delta in update.blocks["heads.lungs"].delta.values()])
    assert norms_of(update)["heads.lungs"] == pytest.approx(float(flat.norm()), rel=1e-6)


def test_the_state_is_read_back_as_it_was_written(tmp_path):
    state = write_state(tmp_path, "running", "4 sites", 1, 5)
    assert read_state(tmp_path) == state
    assert [p.name for p in tmp_path.iterdir()] == ["run_state.json"]
    assert read_state(tmp_path / "nothing") is None


@pytest.mark.parametrize("state, code", [("finished", 0), ("failed", 1), ("degraded", 3)])
def test_the_exit_code_of_each_state(state, code):
    assert RunState(state, "", 1, 1).exit_code == code


def test_the_state_of_a_killed_process_is_failed(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from federation.server.run_state import write_state;"
        "write_state(Path(sys.argv[1]), 'running', '2 sites', 2, 5); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=os.environ | {"PYTHONPATH": os.getcwd()})
    assert json.loads((tmp_path / "run_state.json").read_text())["state"] == "running"
    state = read_state(tmp_path)
    assert state.state == "failed"
    assert "unexpectedly after round 2" in state.reason


def test_a_broken_state_is_an_error_that_names_the_file(tmp_path):
    (tmp_path / "run_state.json").write_text("{")
    with pytest.raises(DataError, match=r"run_state\.json"):
        read_state(tmp_path)


def test_a_full_disk_does_not_hide_why_the_run_ends(tmp_path, capsys, monkeypatch):
    from pathlib import Path

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert write_state(tmp_path, "failed", "no space", 1, 5).state == "failed"
    assert "the run is failed: no space" in capsys.readouterr().err
