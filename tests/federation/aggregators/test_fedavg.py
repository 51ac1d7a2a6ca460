"""Averages, server optimizers, robust centres and reference points, each against an independent calculation."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from federation.aggregators import (
    BayesianAggregator,
    CoordinateMedian,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedBN,
    FedYogi,
    Local,
    Pooled,
    TrimmedMean,
    merge,
)
from federation.aggregators.weighted_mean import CHUNK, WeightedMeans
from mtmedformer.errors import ConfigError
from tests.fixtures.toy_federation import make_update, toy

KEY = "encoder.0.weight"


def numbers(updates, key=KEY, block="encoder"):
    return np.stack([u.blocks[block].delta[key].double().numpy() for u in updates])


def test_means_by_examples_and_of_equal_sites():
    state, schema = toy()
    counts = [10, 300, 41]
    updates = [make_update("abc"[i], state, schema, i, num_examples=n) for i, n in enumerate(counts)]
    for weights, expected in {"num_examples": counts, "equal": [1, 1, 1]}.items():
        merged = merge(FedAvg(weights), state, schema, updates)
        for key in set(schema.block("encoder").keys) - set(schema.statistics().values()):  # running means too
            mean = np.average(numbers(updates, key), axis=0, weights=expected)
            np.testing.assert_allclose(merged[key].numpy(), state[key].numpy() + mean, rtol=0, atol=3e-7)
    with pytest.raises(ConfigError, match="neither"):
        FedAvg("samples")


@pytest.mark.parametrize("aggregator", [FedAvg(), FedAvgM(lookahead=True), BayesianAggregator(saturation=math.inf)])
def test_merged_batchnorm_statistics_are_those_of_the_union(aggregator):
    state, schema = toy()
    mean, variance = "encoder.2.running_mean", "encoder.2.running_var"
    assert schema.statistics() == {mean: variance}
    generator = torch.Generator().manual_seed(3)
    images = {n: torch.randn(n, 5, generator=generator) * n / 10 + n for n in (10, 25, 4)}
    updates = []
    for i, (n, values) in enumerate(images.items()):
        update = make_update("abc"[i], state, schema, i, num_examples=n)
        update.blocks["encoder"].delta[mean] = values.mean(0) - state[mean]
        update.blocks["encoder"].delta[variance] = values.var(0, correction=0) - state[variance]
        updates.append(update)
    merged = merge(aggregator, state, schema, updates)
    union = torch.cat(list(images.values()))
    torch.testing.assert_close(merged[mean], union.mean(0), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(merged[variance], union.var(0, correction=0), atol=2e-4, rtol=1e-5)


def test_examples_are_counted_per_block():
    state, schema = toy()
    a, b = make_update("a", state, schema, 1), make_update("b", state, schema, 2)
    a.blocks["heads.lungs"].num_examples = 300
    merged = merge(FedAvg(), state, schema, [a, b])
    for block, weights in {"encoder": [1, 1], "heads.lungs": [3, 1]}.items():
        key = schema.block(block).keys[0]
        mean = np.average(numbers([a, b], key, block), axis=0, weights=weights)
        np.testing.assert_allclose((merged[key] - state[key]).numpy(), mean, atol=3e-7)


@pytest.mark.parametrize("shape", [(), (7,), (3, CHUNK // 2 + 5), (CHUNK + 3, 2), (5, 2, 3, 3), (1, 4), (0, 3)])
@pytest.mark.parametrize("grains", ["tensor", "row", "element", "tensor row element", "element tensor", "row element"])
def test_running_sums_equal_the_weighted_mean_for_every_granularity(shape, grains):
    generator = torch.Generator().manual_seed(0)
    means, top, bottom = WeightedMeans(), 0.0, 0.0
    for grain in grains.split() * 2:
        rows = (shape[0], *[1] * (len(shape) - 1)) if shape else ()
        size = {"tensor": (), "row": rows, "element": shape}[grain]
        weight = torch.rand(size, generator=generator).double() + 0.1
        value = torch.randn(shape, generator=generator)
        means.add("w", value, weight)
        top, bottom = top + value.double() * weight, bottom + weight
    assert list(means) == ["w"]
    mean = means.pop("w")
    assert mean.dtype == torch.float64
    assert mean.shape == shape
    exact = "element" not in grains or len(shape) < 2
    torch.testing.assert_close(mean, top / bottom, rtol=1e-14 if exact else 1e-6, atol=1e-14 if exact else 1e-6)
    assert list(means) == []
    assert means.nbytes() == 0


def test_sums_take_two_copies_of_the_model_at_most():
    for weight in (1.0, torch.rand(500, 1) + 0.1, torch.rand(500, 400) + 0.1):
        means = WeightedMeans()
        for _ in range(3):
            means.add("w", torch.randn(500, 400), weight)
        assert means.nbytes() <= 2.01 * 4 * 500 * 400


def test_fedbn_keeps_every_norm_at_the_site():
    state, schema = toy()
    merged = merge(FedBN(), state, schema, [make_update("a", state, schema, 1), make_update("b", state, schema, 2)])
    assert any(".1." in key for key in schema.norms)
    assert any("running_var" in key for key in schema.norms)
    for key in schema.block("encoder").keys:
        assert torch.equal(merged[key], state[key]) == (key in schema.norms)


def descend(aggregator, rounds=4):
    """Return weights and mean changes of a few rounds."""
    state, schema = toy()
    path, changes = [state[KEY].double().numpy()], []
    for i in range(rounds):
        updates = [make_update(site, state, schema, 10 * i + j, round=i) for j, site in enumerate("ab")]
        state = merge(aggregator, state, schema, updates)
        path.append(state[KEY].double().numpy())
        changes.append(numbers(updates).mean(0))
    return path, changes


def test_fedavgm_equals_torch_sgd_with_momentum():
    path, changes = descend(FedAvgM(momentum=0.8, lr=0.7))
    parameter = torch.nn.Parameter(torch.tensor(path[0]))
    optimiser = torch.optim.SGD([parameter], lr=0.7, momentum=0.8)
    for weights, change in zip(path[1:], changes, strict=True):
        parameter.grad = -torch.tensor(change)
        optimiser.step()
        np.testing.assert_allclose(weights, parameter.detach().numpy(), atol=2e-6)


def test_lookahead_equals_torch_nesterov_momentum():
    """Oracle: torch moves where gradients are taken, so its path is that of ``starting_state``."""
    state, schema = toy()
    aggregator = FedAvgM(momentum=0.8, lr=0.7, lookahead=True)
    parameter = torch.nn.Parameter(state[KEY].double().clone())
    optimiser = torch.optim.SGD([parameter], lr=0.7, momentum=0.8, nesterov=True)
    for i in range(5):
        begun = aggregator.starting_state(state)
        torch.testing.assert_close(begun[KEY].double(), parameter.detach(), rtol=0, atol=3e-6)
        updates = [make_update(site, begun, schema, 10 * i + j, round=i) for j, site in enumerate("ab")]
        state = merge(aggregator, begun, schema, updates)
        parameter.grad = -torch.tensor(numbers(updates).mean(0))
        optimiser.step()


def test_lookahead_step_has_the_same_length_and_ends_with_the_last_update():
    """The same changes add up to the same weights; only where they were measured differs."""
    state, schema = toy()
    plain, ahead = FedAvgM(0.6), FedAvgM(0.6, lookahead=True)
    one = other = state
    for i in range(4):
        begun = ahead.starting_state(other)
        assert (i == 0) == torch.equal(begun[KEY], other[KEY])
        one = merge(plain, one, schema, [make_update("a", one, schema, i, round=i)])
        other = merge(ahead, begun, schema, [make_update("a", begun, schema, i, round=i)])
        torch.testing.assert_close(one[KEY], other[KEY], rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", [FedAdam, FedYogi])
def test_adaptive_steps_equal_algorithm_2_of_the_paper(kind):
    lr, beta1, beta2, tau = 0.05, 0.7, 0.9, 0.02
    path, changes = descend(kind(lr=lr, beta1=beta1, beta2=beta2, tau=tau))
    m, v, w = np.zeros_like(path[0]), np.full_like(path[0], tau**2), path[0]
    for weights, d in zip(path[1:], changes, strict=True):
        m = beta1 * m + (1 - beta1) * d
        v = beta2 * v + (1 - beta2) * d**2 if kind is FedAdam else v - (1 - beta2) * d**2 * np.sign(v - d**2)
        w = w + lr * m / (np.sqrt(v) + tau)
        np.testing.assert_allclose(weights, w, atol=3e-6)


def test_server_optimizers_average_running_statistics():
    state, schema = toy()
    updates = [make_update(site, state, schema, i) for i, site in enumerate("ab")]
    plain = merge(FedAvg(), state, schema, updates)
    for aggregator in (FedAdam(lr=1.0), FedAvgM(lr=0.1)):
        merged = merge(aggregator, state, schema, updates)
        assert torch.equal(merged["encoder.2.running_mean"], plain["encoder.2.running_mean"])
        assert not torch.equal(merged[KEY], plain[KEY])


def test_momentum_of_a_task_is_unchanged_without_labels():
    state, schema = toy()
    aggregator = FedAvgM()
    first = merge(aggregator, state, schema, [make_update("a", state, schema)])
    second = merge(aggregator, first, schema, [make_update("a", first, schema, 1, ["finding"])])
    for key in schema.block("heads.lungs").keys:
        assert torch.equal(first[key], second[key])


@pytest.mark.parametrize("sites", [1, 2, 4, 5, 7])
def test_robust_centres_equal_numpy_and_scipy(sites):
    state, schema = toy()
    updates = [make_update("abcdefg"[i], state, schema, i, num_examples=10**i) for i in range(sites)]
    deltas = numbers(updates)
    expected = {
        CoordinateMedian(): np.median(deltas, axis=0),
        TrimmedMean(0.3): scipy.stats.trim_mean(deltas, 0.3, axis=0),
        TrimmedMean(0): deltas.mean(0),
    }
    for aggregator, centre in expected.items():
        merged = merge(aggregator, state, schema, updates)
        np.testing.assert_allclose((merged[KEY] - state[KEY]).numpy(), centre, atol=5e-7)
    with pytest.raises(ConfigError, match=r"\[0, 0\.5\)"):
        TrimmedMean(0.5)


@pytest.mark.parametrize("aggregator", [CoordinateMedian(), TrimmedMean(0.2)], ids=["median", "trimmed"])
def test_one_outlier_site_moves_no_weight_beyond_the_others(aggregator):
    state, schema = toy()
    good = [make_update(site, state, schema, i) for i, site in enumerate("abcd")]
    wild = make_update("wild", state, schema, 9, size=1e6, num_examples=10**9)
    moved = merge(aggregator, state, schema, [*good, wild])[KEY] - state[KEY]
    deltas = numbers(good)
    assert (moved.numpy() <= deltas.max(0) + 1e-6).all()
    assert (moved.numpy() >= deltas.min(0) - 1e-6).all()


def test_local_merges_nothing_and_pooled_takes_one_update():
    state, schema = toy()
    updates = [make_update(site, state, schema, i) for i, site in enumerate("ab")]
    assert not Local.exchange.merged
    assert all(torch.equal(v, state[k]) for k, v in merge(Local(), state, schema, updates).items())
    assert Pooled.data == "pooled"
    merged = merge(Pooled(), state, schema, updates[:1])
    torch.testing.assert_close(merged[KEY], state[KEY] + updates[0].blocks["encoder"].delta[KEY])
    with pytest.raises(ValueError, match="one site"):
        merge(Pooled(), state, schema, updates)
