"""Fisher merging and inverse variance, against closed forms."""

import pytest
import torch

from federation.aggregators import FisherMerging, InverseVariance, merge
from federation.bayes.curvature import SquaredGradients
from federation.exchange.schema import Block, Schema
from federation.exchange.update import BlockUpdate, Update

SCHEMA = Schema(
    (Block("encoder", ("encoder.w",)),),
    {"encoder.w": (3,)},
    frozenset({"encoder.w"}),
    frozenset(),
    frozenset(),
)
CURVATURES = {"a": torch.tensor([1.0, 2.0, 9.0]), "b": torch.tensor([5.0, 2.0, 1.0])}
DELTAS = {"a": torch.tensor([1.0, 1.0, 1.0]), "b": torch.tensor([-1.0, 3.0, 0.0])}
EVIDENCE = {"a": 10, "b": 40}


def merged(aggregator):
    updates = []
    for site, curvature in CURVATURES.items():
        relative, scale = aggregator.relative({"encoder.w": curvature})
        block = BlockUpdate(EVIDENCE[site], {"encoder.w": DELTAS[site]}, relative, scale)
        updates.append(Update(site, 0, "", "", {"encoder": block}))
    return merge(aggregator, {"encoder.w": torch.zeros(3)}, SCHEMA, updates)["encoder.w"]


def weighted(weights):
    top = sum(EVIDENCE[s] * weights[s].double() * DELTAS[s].double() for s in DELTAS)
    return (top / sum(EVIDENCE[s] * weights[s].double() for s in DELTAS)).float()


def test_fisher_merging_weighs_by_examples_and_absolute_curvature():
    torch.testing.assert_close(merged(FisherMerging(SquaredGradients())), weighted(CURVATURES))


def test_the_site_with_the_larger_loss_dominates_fisher_merging():
    quiet = merged(FisherMerging(SquaredGradients()))
    loud = {**CURVATURES, "a": CURVATURES["a"] * 1e6}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CURVATURES, "a", loud["a"])
        taken = merged(FisherMerging(SquaredGradients()))
    torch.testing.assert_close(taken, DELTAS["a"], atol=1e-4, rtol=0)
    assert (quiet - taken).abs().max() > 0.1


def test_inverse_variance_weights_sites_the_opposite_way():
    torch.testing.assert_close(merged(InverseVariance()), weighted({s: 1 / c for s, c in CURVATURES.items()}))


def test_a_tensor_no_gradient_reached_counts_by_examples():
    with pytest.MonkeyPatch.context() as patch:
        for site in CURVATURES:
            patch.setitem(CURVATURES, site, torch.zeros(3))
        expected = weighted(dict.fromkeys(CURVATURES, torch.ones(3)))
        torch.testing.assert_close(merged(InverseVariance()), expected)
        torch.testing.assert_close(merged(FisherMerging(SquaredGradients())), expected)
