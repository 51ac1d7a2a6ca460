"""The weights of sites in shared blocks, where every task has the same weight."""

import math

import pytest
import torch

from federation.aggregators import merge
from federation.aggregators.bayesian import BayesianAggregator
from federation.bayes.site_weights import task_shares
from federation.exchange.update import BlockUpdate, Update
from mtmedformer.errors import ConfigError
from tests.fixtures.toy_federation import make_update, toy

ENCODER, FINDING, LUNGS = "encoder", "heads.finding", "heads.lungs"


def plain(**options):
    return BayesianAggregator(rho=0.0, momentum=0.0, **{"saturation": math.inf} | options)


def gradient_step(site, state, gradients, counts):
    """Return the update of a site after one step of size 1 on the mean of its tasks' losses.

    Args:
        gradients: By task, the gradient of the site's mean loss of that task.
        counts: By task, the labelled images.
    """
    encoder = {"encoder.0.bias": -sum(gradients.values()) / len(gradients)}
    heads = {task: {f"heads.{task}.bias": torch.ones_like(state[f"heads.{task}.bias"])} for task in counts}
    blocks = {f"heads.{task}": BlockUpdate(n, heads[task]) for task, n in counts.items()}
    return Update(site, 0, "", "", {ENCODER: BlockUpdate(sum(counts.values()), encoder), **blocks})


def test_one_step_of_sites_with_one_task_each_is_a_step_on_the_hybrid_loss_of_the_union():
    state, schema = toy()
    generator = torch.Generator().manual_seed(1)
    counts = {"a": ("finding", 2932), "b": ("finding", 574), "c": ("lungs", 169)}
    gradients = {site: torch.randn(5, generator=generator) for site in counts}
    updates = [gradient_step(s, state, {t: gradients[s]}, {t: n}) for s, (t, n) in counts.items()]
    merged = merge(plain(a=1.0), state, schema, updates)
    finding = (2932 * gradients["a"] + 574 * gradients["b"]) / (2932 + 574)
    union = (finding + gradients["c"]) / 2  # the hybrid loss is the mean over tasks
    torch.testing.assert_close(merged["encoder.0.bias"], state["encoder.0.bias"] - union)


def test_shares_by_hand():
    _, schema = toy()
    counts = {
        "a": {ENCODER: 100, FINDING: 100},
        "b": {ENCODER: 400, FINDING: 300, LUNGS: 100},
        "c": {ENCODER: 10, LUNGS: 10, FINDING: 0},
        "d": {ENCODER: 7},  # labelled for no task with a head
    }
    even = task_shares(counts, schema, lambda n: 1.0)
    assert even == pytest.approx({"a": 1 / 2, "b": 1 / 2 + 1 / 2, "c": 1 / 2, "d": 1})
    by_images = task_shares(counts, schema, float)
    assert by_images == pytest.approx({"a": 1 / 4, "b": 3 / 4 + 10 / 11, "c": 1 / 11, "d": 1})
    assert task_shares({}, schema, float) == {}


@pytest.mark.parametrize("a", [0.0, 0.5, 1.0])
def test_the_shares_of_all_sites_add_up_to_the_number_of_tasks(a):
    _, schema = toy()
    counts = {site: {ENCODER: 9 * n, FINDING: n, LUNGS: 8 * n} for site, n in (("a", 3), ("b", 50), ("c", 1000))}
    assert sum(task_shares(counts, schema, BayesianAggregator(a=a).evidence).values()) == pytest.approx(2)


@pytest.mark.parametrize("a", [0.0, 1.0])
def test_with_the_same_labels_everywhere_the_shares_change_nothing(a):
    state, schema = toy()
    updates = [make_update("abc"[i], state, schema, i, num_examples=10 * i + 3) for i in range(3)]
    balanced = merge(BayesianAggregator(a=a), state, schema, updates)
    other = merge(BayesianAggregator(a=a, balance_tasks=False), state, schema, updates)
    for key, value in balanced.items():
        torch.testing.assert_close(value, other[key])


def test_heads_are_weighted_by_their_own_images_only():
    state, schema = toy()
    updates = [
        make_update("a", state, schema, 1, num_examples=30),
        make_update("b", state, schema, 2, tasks=("finding",), num_examples=10),
    ]
    merged = merge(plain(a=1.0), state, schema, updates)
    first, second = (one.blocks[FINDING].delta["heads.finding.weight"] for one in updates)
    torch.testing.assert_close(
        merged["heads.finding.weight"], state["heads.finding.weight"] + (30 * first + 10 * second) / 40
    )


@pytest.mark.parametrize("remember", [False, True])
def test_a_task_whose_only_site_is_absent_keeps_its_weight_if_the_site_is_remembered(remember):
    state, schema = toy()
    aggregator = plain(a=1.0, remember=remember, gamma=1.0)
    sites = [
        make_update("a", state, schema, 1, tasks=("finding",), num_examples=300),
        make_update("b", state, schema, 2, tasks=("finding",), num_examples=100),
        make_update("c", state, schema, 3, tasks=("lungs",), num_examples=5),
    ]
    once = merge(aggregator, state, schema, sites)
    again = merge(aggregator, state, schema, sites[:2])
    changes = [one.blocks[ENCODER].delta["encoder.0.bias"] for one in sites]
    finding = (300 * changes[0] + 100 * changes[1]) / 400
    expected = (finding + changes[2]) / 2 if remember else finding
    torch.testing.assert_close(once["encoder.0.bias"], state["encoder.0.bias"] + (finding + changes[2]) / 2)
    torch.testing.assert_close(again["encoder.0.bias"], state["encoder.0.bias"] + expected)


def test_evidence_is_the_images_of_a_small_site_and_saturates_for_a_large_one():
    bayes = BayesianAggregator(a=1.0, saturation=100.0)
    assert bayes.evidence(1) == pytest.approx(1 / 1.01)
    assert bayes.evidence(100) == pytest.approx(50)
    assert bayes.evidence(10**9) == pytest.approx(100)
    assert BayesianAggregator(a=1.0, saturation=math.inf).evidence(3000) == 3000
    assert BayesianAggregator(a=0.0).evidence(3000) == 1


def test_evidence_weights_a_site_as_the_random_effects_model_does():
    between, image = 0.03, 3.0  # variance between sites, and of a single image
    bayes = BayesianAggregator(a=1.0, saturation=image / between)
    for first, second in [(5, 50), (169, 2932)]:
        precisions = [1 / (between + image / n) for n in (first, second)]
        assert bayes.evidence(first) / bayes.evidence(second) == pytest.approx(precisions[0] / precisions[1])


def test_a_saturation_of_zero_is_refused():
    with pytest.raises(ConfigError, match=r"aggregator\.saturation: 0 is not above 0"):
        BayesianAggregator(saturation=0)
