"""Secure sums: only the total is revealed, and the Bayesian merge needs nothing else."""

import hashlib
import itertools
import secrets

import numpy as np
import pytest
import torch
from scipy import stats

from federation import BayesianAggregator, CoordinateMedian, FedAvg, FedAvgM, FedBN, Scaffold, merge
from federation.exchange.update import examples_of
from federation.privacy.random_stream import KEY_BYTES, normals, words
from federation.privacy.secure_merge import merge_sums, summands
from federation.privacy.secure_sum import PRIME, Member, SecureSum, decode, encode, join, split
from mtmedformer.errors import ConfigError
from tests.fixtures.toy_federation import make_update, toy


def members(sites, session="round 1", threshold=None, seeds=None):
    """Return members that have shared their seeds with one another."""
    seeds = seeds or {pair: secrets.token_bytes(KEY_BYTES) for pair in itertools.combinations(sorted(sites), 2)}
    made = {}
    for site in sites:
        own = {a if b == site else b: seed for (a, b), seed in seeds.items() if site in (a, b)}
        made[site] = Member(site, own, session, threshold or len(sites) // 2 + 1)
    for site, member in made.items():
        for other, share in member.shares().items():
            made[other].keep(site, share)
    return made


def summed(values, delivered=None, answered=None, threshold=None):
    """Run the protocol over the sites' values; return the server's sums."""
    sites = sorted(values)
    party = members(sites, threshold=threshold)
    first = values[sites[0]]
    threshold = party[sites[0]].threshold
    server = SecureSum(sites, threshold, {name: tuple(value.shape) for name, value in first.items()})
    delivered = sites if delivered is None else delivered
    for site in delivered:
        server.add(site, party[site].mask(values[site]))
    answered = delivered if answered is None else answered
    return server.finish({site: party[site].reveal(delivered) for site in answered})


def numbers(sites, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        site: {"w": torch.randn(7, 5, generator=generator) * 3, "v": torch.randn((), generator=generator).double()}
        for site in sites
    }


def total(values, sites):
    return {name: sum(values[site][name].double() for site in sites) for name in values[sites[0]]}


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_masked_sum_is_the_plain_sum(count):
    values = numbers("abcde"[:count])
    found, plain = summed(values), total(values, sorted(values))
    for name in plain:
        torch.testing.assert_close(found[name], plain[name], atol=count * 2.0**-33, rtol=0)
        assert found[name].shape == plain[name].shape


@pytest.mark.parametrize("gone", ["a", "c", "e", "ad"])
def test_sites_that_drop_out_are_left_out_of_the_sum(gone):
    values = numbers("abcde")
    stay = [site for site in "abcde" if site not in gone]
    found, plain = summed(values, delivered=stay), total(values, stay)
    for name in plain:
        torch.testing.assert_close(found[name], plain[name], atol=5 * 2.0**-33, rtol=0)


def test_a_site_that_delivers_and_then_drops_out_still_counts():
    values = numbers("abcde")
    found, plain = summed(values, delivered=list("abcd"), answered=list("bcd")), total(values, list("abcd"))
    torch.testing.assert_close(found["w"], plain["w"], atol=5 * 2.0**-33, rtol=0)


def test_too_few_answers_lose_the_sum_and_reveal_nothing():
    values = numbers("abcde")
    with pytest.raises(RuntimeError, match="2 sites answered, 3 are required"):
        summed(values, answered=["a", "b"])
    with pytest.raises(RuntimeError, match="2 sites delivered, 3 are required"):
        summed(values, delivered=["a", "b"], answered=["a", "b"])


def test_a_single_masked_summand_is_uniform_noise():
    """All ones, 20 000 times: masked, each byte and the whole are uniform, and unlike in another session."""
    ones = {"w": torch.ones(20_000)}
    seeds = {pair: secrets.token_bytes(KEY_BYTES) for pair in itertools.combinations("abc", 2)}
    first = members("abc", "round 1", seeds=seeds)["b"].mask(ones)["w"]
    second = members("abc", "round 2", seeds=seeds)["b"].mask(ones)["w"]
    for sent in (first, second, first - second):
        assert stats.kstest(sent / 2.0**64, "uniform").pvalue > 1e-7
        counts = np.bincount(np.ascontiguousarray(sent).view(np.uint8), minlength=256)
        assert stats.chisquare(counts).pvalue > 1e-7
    assert abs(np.corrcoef(first / 2.0**64, second / 2.0**64)[0, 1]) < 0.04
    plain = encode(ones["w"], 3)
    assert stats.kstest(plain / 2.0**64, "uniform").pvalue < 1e-12, "the test detects values without a mask"


def test_without_the_self_mask_a_late_update_would_be_revealed():
    """The server took b for dropped, undid its pairwise masks, and then b's update arrives."""
    values = numbers("abc")
    party = members("abc", threshold=2)
    late = party["b"].mask(values["b"])["w"]
    revealed = [party[site].reveal(["a", "c"]) for site in "ac"]
    for other in "ac":
        seed = join({i * 2: shares["b"][f"pair {other}"] for i, shares in enumerate(revealed)})
        stream = words(seed, "w", late.size)
        late = late - stream if other > "b" else late + stream
    assert stats.kstest(late / 2.0**64, "uniform").pvalue > 1e-7
    assert all("self" not in shares["b"] for shares in revealed)
    unmasked = late - words(party["b"]._own, "w", late.size)
    torch.testing.assert_close(decode(unmasked, (7, 5)).float(), values["b"]["w"], atol=1e-9, rtol=0)


def test_a_site_reveals_one_kind_of_seed_and_only_once():
    party = members("abc")
    delivered = party["a"].reveal(["a", "b"])
    assert {sender: sorted(names) for sender, names in delivered.items()} == {
        "a": ["self"],
        "b": ["self"],
        "c": ["pair a", "pair b"],
    }
    with pytest.raises(RuntimeError, match="only once"):
        party["a"].reveal(["a", "c"])
    party["b"].mask({"w": torch.ones(2)})
    with pytest.raises(RuntimeError, match="one sum only"):
        party["b"].mask({"w": torch.ones(2)})


def test_shares_do_not_reveal_the_permanent_seeds():
    seeds = {pair: secrets.token_bytes(KEY_BYTES) for pair in itertools.combinations("abc", 2)}
    party = members("abc", threshold=2, seeds=seeds)
    shares = [party[site].reveal(["a", "b"]) for site in "ab"]
    session = join({i: revealed["c"]["pair a"] for i, revealed in enumerate(shares)})
    assert session == party["a"]._pairs["c"]
    assert session not in seeds.values()
    assert members("abc", "round 2", seeds=seeds)["a"]._pairs["c"] != session


def test_threshold_shares_restore_the_secret_and_fewer_are_uniform():
    secret = secrets.token_bytes(KEY_BYTES)
    cut = split(secret, 5, 3)
    for chosen in itertools.combinations(range(5), 3):
        assert join({i: cut[i] for i in chosen}) == secret
    drawn = [split(bytes(KEY_BYTES), 5, 3)[0] / PRIME for _ in range(2000)]
    assert stats.kstest(drawn, "uniform").pvalue > 1e-7
    with pytest.raises(OverflowError):
        join({i: cut[i] for i in range(2)})


def test_a_threshold_that_is_no_majority_and_a_short_seed_are_refused():
    seed = secrets.token_bytes(KEY_BYTES)
    with pytest.raises(ValueError, match="more than half"):
        Member("a", {"b": seed, "c": seed, "d": seed}, "s", 2)
    with pytest.raises(ValueError, match="32 bytes"):
        Member("a", {"b": b"short"}, "s", 2)


@pytest.mark.parametrize("value", [2.0**31, float("nan"), float("inf")])
def test_numbers_that_do_not_fit_are_refused(value):
    with pytest.raises(OverflowError, match="do not fit"):
        encode(torch.tensor([0.0, value]), 3)


def test_the_random_stream_is_shake256_and_its_normals_are_normal():
    first = int.from_bytes(hashlib.shake_256(bytes(KEY_BYTES) + b"label").digest(8), "little")
    assert words(bytes(KEY_BYTES), "label", 1).tolist() == [first]
    assert words(bytes(KEY_BYTES), "label", 2).tolist() == words(bytes(KEY_BYTES), "label", 5).tolist()[:2]
    assert words(bytes(KEY_BYTES), "other", 1)[0] != words(bytes(KEY_BYTES), "label", 1)[0]
    drawn = normals(bytes(KEY_BYTES), "noise", (300, 200))
    assert drawn.shape == (300, 200)
    assert stats.kstest(drawn.flatten().numpy(), "norm").pvalue > 1e-3
    with pytest.raises(ValueError, match="32 bytes"):
        words(b"short", "label", 1)


AGGREGATORS = {
    "bayes": lambda: BayesianAggregator(),
    "bayes_counts": lambda: BayesianAggregator(a=1.0, rho=1.0, kappa=0.0, momentum=0.0),
    "bayes_personal": lambda: BayesianAggregator(personal_models=True),
    "bayes_row": lambda: BayesianAggregator(granularity="row"),
    "fedavg": lambda: FedAvg(),
    "bn": lambda: FedBN(),
    "momentum": lambda: FedAvgM(),
}


@pytest.mark.parametrize("name", AGGREGATORS)
def test_the_merge_needs_only_sums(name):
    state, schema = toy()
    kind = "row" if name == "bayes_row" else "element"
    updates = [
        make_update("a", state, schema, 1, num_examples=120, precision=kind),
        make_update("b", state, schema, 2, tasks=("lungs",), num_examples=7, precision=kind),
        make_update("c", state, schema, 3, tasks=("lungs",), num_examples=55, precision=kind),
    ]
    plain = merge(AGGREGATORS[name](), state, schema, updates)
    declared = {u.site: examples_of(u) for u in updates}
    sums = summed({u.site: summands(AGGREGATORS[name](), u, schema, declared) for u in updates})
    merged = merge_sums(AGGREGATORS[name](), state, sums, schema)
    for key, value in plain.items():
        if key not in schema.counters:
            torch.testing.assert_close(merged[key], value, atol=1e-7, rtol=1e-6)
    assert not torch.equal(merged["encoder.0.weight"], state["encoder.0.weight"])


def test_an_unlabelled_task_stays_and_owners_are_not_revealed():
    state, schema = toy()
    updates = [make_update(site, state, schema, i, tasks=("lungs",)) for i, site in enumerate("abc")]
    terms = {u.site: summands(BayesianAggregator(balance_tasks=False), u, schema) for u in updates}
    merged = merge_sums(BayesianAggregator(balance_tasks=False), state, summed(terms), schema)
    assert torch.equal(merged["heads.finding.weight"], state["heads.finding.weight"])
    assert not torch.equal(merged["heads.lungs.weight"], state["heads.lungs.weight"])
    other = summands(BayesianAggregator(balance_tasks=False), make_update("d", state, schema, 5), schema)
    assert {k: v.shape for k, v in other.items()} == {k: v.shape for k, v in terms["a"].items()}
    assert not any(key.split("|")[1].startswith("loss") for key in other)


def test_shares_of_tasks_need_the_declared_counts():
    state, schema = toy()
    with pytest.raises(ConfigError, match="balance_tasks to false"):
        summands(BayesianAggregator(), make_update("a", state, schema, 1), schema)


@pytest.mark.parametrize(
    "aggregator",
    [
        CoordinateMedian(),
        Scaffold(),
        BayesianAggregator(between=True),
        BayesianAggregator(beta=0.1),
        BayesianAggregator(b=0.5),
    ],
)
def test_aggregators_that_need_single_updates_are_refused(aggregator):
    state, schema = toy()
    with pytest.raises(ConfigError, match="single updates"):
        summands(aggregator, make_update("a", state, schema), schema)
