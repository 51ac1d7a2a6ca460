"""The record of rounds stays small, and keeps what reports need."""

import json

import pytest

from federation.server.history import RoundRecord, SiteRecord, compact
from tests.fixtures.toy_federation import make_update, toy

METRICS = {f"lungs/{name}": 0.5 for name in ("dice", "iou", "dice/left", "hd95")} | {"score": 0.5}
PRIMARY = {"lungs": "dice"}


def record(number: int, sites=("a", "b"), private: bool = True) -> RoundRecord:
    update = make_update("a", *toy(), precision="element")
    privacy = {"names": ["delta|encoder|w"] * 50} if private else {}
    found = {name: SiteRecord.of(update, {}, dict(privacy), dict(METRICS)) for name in sites}
    for site in found.values():
        site.metrics = dict(METRICS)
    validation = {f"val/{key}/site={name}": 0.5 for key in METRICS for name in sites if key != "score"}
    validation |= {f"site/{name}/val/score": 0.5 for name in sites} | {"val/site_mean": 0.5, "val/site_worst": 0.5}
    return RoundRecord(number, found, [], 1.0, validation)


def test_a_record_has_nothing_by_tensor():
    site = record(0).sites["a"]
    assert site.blocks["encoder"] == {"num_examples": 100}
    assert site.contributed
    assert not SiteRecord(metrics={"score": 0.5}).contributed
    assert set(site.norms) == {"encoder", "heads.finding", "heads.lungs"}


def test_only_the_last_round_has_all_metrics():
    history = []
    for number in range(4):
        history.append(record(number))
        compact(history, PRIMARY)
    assert history[-1].sites["a"].metrics == METRICS
    assert len(history[-1].validation) == 12
    for earlier in history[:-1]:
        assert earlier.sites["a"].metrics == earlier.sites["a"].trained == {"score": 0.5, "lungs/dice": 0.5}
        assert set(earlier.validation) == {
            "val/lungs/dice/site=a",
            "val/lungs/dice/site=b",
            "site/a/val/score",
            "site/b/val/score",
            "val/site_mean",
            "val/site_worst",
        }
        assert len(json.dumps(earlier.to_dict()["sites"]["a"])) < 1000
        assert RoundRecord.from_dict(earlier.to_dict()) == earlier


def test_the_arrays_that_a_site_sent_last_are_kept_until_it_sends_again():
    history = [record(0), record(1, sites=("a",)), record(2, sites=("a",), private=False)]
    for length in (1, 2, 3):
        compact(history[:length], PRIMARY)
    assert history[0].sites["a"].privacy["names"] == 50
    assert len(history[0].sites["b"].privacy["names"]) == 50
    assert len(history[1].sites["a"].privacy["names"]) == 50


@pytest.mark.parametrize("history", [[], [record(0)]])
def test_no_earlier_round_is_no_error(history):
    compact(history, PRIMARY)
    assert all(one.sites["a"].metrics == METRICS for one in history)
