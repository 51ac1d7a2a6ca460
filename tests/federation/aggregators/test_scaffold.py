"""SCAFFOLD on quadratic sites, where FedAvg is known to drift and the optimum is known."""

import pytest
import torch

from federation.aggregators import FedAvg, Scaffold, merge
from federation.exchange.schema import Block, Schema
from federation.exchange.update import BlockUpdate, Update
from tests.fixtures.toy_federation import make_update, toy

SCHEMA = Schema((Block("encoder", ("w",)),), {"w": (2,)}, frozenset({"w"}), frozenset(), ())
SITES = {  # curvature and optimum of each site's loss
    "a": (torch.tensor([4.0, 0.5]), torch.tensor([1.0, 1.0])),
    "b": (torch.tensor([0.5, 2.0]), torch.tensor([-1.0, 3.0])),
    "c": (torch.tensor([1.0, 1.0]), torch.tensor([2.0, -2.0])),
}
LR, STEPS = 0.05, 20


def train(aggregator, site, state, number):
    """Run a site's local SGD under the aggregator's objective; return its update and its mean gradient."""
    curvature, optimum = SITES[site]
    objective, start, w = aggregator.site_objective(site), state["w"], state["w"].clone()
    total = torch.zeros_like(w)
    for _ in range(STEPS):
        gradient = curvature * (w - optimum)
        total += gradient
        w = w - LR * (gradient + (correction if (correction := objective.gradient("w", w, start)) is not None else 0))
    extra = objective.extra({"w": w}, state, STEPS, LR)
    update = Update(site, number, "", "", {"encoder": BlockUpdate(10, {"w": w - start})}, extra=extra, steps=STEPS)
    return update, total / STEPS


def run(aggregator, rounds):
    state = {"w": torch.zeros(2)}
    for number in range(rounds):
        state = merge(aggregator, state, SCHEMA, [train(aggregator, site, state, number)[0] for site in SITES])
    return state["w"]


def test_scaffold_reaches_the_pooled_optimum_where_fedavg_drifts():
    optimum = sum(c * o for c, o in SITES.values()) / sum(c for c, _ in SITES.values())
    assert (run(FedAvg(), 60) - optimum).abs().max() > 0.1
    torch.testing.assert_close(run(Scaffold(), 60), optimum, rtol=0, atol=1e-4)


def test_a_renewed_control_is_the_mean_gradient_of_the_round():
    aggregator, state = Scaffold(), {"w": torch.zeros(2)}
    for number in range(3):
        trained = {site: train(aggregator, site, state, number) for site in SITES}
        for update, gradient in trained.values():
            torch.testing.assert_close(update.extra["w"], gradient, rtol=1e-4, atol=1e-5)
        state = merge(aggregator, state, SCHEMA, [update for update, _ in trained.values()])
    controls = aggregator.state_dict()["controls"]
    mean = sum(controls[site]["w"] for site in SITES) / 3
    torch.testing.assert_close(aggregator.state_dict()["common"]["w"], mean)
    objective = aggregator.site_objective("b")
    torch.testing.assert_close(objective.gradient("w", state["w"], state["w"]), mean - controls["b"]["w"])


def test_absent_sites_keep_their_control_and_new_sites_start_at_zero():
    aggregator, state = Scaffold(), {"w": torch.zeros(2)}
    both = [train(aggregator, site, state, 0)[0] for site in "ab"]
    state = merge(aggregator, state, SCHEMA, both)
    kept = aggregator.state_dict()["controls"]["b"]["w"]
    state = merge(aggregator, state, SCHEMA, [train(aggregator, "a", state, 1)[0]])
    assert torch.equal(aggregator.state_dict()["controls"]["b"]["w"], kept)
    common = aggregator.state_dict()["common"]["w"]
    assert torch.equal(aggregator.site_objective("new").gradient("w", state["w"], state["w"]), common)


def test_controls_belong_to_the_blocks_a_site_trained():
    state, schema = toy()
    update = make_update("a", state, schema, tasks=["finding"])
    update.extra["heads.lungs.weight"] = torch.ones(3, 5)
    aggregator = Scaffold()
    merge(aggregator, state, schema, [update, make_update("b", state, schema, 1)])
    saved = aggregator.state_dict()
    assert "heads.lungs.weight" not in saved["controls"]["a"]
    assert torch.equal(saved["common"]["heads.lungs.weight"], saved["controls"]["b"]["heads.lungs.weight"])


def test_a_site_without_steps_renews_no_control():
    objective = Scaffold().site_objective("a")
    objective.gradient("w", torch.ones(2), torch.zeros(2))
    assert objective.extra({"w": torch.ones(2)}, {"w": torch.zeros(2)}, 0, LR) == {}
    assert objective.extra({"w": torch.ones(2)}, {"w": torch.zeros(2)}, 5, 0.0) == {}
    assert objective.extra({"w": torch.ones(2)}, {"w": torch.zeros(2)}, 5, 0.1)["w"].tolist() == pytest.approx([-2, -2])
