"""Report of a federation that finished, was interrupted, failed or was resumed."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from html.parser import HTMLParser

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks.federation.callback import Federation
from callbacks.reports.federation_page import federation_page
from callbacks.reports.federation_report import FederationReport
from callbacks.reports.federation_summary import FederationSummary, PartDescription, site_scores
from federation import BayesianAggregator, FederatedDataModule, Local
from federation.partition import Holding
from federation.server.admission import Fault
from federation.server.history import RoundRecord, SiteRecord
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


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


class Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.text = ""
        self.hidden = False

    def handle_starttag(self, tag, attrs):
        self.hidden = tag == "style"

    def handle_data(self, data):
        self.text += "" if self.hidden else data + " "


def text_of(page):
    reader = Text()
    reader.feed(page)
    return " ".join(reader.text.split())


def test_report_of_a_finished_federation_has_every_round(tmp_path):
    run(tmp_path)
    report = report_of(tmp_path)
    assert report["state"]["state"] == "finished"
    assert report["rounds"] == {"done": 3, "asked": 3}
    assert [entry["round"] for entry in report["history"]] == [1, 2, 3]
    assert [entry["round"] for entry in report["pooled"]] == [1, 2, 3]
    assert [held["site"] for held in report["sites"]] == ["a", "b", "c"]
    for entry in report["history"]:
        assert set(entry["sites"]) == {"a", "b", "c"}
        assert all("score" in site["trained"] for site in entry["sites"].values())
        for block in ("encoder", "heads.left", "heads.right"):
            assert sum(one["share"].get(block, 0.0) for one in entry["sites"].values()) == pytest.approx(1)
        for one in entry["sites"].values():
            assert -1 <= one["cosine"] <= 1
            assert one["bytes"] > 0
            assert one["seconds"] > 0
            assert one["norms"]["encoder"] > 0
    assert "heads.left" not in report["history"][0]["sites"]["b"]["share"]
    assert report["aggregator"]["options"]["rho"] == 1.0
    page = text_of((tmp_path / "report.html").read_text())
    for heading in ("Sites and labels", "Scores", "Faults", "Drift", "Weight of each site", "Time and traffic"):
        assert heading in page
    assert "3 of 3 rounds · BayesianAggregator · finished" in page


@pytest.mark.parametrize("error, state", [(KeyboardInterrupt(), "interrupted"), (RuntimeError("MRN 4711"), "failed")])
def test_report_of_an_interrupted_run_has_the_completed_rounds(tmp_path, error, state):
    with pytest.raises((KeyboardInterrupt, RuntimeError, SystemExit)):
        run(tmp_path, more=[StopIn(2, error)])
    report = report_of(tmp_path)
    assert report["state"]["state"] in {state, "failed"}  # run_state.json takes precedence
    assert report["state"]["reason"]
    assert report["rounds"] == {"done": 2, "asked": 3}
    assert len(report["history"]) == 2
    page = (tmp_path / "report.html").read_text()
    assert "2 of 3" in text_of(page)
    assert f"The run is {report['state']['state']}" in text_of(page)
    assert "MRN 4711" not in page
    assert "MRN 4711" not in (tmp_path / "report.json").read_text()


def test_report_of_a_run_without_a_completed_round(tmp_path):
    with pytest.raises(RuntimeError):
        run(tmp_path, more=[StopIn(0, RuntimeError())])
    assert report_of(tmp_path)["rounds"]["done"] == 0
    assert "No round was completed" in text_of((tmp_path / "report.html").read_text())


def test_report_of_a_resumed_run_has_the_earlier_rounds(tmp_path):
    run(tmp_path / "whole")
    with pytest.raises(RuntimeError):
        run(tmp_path / "parts", more=[StopIn(2, RuntimeError())])
    run(tmp_path / "parts", ckpt=tmp_path / "parts" / "last.ckpt", module=toy_module(seed=9))
    whole, parts = report_of(tmp_path / "whole"), report_of(tmp_path / "parts")
    assert parts["state"]["state"] == "finished"
    assert [entry["round"] for entry in parts["history"]] == [1, 2, 3]
    assert parts["pooled"] == whole["pooled"]
    for one, other in zip(whole["history"], parts["history"], strict=True):
        for site in "abc":
            assert one["sites"][site]["cosine"] == other["sites"][site]["cosine"]
            assert one["sites"][site]["share"] == other["sites"][site]["share"]


def test_report_without_a_merge_has_no_weights(tmp_path):
    run(tmp_path, Local(), rounds=1)
    page = text_of((tmp_path / "report.html").read_text())
    assert "Weight of each site" not in page
    assert "cosine to the merged change" not in page


def test_no_report_without_a_federation(tmp_path):
    trainer = L.Trainer(accelerator="cpu", devices=1, default_root_dir=tmp_path, callbacks=[FederationReport()],
                        max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
                        enable_checkpointing=False)  # fmt: skip
    trainer.fit(toy_module(), datamodule=ToySite(n=8))
    assert not (tmp_path / "report.json").exists()


HOSTILE = "<b>east</b>&$x"


def summary(**changes):
    """Return a summary with faults, privacy, alignment, an absent site and a name with special characters."""
    validation = {f"val/lungs/dice/site={HOSTILE}": 0.5, "val/lungs/dice/site=west": 0.75}
    validation |= {"site/west/val/score": 0.75, f"site/{HOSTILE}/val/score": 0.5}
    site = SiteRecord(
        bytes=2_000_000,
        seconds=1.5,
        steps=3,
        norms={"encoder": 3.0, "heads.lungs": 4.0},
        cosine=0.25,
        share={"encoder": 0.75, "heads.lungs": 1.0},
        moved={"blocks.0": 0.125},
        blocks={"encoder": {"num_examples": 40}, "heads.lungs": {"num_examples": 20}},
    )
    private = dict(
        unit="site",
        names=["delta|encoder|w", "delta|encoder|b", "delta|heads.lungs|w"],
        norm=9.0,
        clipped=1.0,
        epsilon=1.75,
        delta=1e-5,
        bytes=1_000_000,
        sha256="ab" * 32,
        norms={"encoder": 1.0},
        site=None,
        example=None,
    )
    first = {HOSTILE: replace(site, privacy=private), "west": replace(site, cosine=None, moved={})}
    fault = Fault("west", "not done by the deadline", "left out of this round")
    whole = FederationSummary(
        state="degraded",
        reason="west was not admitted",
        rounds=5,
        aggregator=PartDescription("FedAvg", {"weights": "num_examples"}),
        options={"align": True},
        primary={"lungs": "dice"},
        sites=[Holding(HOSTILE, 5, 40, 4, {"lungs": 20}), Holding("west", 3, 10, 2, {"lungs": 0})],
        history=[
            RoundRecord(0, first, [], 4.0, validation),
            RoundRecord(1, {HOSTILE: site}, [fault], 2.0),
        ],
        arrays={HOSTILE: ["delta|encoder|w"]},
        pooled={0: {"val/score": 0.625, "val/lungs/dice": 0.625}},
        seed="3",
        versions={"MTMedFormer": "0"},
    )
    return replace(whole, **changes)


def test_page_shows_faults_privacy_and_alignment():
    page = federation_page(summary())
    text = text_of(page)
    assert "The run is degraded: west was not admitted" in text
    assert "2 west not done by the deadline left out of this round" in text
    assert "(1.75, 1e-05)" in text
    assert "(1.75, 1e-05) site 9 to 1" in text
    assert "delta|encoder|w" in text
    assert "withholds its counts and times" in text
    assert "abababababababab" in text
    assert "1 <b>east</b>&$x blocks.0 12.5 %" in text
    assert "west has no labels for lungs" in text
    assert "0.625 best score, round 1" in text
    assert "0.500 worst site in that round: <b>east</b>&$x" in text
    assert "<b>east" not in page
    assert "6.0 MB sent by all sites" in text


def test_scores_of_a_sites_own_model_replace_those_of_the_global_one():
    validation = {"site/a/val/score": 0.1, "site/b/val/score": 0.2, "site/c/val/score": math.nan}
    sites = {"a": SiteRecord(metrics={"score": 0.9}), "b": SiteRecord()}
    assert site_scores(RoundRecord(0, sites, validation=validation)) == {"a": 0.9, "b": 0.2}


def test_best_round_has_the_highest_pooled_score():
    pooled = {r: {"val/score": s} for r, s in ((0, 0.5), (1, math.nan), (2, 0.75), (3, 0.6))}
    assert summary(pooled=pooled).best_round() == 2
    page = federation_page(summary(pooled=pooled))
    assert "Later rounds have a lower score, the last one 0.600; best.ckpt holds round 3" in page
    assert summary(pooled={}).best_round() is None


def test_report_json_is_valid_json_with_null_for_unknown_numbers():
    content = json.dumps(summary(pooled={0: {"val/score": math.nan}}).to_json(), allow_nan=False)
    stored = json.loads(content)
    assert stored["pooled"] == [{"round": 1, "metrics": {"val/score": None}}]
    assert stored["aggregator"] == {"class": "FedAvg", "options": {"weights": "num_examples"}}
    assert stored["history"][0]["sites"][HOSTILE]["privacy"]["epsilon"] == 1.75


def test_page_of_many_sites_without_validation():
    names = [f"site_{i:02d}" for i in range(30)]
    one = summary().history[1].sites[HOSTILE]
    history = [RoundRecord(r, dict.fromkeys(names, one), [], 1.0) for r in range(2)]
    sites = [Holding(name, 1, 3, 0, {"lungs": 3}) for name in names]
    text = text_of(federation_page(summary(history=history, sites=sites, pooled={}, primary={})))
    assert "No site has validation images" in text
    assert "Federation of 30 sites" in text
    assert federation_page(summary(history=[], sites=[], pooled={}))
