"""The Bayesian merge against its own algebra, closed forms, and FedAvg."""

import copy
import math
from functools import partial

import pytest
import torch

from federation.aggregators import FedAvg, FedAvgM, FedProx, merge
from federation.aggregators.bayesian import BayesianAggregator
from federation.bayes.curvature import NoCurvature, SquaredGradients
from federation.bayes.site_weights import between_variance
from federation.exchange.schema import Block, Schema
from federation.exchange.update import BlockUpdate, Update
from mtmedformer.errors import ConfigError
from tests.fixtures.toy_federation import make_update, toy

SCHEMA = Schema(
    (Block("encoder", ("w",)), Block("heads.lungs", ("v",), "lungs")),
    {"w": (6, 4), "v": (3,)},
    frozenset({"w", "v"}),
    frozenset(),
    (),
)


bayes = partial(
    BayesianAggregator, a=0.0, momentum=0.0, saturation=math.inf, balance_tasks=False
)  # the merge alone; the rest has tests of its own, below


def start():
    generator = torch.Generator().manual_seed(0)
    return {"w": torch.randn(6, 4, generator=generator), "v": torch.randn(3, generator=generator)}


def quadratic(site, state, seed, num_examples, scale=None, spread=1.0, round=0, tasks=True):
    """Return a site whose loss is quadratic: its optimum is reached, and its curvature known exactly."""
    generator = torch.Generator().manual_seed(seed)
    blocks, facts = {}, {}
    for name, key in (("encoder", "w"), ("heads.lungs", "v")):
        optimum = torch.randn(state[key].shape, generator=generator) * spread
        relative = torch.rand(state[key].shape, generator=generator) + 0.1
        relative /= relative.mean()
        facts[key] = (optimum, relative * (scale or 1.0))
        if name == "encoder" or tasks:
            precision, scales = {key: relative}, {key: scale or 1.0}
            blocks[name] = BlockUpdate(num_examples, {key: optimum - state[key]}, precision, scales)
    return Update(site, round, "", "", blocks), facts


def pooled(facts, counts, key):
    """Return the minimum of the sum of all sites' losses."""
    top = sum(n * f[key][1].double() * f[key][0].double() for f, n in zip(facts, counts, strict=True))
    return (top / sum(n * f[key][1].double() for f, n in zip(facts, counts, strict=True))).float()


def test_one_round_of_quadratic_sites_is_the_pooled_optimum():
    state, counts = start(), [10, 200, 35]
    updates, facts = zip(*[quadratic("abc"[i], state, i, n) for i, n in enumerate(counts)], strict=True)
    merged = merge(bayes(a=1, rho=1, kappa=0), state, SCHEMA, updates)
    for key in ("w", "v"):
        torch.testing.assert_close(merged[key], pooled(facts, counts, key), rtol=1e-5, atol=1e-6)
    averaged = merge(FedAvg(), state, SCHEMA, updates)["w"]
    assert (averaged - pooled(facts, counts, "w")).abs().max() > 0.1


def test_without_variance_between_sites_absolute_curvature_weights_them():
    state, counts, scales = start(), [10, 200, 35], [3.0, 0.2, 40.0]
    made = [quadratic("abc"[i], state, i, n, scales[i], spread=1e-3) for i, n in enumerate(counts)]
    updates, facts = zip(*made, strict=True)
    aggregator = bayes(between=True, kappa=0)
    merged = merge(aggregator, state, SCHEMA, updates)
    assert aggregator.variances == {"w": 0.0, "v": 0.0}
    for key in ("w", "v"):
        torch.testing.assert_close(merged[key], pooled(facts, counts, key), rtol=1e-3, atol=2e-7)


@pytest.mark.parametrize("kappa", [0.0, 0.1, 3.0])
@pytest.mark.parametrize("a", [0.0, 0.5, 1.0])
def test_the_merge_is_the_closed_form_with_shrinkage_to_the_owners_mean(kappa, a):
    state, counts = start(), [10, 200, 35]
    made = [quadratic("abc"[i], state, i, n) for i, n in enumerate(counts)]
    merged = merge(bayes(a=a, kappa=kappa, eta=0.5), state, SCHEMA, [update for update, _ in made])
    n = [count**a for count in counts]
    deltas = [update.blocks["encoder"].delta["w"].double() for update, _ in made]
    weights = [n[i] * facts["w"][1].double() for i, (_, facts) in enumerate(made)]
    total, mean = sum(weights), sum(n[i] * d for i, d in enumerate(deltas)) / sum(n)
    bar = total.mean()
    step = (sum(w * d for w, d in zip(weights, deltas, strict=True)) + kappa * bar * mean) / (total + kappa * bar)
    torch.testing.assert_close(merged["w"], (state["w"] + 0.5 * step).float(), rtol=1e-6, atol=1e-6)


OFF = {"rho": {"rho": 0.0}, "curvature": {"curvature": NoCurvature()}, "ones": {"rho": 1.0}}


@pytest.mark.parametrize("a, weights", [(1.0, "num_examples"), (0.0, "equal")])
@pytest.mark.parametrize("off", list(OFF))
def test_without_curvature_it_is_fedavg_to_the_last_bit(off, a, weights):
    state, schema = toy()
    kinds = ["ones", "ones", "tensor"] if off == "ones" else ["element", "row", None]
    aggregator, plain, other = bayes(a=a, **OFF[off]), FedAvg(weights), state
    for number in range(3):
        updates = [
            make_update(
                "abc"[i],
                state,
                schema,
                10 * number + i,
                num_examples=[10, 301, 43][i],
                precision=kinds[i],
                round=number,
            )
            for i in range(3)
        ]
        state, other = merge(aggregator, state, schema, updates), merge(plain, other, schema, updates)
        assert all(torch.equal(value, other[key]) for key, value in state.items())
    assert aggregator.exchange.precision == (off == "ones")
    if off != "ones":
        updates = [make_update("abc"[i], state, schema, i, num_examples=[10, 301, 43][i]) for i in range(3)]
        merged = merge(bayes(a=a), state, schema, updates)
        plainly = merge(FedAvg(weights), state, schema, updates)
        assert not torch.equal(merged["encoder.0.weight"], plainly["encoder.0.weight"])


@pytest.mark.parametrize("kind", ["element", "row"])
def test_the_scale_of_a_loss_does_not_change_the_weight_of_a_site(kind):
    state, schema = toy()
    quiet = [make_update(site, state, schema, i, precision=kind) for i, site in enumerate("ab")]
    loud = copy.deepcopy(quiet)
    for block in loud[1].blocks.values():
        block.precision = {key: value * 2**20 for key, value in block.precision.items()}
        block.scale = {key: value * 2**20 for key, value in block.scale.items()}
    one, other = merge(bayes(), state, schema, quiet), merge(bayes(), state, schema, loud)
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], rtol=1e-6, atol=1e-7)


def test_the_variance_between_sites_equals_a_hand_computed_value():
    # mean (1*1 + 1*2 + 2*4)/4 = 2.75; Q = 1.75² + .75² + 2*1.25² = 6.75; spread 4 - 6/4 = 2.5; (6.75 - 2)/2.5 = 1.9
    changes, precisions = [torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([4.0])], [1.0, 1.0, 2.0]
    assert between_variance(changes, precisions) == pytest.approx(1.9, rel=1e-12)
    # a second element that does not differ halves Q: (3.375 - 2)/2.5 = .55
    assert between_variance([torch.cat([c, torch.zeros(1)]) for c in changes], precisions) == pytest.approx(0.55)
    assert between_variance(changes[:1], precisions[:1]) == 0
    assert between_variance([torch.ones(3)] * 3, precisions) == 0


def test_the_variance_between_sites_is_recovered_from_generated_sites():
    generator = torch.Generator().manual_seed(3)
    noise = [0.5, 1.0, 2.0, 1.0, 0.2, 3.0]  # standard deviation within each site
    changes = [torch.randn(20000, generator=generator) * math.sqrt(0.7 + sd**2) for sd in noise]
    assert between_variance(changes, [sd**-2 for sd in noise]) == pytest.approx(0.7, rel=0.05)


def one_number(site, state, change, precision, round=0, num_examples=1):
    """Return an update of the six by four tensor, all changes and precisions alike."""
    block = BlockUpdate(
        num_examples, {"w": torch.full((6, 4), change)}, {"w": torch.ones(())}, {"w": precision / num_examples}
    )
    return Update(site, round, "", "", {"encoder": block})


def test_sites_weigh_one_over_within_and_between():
    state = start()
    made = {"a": (1.0, 1.0, 5), "b": (2.0, 1.0, 1), "c": (4.0, 2.0, 2)}
    aggregator = bayes(between=True)
    merged = merge(
        aggregator, state, SCHEMA, [one_number(s, state, d, p, num_examples=n) for s, (d, p, n) in made.items()]
    )
    assert aggregator.variances["w"] == pytest.approx(1.9, rel=1e-6)
    weights = [1 / (1 / p + 1.9) for _, p, _ in made.values()]
    mean = sum(w * d for w, (d, _, _) in zip(weights, made.values(), strict=True)) / sum(weights)
    torch.testing.assert_close(merged["w"], state["w"] + mean, rtol=1e-5, atol=1e-5)
    assert mean == pytest.approx(2.4416, abs=1e-4)  # by precision alone 2.75, of equal sites 2.333


def test_a_factor_is_replaced_and_never_counted_twice():
    state = start()
    aggregator = bayes(gamma=0.5)
    for number, (a, b) in enumerate([(3.0, 5.0), (4.0, 6.0), (2.0, 7.0)]):
        updates = [one_number("a", state, 0.1, a, number), one_number("b", state, 0.1, b, number)]
        state = merge(aggregator, state, SCHEMA, updates)
        posterior = aggregator.posterior(state, SCHEMA)
        torch.testing.assert_close(posterior.precision["w"], torch.tensor(a + b))
    for number, expected in {3: 2.0 * 0.5 + 1.0, 4: 2.0 * 0.25 + 1.0}.items():  # a is away: discounted with its age
        state = merge(aggregator, state, SCHEMA, [one_number("b", state, 0.1, 1.0, number)])
        torch.testing.assert_close(aggregator.posterior(state, SCHEMA).precision["w"], torch.tensor(expected))
    assert aggregator.posterior(state, SCHEMA).sites["a"]["encoder"] == {"num_examples": 1, "age": 2}
    state = merge(aggregator, state, SCHEMA, [one_number("a", state, 0.1, 9.0, 5), one_number("b", state, 0.1, 1.0, 5)])
    torch.testing.assert_close(aggregator.posterior(state, SCHEMA).precision["w"], torch.tensor(10.0))


def test_a_repeated_round_changes_neither_ages_nor_counts():
    state = start()
    aggregator = bayes(gamma=0.5)
    first = merge(aggregator, state, SCHEMA, [one_number(s, state, 0.1, 4.0) for s in "ab"])
    for _ in range(2):
        merge(aggregator, first, SCHEMA, [one_number("a", first, 0.1, 4.0, 1)])
    torch.testing.assert_close(aggregator.posterior(first, SCHEMA).precision["w"], torch.tensor(4.0 + 2.0))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("remember", [True, False])
def test_an_absent_site_counts_with_the_configured_discount(gamma, remember):
    state = start()
    aggregator = bayes(remember=remember, gamma=gamma)
    state = merge(aggregator, state, SCHEMA, [one_number(s, state, d, 1.0) for s, d in {"a": 1.0, "b": 3.0}.items()])
    # both moved to +2; b's own weights stay 1 above that
    merged = merge(aggregator, state, SCHEMA, [one_number("a", state, 0.0, 1.0, 1)])
    expected = gamma * 1.0 / (1 + gamma) if remember else 0.0
    torch.testing.assert_close(merged["w"], state["w"] + expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(merged["v"], state["v"])


def test_remember_changes_nothing_while_all_sites_take_part():
    state, schema = toy()
    plain, remembering, other = bayes(a=1), bayes(a=1, remember=True), state
    for number in range(3):
        updates = [
            make_update("abc"[i], state, schema, 3 * number + i, num_examples=i + 1, round=number) for i in range(3)
        ]
        state, other = merge(plain, state, schema, updates), merge(remembering, other, schema, updates)
        assert all(torch.equal(value, other[key]) for key, value in state.items())


def test_beta_equals_fedprox_until_there_is_a_precision():
    state, schema = toy()
    aggregator = bayes(beta=0.3)
    name, moved = "encoder.0.weight", state["encoder.0.weight"] + torch.randn(5, 6)
    plain = FedProx(0.3).site_objective("a").gradient(name, moved, state[name])
    assert torch.equal(aggregator.site_objective("a").gradient(name, moved, state[name]), plain)
    merge(aggregator, state, schema, [make_update(site, state, schema, i) for i, site in enumerate("ab")])
    weighted = aggregator.site_objective("a").gradient(name, moved, state[name])
    ratio = weighted / plain
    torch.testing.assert_close(ratio.mean(), torch.tensor(1.0))
    torch.testing.assert_close(ratio, ratio[:, :1].expand(5, 6))  # one number an output row
    assert ratio.std() > 0.05
    assert bayes(beta=0.3, rho=0.0).site_objective("a").precision == {}
    assert bayes().site_objective("a").gradient(name, moved, state[name]) is None


def test_precision_has_the_configured_granularity():
    raw = {"w": torch.rand(6, 4) + 0.01, "v": torch.rand(3) + 0.01}
    shapes = {"element": (6, 4), "row": (6, 1), "tensor": ()}
    for granularity, shape in shapes.items():
        aggregator = bayes(granularity=granularity, rho=1)
        relative, scale = aggregator.relative(raw)
        assert torch.broadcast_shapes(relative["w"].shape, (6, 4)) == (6, 4)
        assert relative["w"].numel() == math.prod(shape)
        assert scale["w"] == pytest.approx(float(raw["w"].mean()), rel=1e-4)
    assert isinstance(bayes().curvature, SquaredGradients)
    assert not bayes(NoCurvature()).exchange.precision


@pytest.mark.parametrize(
    "wrong",
    [
        {"rho": 1.5},
        {"a": -0.1},
        {"b": 2.0},
        {"momentum": 1.0},
        {"gamma": 2.0},
        {"kappa": -1.0},
        {"beta": -1.0},
        {"granularity": "head"},
    ],
)
def test_numbers_out_of_range_raise_an_error_with_their_name(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        bayes(**wrong)


@pytest.mark.parametrize("lookahead", [False, True])
def test_momentum_without_curvature_is_fedavgm_to_the_last_bit(lookahead):
    state, schema = toy()
    aggregator = BayesianAggregator(
        rho=0.0, b=0.0, a=1.0, momentum=0.6, eta=0.8, lookahead=lookahead, balance_tasks=False, saturation=math.inf
    )
    plain, other = FedAvgM(0.6, 0.8, lookahead=lookahead), state
    for number in range(3):
        state, other = aggregator.starting_state(state), plain.starting_state(other)
        updates = [
            make_update("abc"[i], state, schema, 10 * number + i, num_examples=i + 1, round=number) for i in range(3)
        ]
        state, other = merge(aggregator, state, schema, updates), merge(plain, other, schema, updates)
        assert all(torch.equal(value, other[key]) for key, value in state.items())


def test_steps_that_agree_add_up():
    first = start()
    aggregator, state = BayesianAggregator(momentum=0.5, lookahead=False), first
    for number in range(12):
        before = state
        state = merge(aggregator, state, SCHEMA, [one_number(site, state, 1.0, 1.0, number) for site in "ab"])
    torch.testing.assert_close(state["w"] - before["w"], torch.full((6, 4), 2.0), rtol=1e-3, atol=1e-3)
    assert torch.equal(state["v"], first["v"])


@pytest.mark.parametrize("b", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("scales, told", [([4.0, 0.25], [4.0, 0.25]), ([1e9, 1e-9], [10.0, 0.1])])
def test_mean_curvature_counts_to_the_power_b_clipped_to_tenfold(b, scales, told):
    state, aggregator = start(), bayes(b=b, kappa=0)
    for number, levels in enumerate([[1.0, 1.0], scales]):
        made = [quadratic("ab"[i], state, i, 50, scale, round=number) for i, scale in enumerate(levels)]
        merged = merge(aggregator, state, SCHEMA, [update for update, _ in made])
    relative = [facts["w"][1].double() / scale for scale, (_, facts) in zip(scales, made, strict=True)]
    weights = [level**b * r for level, r in zip(told, relative, strict=True)]
    optima = [facts["w"][0].double() for _, facts in made]
    expected = sum(w * o for w, o in zip(weights, optima, strict=True)) / sum(weights)
    torch.testing.assert_close(merged["w"], expected.float(), rtol=1e-4, atol=1e-5)


def test_the_first_round_ignores_mean_curvature():
    state = start()
    updates = [quadratic("ab"[i], state, i, 50, scale)[0] for i, scale in enumerate([4.0, 0.25])]
    one, other = (merge(bayes(b=b), state, SCHEMA, updates) for b in (0.0, 0.5))
    assert torch.equal(one["w"], other["w"])
