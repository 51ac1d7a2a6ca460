"""A federation that does not break: sites that fail, a server that is killed, a disk that is full."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from federation import FedAvg
from federation.server.admission import RoundError, outliers
from federation.server.run_state import read_state
from tests.fixtures.faulty_federation import SECRET, train

SITES = ["a", "b", "c", "d"]


def weights(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def of_checkpoint(folder):
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def start(folder: Path, **options) -> subprocess.Popen:
    """Start a federation in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, "tests/fixtures/faulty_federation.py", str(folder), json.dumps(options)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(process: subprocess.Popen) -> tuple[int, str]:
    out, _ = process.communicate(timeout=200)
    return process.returncode, out


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """Weights of federations in which a site never takes part in some rounds: what any failure must come to."""
    known = {}

    def get(site, away, rounds=4, **settings):
        key = (site, tuple(away), str(settings))
        if key not in known:
            plan = [[s for s in SITES if s != site or r not in away] for r in range(rounds)]
            module, _ = train(tmp_path_factory.mktemp("ref"), rounds=rounds, participation=plan, **settings)
            known[key] = weights(module)
        return known[key]

    return get


@pytest.mark.parametrize(
    "kind, words",
    [
        ("raise", "raised DataError"),
        ("late", "not done by the deadline"),
        ("nan", "encoder.1.bias: not finite"),
        ("shape", "encoder.1.bias: shape"),
        ("name", "encoder: unknown weights"),
        ("twice", "update of another round (1, not 2)"),
        ("huge", "times the median"),
        ("count", "encoder: more examples than the site declared (1000000000000, at most"),
        ("overflow", "encoder: more examples than the site declared (about 10^400"),
        ("formless", "its update has no form (AttributeError)"),
        ("step", "encoder.1.bias: rounding step that is not a number above 0"),
    ],
)
def test_a_round_continues_without_a_failed_site(tmp_path, without, kind, words):
    policy = {"deadline": 4.0} if kind == "late" else {}
    module, federation = train(tmp_path, {"b": {"1": kind}}, policy=policy)
    (fault,) = federation.history[1].faults
    assert fault.site == "b"
    assert words in fault.fault
    assert [record.faults for i, record in enumerate(federation.history) if i != 1] == [[], [], []]
    assert set(federation.history[1].sites) == {"a", "c", "d"}
    assert equal(weights(module), without("b", [1]))
    assert (federation.exit_code, read_state(tmp_path).state) == (0, "finished")
    assert "missing: b in 1" in read_state(tmp_path).reason
    assert not (tmp_path / "updates").exists()


def test_a_site_whose_update_raises_in_the_merge_is_left_out(tmp_path, without, monkeypatch):
    add = FedAvg.add

    def fails_for_b(self, update):
        add(self, update)  # what it has changed by then is undone
        if update.site == "b" and update.round == 1:
            raise RuntimeError(SECRET)

    monkeypatch.setattr(FedAvg, "add", fails_for_b)
    module, federation = train(tmp_path, {})
    (fault,) = federation.history[1].faults
    assert (fault.site, fault.fault) == ("b", "its update could not be merged (raised RuntimeError)")
    assert set(federation.history[1].sites) == {"a", "c", "d"}
    assert equal(weights(module), without("b", [1]))
    assert SECRET in (tmp_path / "sites/b/faults.log").read_text()


@pytest.mark.parametrize("bayes", [False, True])
def test_an_update_that_changes_on_the_disk_is_left_out(tmp_path, without, monkeypatch, bayes):
    from federation.server import round

    def damages(norms, limit):
        for file in tmp_path.glob("updates/round-2-*/b.safetensors"):
            file.write_bytes(file.read_bytes()[:-20])
        return outliers(norms, limit)

    monkeypatch.setattr(round, "outliers", damages)
    module, federation = train(tmp_path, {}, bayes=bayes)
    (fault,) = federation.history[1].faults
    assert (fault.site, fault.fault) == ("b", "refused: its update cannot be read")
    assert equal(weights(module), without("b", [1], bayes=bayes))


def test_merged_weights_that_are_not_finite_end_the_run_before_they_are_used(tmp_path, monkeypatch):
    finish = FedAvg.finish

    def overflows(self):
        merged = finish(self)
        return merged | {"encoder.1.bias": merged["encoder.1.bias"] / 0}

    monkeypatch.setattr(FedAvg, "finish", overflows)
    with pytest.raises(RoundError, match=r"round 1: the merged weights are not finite \(encoder.1.bias\)"):
        train(tmp_path, {})
    assert read_state(tmp_path).state == "failed"


def test_the_error_message_of_a_site_is_not_printed(tmp_path, capsys):
    train(tmp_path, {"b": {"1": "raise"}})
    assert SECRET in (tmp_path / "sites/b/faults.log").read_text()
    for file in tmp_path.rglob("*"):
        if file.is_file() and file.name != "faults.log":
            assert SECRET.encode() not in file.read_bytes(), file
    printed = capsys.readouterr()
    assert SECRET not in printed.out + printed.err
    assert "without b (raised DataError)" in printed.out


def test_a_site_that_is_missing_to_the_end_leaves_the_run_degraded(tmp_path, without):
    module, federation = train(tmp_path, {"b": {str(r): "raise" for r in range(1, 4)}})
    assert equal(weights(module), without("b", [1, 2, 3]))
    state = read_state(tmp_path)
    assert (federation.exit_code, state.state, state.ended) == (3, "degraded", True)
    assert "missing: b in 3" in state.reason


@pytest.mark.parametrize("bayes", [False, True])
def test_a_site_may_return_after_three_rounds(tmp_path, without, bayes):
    faults = {"b": {str(r): "raise" for r in (1, 2, 3)}}
    module, federation = train(tmp_path, faults, rounds=5, bayes=bayes)
    assert equal(weights(module), without("b", [1, 2, 3], rounds=5, bayes=bayes))
    assert "b" in federation.history[4].sites
    assert federation.exit_code == 0


def test_a_temporary_failure_is_retried(tmp_path, without):
    module, federation = train(tmp_path, {"b": {"1": "once"}}, policy={"retries": 1})
    assert equal(weights(module), without("b", []))
    assert federation.history[1].faults == []
    assert "attempt 1: raised DataError" in (tmp_path / "sites/b/faults.log").read_text()


def test_too_few_sites_end_the_run_and_it_can_be_resumed(tmp_path, without):
    faults = {site: {"2": "raise"} for site in "abc"}
    with pytest.raises(RoundError, match="round 3: 1 of 4 sites"):
        train(tmp_path, faults)
    state = read_state(tmp_path)
    assert (state.state, state.round, state.exit_code) == ("failed", 2, 1)
    assert "quorum" in state.reason
    module, _ = train(tmp_path, resume=True)
    assert equal(weights(module), without("b", []))
    assert read_state(tmp_path).state == "finished"


def test_one_missing_site_may_end_the_run(tmp_path):
    with pytest.raises(RoundError, match="missing=fail"):
        train(tmp_path, {"b": {"1": "raise"}}, policy={"missing": "fail"})


def test_a_configuration_error_at_a_site_ends_the_run(tmp_path, monkeypatch):
    from mtmedformer.errors import ConfigError
    from tests.fixtures import faulty_federation

    def wrong(self, *args, **kwargs):
        raise ConfigError("optimizer.lr=…")

    monkeypatch.setattr(faulty_federation.FaultyTrainer, "train_until", wrong)
    with pytest.raises(ConfigError, match="site a: optimizer"):
        train(tmp_path)


@pytest.mark.slow
def test_a_killed_isolated_site_is_left_out_of_its_round_only(tmp_path, without):
    """Real processes: killed, hanging, out of memory, raising; the others go on, and the bits are theirs."""
    faults = {"b": {"0": "kill", "1": "hang", "2": "out_of_memory", "3": "raise"}}
    process = start(tmp_path, faults=faults, rounds=5, placement="isolated", policy={"deadline": 15.0})
    code, out = finished(process)
    assert code == 0, out
    for words in (
        "round 1/5 · 3 sites · without b (its process ended (by signal 9, as where memory runs out))",
        "round 2/5 · 3 sites · without b (not done by the deadline)",
        "round 3/5 · 3 sites · without b (out of memory)",
        "round 4/5 · 3 sites · without b (raised DataError)",
        "round 5/5 · 4 sites",
    ):
        assert words in out
    assert SECRET not in out
    assert equal(of_checkpoint(tmp_path), without("b", [0, 1, 2, 3], rounds=5))


@pytest.mark.slow
def test_isolated_sites_at_once_give_the_same_bits_as_one_after_the_other(tmp_path, without):
    code, out = finished(start(tmp_path, placement="isolated", sites_at_once=3, optimizer_state="keep"))
    assert code == 0, out
    assert equal(of_checkpoint(tmp_path), without("b", [], optimizer_state="keep"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "where",
    ["site", "aggregation", "checkpoint", "before the checkpoint is in its place"],
)
def test_a_killed_server_resumes_with_the_same_bits(tmp_path, without, where):
    options = {"faults": {"b": {"2": "kill"}}} if where == "site" else {"kill": [where, 2]}
    code, out = finished(start(tmp_path, **options))
    assert code == -9, out
    state = read_state(tmp_path)
    assert state.state == "failed"
    assert "unexpectedly" in state.reason
    stored = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert stored["epoch"] == 1, "the last whole round"
    code, out = finished(start(tmp_path, resume=True))
    assert code == 0, out
    assert equal(of_checkpoint(tmp_path), without("b", []))
    assert read_state(tmp_path).state == "finished"
    assert not list(tmp_path.rglob("*.part*"))


def test_what_a_killed_round_left_is_in_the_run_folder_and_gone_after_the_next_start(tmp_path, monkeypatch):
    run, temporary = tmp_path / "run", tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    process = start(run, faults={"b": {"0": "late"}}, rounds=1, placement="isolated")
    began = time.monotonic()
    while not list(run.glob("updates/round-1-*/a.safetensors")) and time.monotonic() - began < 100:
        time.sleep(0.1)
    while not list(run.glob("updates/site-*")) and time.monotonic() - began < 100:
        time.sleep(0.1)
    process.kill()
    process.wait()
    left = [path for path in (run / "updates").iterdir() if path.is_dir()]
    assert {path.name.split("-")[0] for path in left} == {"round", "site"}
    assert all(path.stat().st_mode & 0o077 == 0 for path in left), "private keys of sites may be in them"
    assert not [path for path in temporary.iterdir() if path.name.startswith(("site-", "round-"))]
    train(run, rounds=1, placement="isolated")
    assert not (run / "updates").exists()


@pytest.mark.slow
def test_the_processes_of_isolated_sites_end_with_a_killed_server(tmp_path):
    process = start(tmp_path, faults={"b": {"1": "late"}}, placement="isolated")
    marker = str(tmp_path)
    began = time.monotonic()
    while not (read_state(tmp_path) and read_state(tmp_path).round == 1) and time.monotonic() - began < 100:
        time.sleep(0.2)
    time.sleep(1.0)
    process.kill()
    process.wait()
    while (left := subprocess.run(["pgrep", "-f", marker], capture_output=True, text=True).stdout) and (
        time.monotonic() - began < 150
    ):
        time.sleep(0.2)
    assert left == ""


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_a_message_and_a_complete_checkpoint(tmp_path, without):
    code, out = finished(start(tmp_path, faults={"b": {"2": "disk"}}))
    assert code == 1
    assert "File too large" in out
    state = read_state(tmp_path)
    assert (state.state, state.round) == ("failed", 3)
    assert torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["epoch"] == 1
    assert not list(tmp_path.rglob("*.part*"))
    code, out = finished(start(tmp_path, resume=True))
    assert code == 0, out
    assert equal(of_checkpoint(tmp_path), without("b", []))
