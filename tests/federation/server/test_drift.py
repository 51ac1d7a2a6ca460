"""Drift and shares in the report agree with the merge."""

from __future__ import annotations

import pytest
import torch

from federation import (
    BayesianAggregator,
    CoordinateMedian,
    FedAdam,
    FedAvg,
    FedBN,
    Local,
    Pooled,
    Scaffold,
)
from federation.server.drift import Drift
from tests.fixtures.toy_federation import make_update, toy


def round_of(aggregator, updates, state, schema, most=4096):
    aggregator.start(state, schema)
    drift = Drift(aggregator, schema, most)
    for update in updates:
        drift.add(update)
        aggregator.add(update)
    after = aggregator.finish()
    return drift, after, drift.finish(state, after)


WEIGHTED = {
    "fedavg": lambda: FedAvg(),
    "equal": lambda: FedAvg("equal"),
    "bayes": lambda: BayesianAggregator(momentum=0, a=0.5),
    "row": lambda: BayesianAggregator(momentum=0, granularity="row"),
    "between": lambda: BayesianAggregator(momentum=0, between=True),
    "bn": lambda: FedBN(),
}


@pytest.mark.parametrize("name", WEIGHTED)
def test_the_changes_weighted_by_shares_sum_to_the_merged_change(name):
    state, schema = toy()
    precision = "row" if name == "row" else "element"
    updates = [
        make_update("a", state, schema, seed=1, num_examples=30, precision=precision),
        make_update("b", state, schema, seed=2, num_examples=90, tasks=("lungs",), precision=precision),
        make_update("c", state, schema, seed=3, num_examples=10, precision=precision),
    ]
    drift, after, drifts = round_of(WEIGHTED[name](), updates, state, schema)
    for block in schema.blocks:
        if block.personal:
            continue
        for key in block.keys:
            if name == "bn" and key in schema.norms:
                assert drift.shares(key) == {}
                continue
            if key in schema.statistics().values():
                continue  # the variance of the means is added to it, which is no site's change
            senders = {u.site: u.blocks[block.name].delta[key] for u in updates if block.name in u.blocks}
            shares = drift.shares(key)
            assert set(shares) == set(senders)
            expected = sum(shares[site] * senders[site].flatten() for site in senders)
            torch.testing.assert_close(expected.float(), (after[key] - state[key]).flatten(), atol=1e-6, rtol=1e-5)
    assert set(drifts) == {"a", "b", "c"}
    assert "heads.finding" not in drifts["b"].share
    for block in ("encoder", "heads.finding", "heads.lungs"):
        assert sum(site.share.get(block, 0.0) for site in drifts.values()) == pytest.approx(1)


def test_the_cosine_is_over_all_blocks():
    state, schema = toy()
    updates = [make_update(site, state, schema, seed=i) for i, site in enumerate("ab")]
    _, after, drifts = round_of(FedAvg(), updates, state, schema)
    keys = [key for block in schema.blocks if not block.personal for key in block.keys]
    merged = torch.cat([(after[key] - state[key]).flatten() for key in keys])
    for update in updates:
        own = torch.cat([block.delta[key].flatten() for block in update.blocks.values() for key in block.delta])
        assert drifts[update.site].cosine == pytest.approx(float(torch.cosine_similarity(own, merged, dim=0)), abs=1e-5)


def test_a_sample_of_the_elements_approximates_the_cosine():
    state, schema = toy()
    updates = [make_update(site, state, schema, seed=i) for i, site in enumerate("abc")]
    _, _, whole = round_of(BayesianAggregator(), updates, state, schema)
    _, _, few = round_of(BayesianAggregator(), updates, state, schema, most=12)
    for site in "abc":
        assert few[site].cosine == pytest.approx(whole[site].cosine, abs=0.25)
        assert few[site].cosine != whole[site].cosine
        assert few[site].share["encoder"] == pytest.approx(whole[site].share["encoder"], abs=0.15)


@pytest.mark.parametrize("make, shared, moved", [
    (FedAdam, True, True), (Scaffold, True, True), (CoordinateMedian, False, True), (Local, False, False),
])  # fmt: skip
def test_aggregators_without_weights_or_merge_report_no_share_or_cosine(make, shared, moved):
    state, schema = toy()
    updates = [make_update(site, state, schema, seed=i) for i, site in enumerate("abc")]
    _, _, drifts = round_of(make(), updates, state, schema)
    assert all(bool(site.share) == shared and (site.cosine is not None) == moved for site in drifts.values())


def test_a_single_site_has_share_1_and_measuring_does_not_change_the_merge():
    state, schema = toy()
    update = make_update("pooled", state, schema)
    _, after, drifts = round_of(Pooled(), [update], state, schema)
    assert drifts["pooled"].cosine == pytest.approx(1)
    assert set(drifts["pooled"].share.values()) == {1.0}
    plain = Pooled()
    plain.start(state, schema)
    plain.add(make_update("pooled", state, schema))
    assert all(torch.equal(value, after[key]) for key, value in plain.finish().items())
