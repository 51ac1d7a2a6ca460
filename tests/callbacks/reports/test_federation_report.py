"""The report of a federation tells what happened, whether the run finished, stopped, failed or went on."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks.federation.callback import Federation
from callbacks.reports.federation_page import best_round, federation_page, site_scores
from callbacks.reports.federation_report import FederationReport
from federation import BayesianAggregator, FederatedDataModule, Local
from tests.fixtures.toy_sites import ToySite, toy_module


def sites():
    return FederatedDataModule(
        sites={"a": ToySite(n=12), "b": ToySite(n=8, tasks=("right",), seed=1), "c": ToySite(n=6, seed=2)}
    )


class StopIn(L.Callback):
    """Ends the run at the start of a round."""

    def __init__(self, round: int, error: BaseException) -> None:
        self.round, self.error = round, error

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.round:
            raise self.error


def run(folder, aggregator=None, rounds=3, ckpt=None, more=(), module=None, **settings):
    L.seed_everything(1, verbose=False)
    federation = Federation(aggregator or BayesianAggregator(), **settings)
    saved = ModelCheckpoint(folder, save_last=True, filename="{epoch}", save_top_k=-1, enable_version_counter=False)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=rounds,
        default_root_dir=folder,
        callbacks=[federation, FederationReport(), saved, *more],
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    trainer.fit(module or toy_module(), datamodule=sites(), ckpt_path=ckpt)


def told(folder):
    return json.loads((folder / "report.json").read_text())


class Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.said = ""
        self.hidden = False

    def handle_starttag(self, tag, attrs):
        self.hidden = tag == "style"

    def handle_data(self, data):
        self.said += "" if self.hidden else data + " "


def words(text):
    reader = Text()
    reader.feed(text)
    return " ".join(reader.said.split())


def test_a_finished_federation_tells_every_round(tmp_path):
    run(tmp_path, validate_sites=True)
    facts = told(tmp_path)
    assert facts["state"]["state"] == "finished"
    assert facts["rounds"] == {"done": 3, "asked": 3}
    assert [entry["round"] for entry in facts["history"]] == [0, 1, 2]
    assert [entry["round"] for entry in facts["pooled"]] == [0, 1, 2]
    assert [held["site"] for held in facts["sites"]] == ["a", "b", "c"]
    for entry in facts["history"]:
        assert set(entry["sites"]) == {"a", "b", "c"}
        assert set(site_scores(entry)) == {"a", "b", "c"}
        for block in ("encoder", "heads.left", "heads.right"):
            assert sum(one["share"].get(block, 0.0) for one in entry["sites"].values()) == pytest.approx(1)
        for one in entry["sites"].values():
            assert -1 <= one["cosine"] <= 1
            assert one["bytes"] > 0
            assert one["seconds"] > 0
            assert one["norms"]["encoder"] > 0
    assert "heads.left" not in facts["history"][0]["sites"]["b"]["share"]
    assert facts["aggregator"]["options"]["rho"] == 1.0
    page = words((tmp_path / "report.html").read_text())
    for heading in ("Sites and labels", "Scores", "Faults", "Drift", "Weight of each site", "Time and traffic"):
        assert heading in page
    assert "3 of 3 rounds · BayesianAggregator · finished" in page


@pytest.mark.parametrize("error, state", [(KeyboardInterrupt(), "interrupted"), (RuntimeError("MRN 4711"), "failed")])
def test_a_run_that_ends_early_tells_as_far_as_it_got(tmp_path, error, state):
    with pytest.raises((KeyboardInterrupt, RuntimeError, SystemExit)):
        run(tmp_path, more=[StopIn(2, error)])
    facts = told(tmp_path)
    assert facts["state"]["state"] in {state, "failed"}  # the federation's own word, where it has one, goes first
    assert facts["state"]["reason"]
    assert facts["rounds"] == {"done": 2, "asked": 3}
    assert len(facts["history"]) == 2
    page = (tmp_path / "report.html").read_text()
    assert "2 of 3" in words(page)
    assert f"The run is {facts['state']['state']}" in words(page)
    assert "4711" not in page
    assert "4711" not in (tmp_path / "report.json").read_text()


def test_a_run_that_ends_before_its_first_round_says_so(tmp_path):
    with pytest.raises(RuntimeError):
        run(tmp_path, more=[StopIn(0, RuntimeError())])
    assert told(tmp_path)["rounds"]["done"] == 0
    assert "No round was completed" in words((tmp_path / "report.html").read_text())


def test_a_resumed_run_tells_the_rounds_before_too(tmp_path):
    run(tmp_path / "whole")
    with pytest.raises(RuntimeError):
        run(tmp_path / "parts", more=[StopIn(2, RuntimeError())])
    run(tmp_path / "parts", ckpt=tmp_path / "parts" / "last.ckpt", module=toy_module(seed=9))
    whole, parts = told(tmp_path / "whole"), told(tmp_path / "parts")
    assert parts["state"]["state"] == "finished"
    assert [entry["round"] for entry in parts["history"]] == [0, 1, 2]
    assert parts["pooled"] == whole["pooled"]
    for one, other in zip(whole["history"], parts["history"], strict=True):
        for site in "abc":
            assert one["sites"][site]["cosine"] == other["sites"][site]["cosine"]
            assert one["sites"][site]["share"] == other["sites"][site]["share"]


def test_what_merges_nothing_has_no_weights_to_tell(tmp_path):
    run(tmp_path, Local(), rounds=1)
    page = words((tmp_path / "report.html").read_text())
    assert "Weight of each site" not in page
    assert "agreement with the merge" not in page


def test_no_report_without_a_federation_or_of_a_try(tmp_path):
    trainer = L.Trainer(accelerator="cpu", devices=1, default_root_dir=tmp_path, callbacks=[FederationReport()],
                        max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
                        enable_checkpointing=False)  # fmt: skip
    trainer.fit(toy_module(), datamodule=ToySite(n=8))
    assert not (tmp_path / "report.json").exists()


def facts_of(**changes):
    """Return facts with everything in them: faults, privacy, moved units, an absent site and a name to be feared."""
    hostile = "<b>east</b>&$x"
    validation = {
        f"val/lungs/dice/site={hostile}": 0.5,
        "val/lungs/dice/site=west": 0.75,
        "site/west/val/score": 0.75,
    }
    validation |= {f"site/{hostile}/val/score": 0.5}
    site = {
        "bytes": 2_000_000, "seconds": 1.5, "steps": 3, "norms": {"encoder": 3.0, "heads.lungs": 4.0}, "cosine": 0.25,
        "share": {"encoder": 0.75, "heads.lungs": 1.0}, "moved": {"blocks.0": 0.125}, "metrics": {},
        "num_examples": {"encoder": 40, "heads.lungs": 20},
    }  # fmt: skip
    private = {
        "unit": "site",
        "names": 3,
        "norm": 9.0,
        "clipped": 1.0,
        "epsilon": 1.75,
        "delta": 1e-5,
        "bytes": 1_000_000,
        "sha256": "ab" * 32,
        "norms": {"encoder": 1.0},
    }
    first = {hostile: {**site, "privacy": private}, "west": {**site, "cosine": None, "moved": {}}}
    faults = [{"site": "west", "fault": "not done by the deadline", "action": "left out of this round"}]
    history = [
        {"round": 0, "sites": first, "seconds": 4.0, "faults": [], "validation": validation},
        {"round": 1, "sites": {hostile: site}, "seconds": 2.0, "faults": faults, "validation": {}},
    ]
    return {
        "state": {"state": "degraded", "reason": "west was not admitted"},
        "rounds": {"done": 2, "asked": 5},
        "aggregator": {"class": "FedAvg", "options": {"weights": "num_examples"}},
        "options": {"align": True},
        "primary": {"lungs": "dice"},
        "sites": [
            {"site": hostile, "patients": 5, "images": 40, "validation": 4, "labels": {"lungs": 20}},
            {"site": "west", "patients": 3, "images": 10, "validation": 2, "labels": {"lungs": 0}},
        ],
        "history": history,
        "arrays": {hostile: ["delta|encoder|w"]},
        "pooled": [{"round": 0, "metrics": {"val/score": 0.625, "val/lungs/dice": 0.625}}],
        "seed": "3",
        "versions": {"MTMedFormer": "0"},
    } | changes


def test_the_page_shows_faults_privacy_and_units_moved():
    page = federation_page(facts_of())
    said = words(page)
    assert "The run is degraded: west was not admitted" in said
    assert "2 west not done by the deadline left out of this round" in said
    assert "(1.75, 1e-05)" in said
    assert "(1.75, 1e-05) site 9 to 1" in said
    assert "delta|encoder|w" in said
    assert "sends neither its counts nor its times" in said
    assert "abababababababab" in said
    assert "1 <b>east</b>&$x blocks.0 12.5 %" in said
    assert "west has no labels for lungs" in said
    assert "0.625 best score, round 1" in said
    assert "0.500 worst site then: <b>east</b>&$x" in said
    assert "<b>east" not in page
    assert "6.0 MB sent by all sites" in said


def test_scores_of_a_sites_own_model_go_before_those_of_the_global_one():
    validation = {"site/a/val/score": 0.1, "site/b/val/score": 0.2, "site/c/val/score": None}
    entry = {"sites": {"a": {"metrics": {"score": 0.9}}, "b": {"metrics": {}}}, "validation": validation}
    assert site_scores(entry) == {"a": 0.9, "b": 0.2}


def test_the_best_round_is_that_of_the_pooled_score():
    pooled = [{"round": r, "metrics": {"val/score": s}} for r, s in ((0, 0.5), (1, None), (2, 0.75), (3, 0.6))]
    assert best_round(facts_of(pooled=pooled))["round"] == 2
    assert "Later rounds did worse, the last one 0.600; best.ckpt holds round 3" in federation_page(
        facts_of(pooled=pooled)
    )
    assert best_round(facts_of(pooled=[])) is None


def test_many_sites_and_no_validation_still_make_a_page():
    few = facts_of()
    names = [f"site_{i:02d}" for i in range(30)]
    one = few["history"][1]["sites"]["<b>east</b>&$x"]
    history = [{"round": r, "sites": dict.fromkeys(names, one), "seconds": 1.0, "faults": []} for r in range(2)]
    held = [{"site": n, "patients": 1, "images": 3, "validation": 0, "labels": {"lungs": 3}} for n in names]
    page = words(federation_page(facts_of(history=history, sites=held, pooled=[], primary={})))
    assert "No site has validation images" in page
    assert "Federation of 30 sites" in page
    assert federation_page(facts_of(history=[], sites=[], pooled=[]))
