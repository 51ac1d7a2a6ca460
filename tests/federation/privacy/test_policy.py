"""Privacy policies: selection, clipping, noise, rounding, accounting and the report of an update."""

import copy
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import RDPAccountant
from scipy import stats
from torch import nn

from federation import BayesianAggregator, FedAvg, FedBN, Pooled, PrivacyPolicy, Scaffold
from federation.exchange.quantization import decoded, encoded, step_of
from federation.exchange.schema import schema_of
from federation.exchange.update import load_update, norms_of, save_update, sha256
from federation.privacy import accounting
from federation.privacy.accounting import PrivacyMemory, epsilon
from federation.privacy.policy import policies_by_site
from federation.server.update_checks import Expected
from mtmedformer.errors import ConfigError, DataError
from tests.fixtures.toy_federation import Toy, make_update, toy

NOISE = {"clip": 1.0, "noise_multiplier": 1.0}
TRAINED = frozenset(name for name, _ in Toy().named_parameters())


def update(seed=0, round=0, **more):
    state, schema = toy()
    made = make_update("north", state, schema, seed, round=round, **more)
    made.samples, made.seconds, made.metrics, made.extra = {"finding": 9, "lungs": 4}, 3.5, {"lungs/dice": 0.5}, {}
    return made


def apply(policy, made=None, memory=None, trained=TRAINED):
    return policy.apply(made or update(), memory or PrivacyMemory(), trained)


def flat(made):
    return torch.cat([value.flatten() for block in made.blocks.values() for value in block.delta.values()])


def directly(noise, rounds, delta=1e-5):
    accountant = RDPAccountant()
    for _ in range(rounds):
        accountant.step(noise_multiplier=noise, sample_rate=1.0)
    return accountant.get_epsilon(delta)


# --- clipping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0.01, 1.0, 100.0])
def test_a_long_update_is_scaled_down_to_the_clip_and_a_short_one_left(size):
    made = update(size=size)
    before = flat(made).clone()
    sent, _, report = apply(PrivacyPolicy(clip=2.0), made)
    norm = float(before.double().norm())
    assert report.norm == pytest.approx(norm, rel=1e-12)
    if norm <= 2:
        assert torch.equal(flat(sent), before)
    else:
        assert float(flat(sent).double().norm()) == pytest.approx(2.0, rel=1e-6)
        torch.testing.assert_close(flat(sent), (before.double() * 2 / norm).float())
    assert report.clipped == pytest.approx(min(norm, 2.0))
    assert torch.equal(flat(made), before), "the argument is not changed"


def test_an_update_that_is_not_finite_is_not_sent():
    made = update()
    made.blocks["encoder"].delta["encoder.0.bias"][2] = float("nan")
    with pytest.raises(DataError, match="north: the change of the weights is not finite"):
        apply(PrivacyPolicy(clip=1.0), made)


# --- noise ------------------------------------------------------------------------------------------------------------


def noise_of(policy, memory=None, **more):
    made = update(size=0.0, **more)
    return flat(apply(policy, made, memory)[0])


def test_the_noise_is_gaussian_of_the_stated_width():
    policy = PrivacyPolicy(clip=0.5, noise_multiplier=3.0, seed=7)
    drawn = torch.cat([noise_of(policy, round=r) for r in range(100)]).double() / 1.5
    assert len(drawn) > 9000
    assert stats.kstest(drawn.numpy(), "norm").pvalue > 1e-3
    assert float(drawn.std()) == pytest.approx(1.0, abs=0.03)


def test_noise_is_added_to_the_clipped_update():
    policy, everything = PrivacyPolicy(clip=0.5, noise_multiplier=2.0, seed=7), frozenset(toy()[0])
    clipped = flat(apply(PrivacyPolicy(clip=0.5), update(size=5.0))[0])
    noised = flat(apply(policy, update(size=5.0), trained=everything)[0])
    quiet = flat(apply(policy, update(size=0.0), trained=everything)[0])
    assert float(quiet.std()) == pytest.approx(1.0, abs=0.3)
    torch.testing.assert_close(noised - quiet, clipped, atol=1e-6, rtol=1e-5)


def test_noise_depends_on_round_site_weight_and_key_only():
    policy = PrivacyPolicy(clip=1.0, noise_multiplier=1.0, seed=7)
    one = noise_of(policy)
    assert torch.equal(one, noise_of(policy))
    assert one.unique().numel() == one.numel()
    other_site = update(size=0.0)
    other_site.site = "south"
    others = [noise_of(policy, round=1), flat(apply(policy, other_site)[0])]
    others.append(noise_of(PrivacyPolicy(clip=1.0, noise_multiplier=1.0, seed=8)))
    others.append(noise_of(PrivacyPolicy(clip=1.0, noise_multiplier=1.0)))
    for other in others:
        assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.4
        assert not torch.isclose(one, other).any()


def test_without_a_seed_the_key_is_drawn_once_and_stays_with_the_site():
    policy = PrivacyPolicy(clip=1.0, noise_multiplier=1.0)
    _, memory, report = apply(policy)
    assert len(bytes.fromhex(memory.key)) == 32
    assert memory.key not in json.dumps(report.plain())
    assert torch.equal(noise_of(policy, memory, round=1), noise_of(policy, copy.deepcopy(memory), round=1))
    assert apply(policy, memory=memory)[1].key == memory.key
    assert apply(policy)[1].key != memory.key


def test_with_noise_nothing_else_computed_from_images_is_sent():
    full, _, _ = apply(PrivacyPolicy())
    assert full.samples
    assert full.counters
    assert full.blocks["encoder"].num_examples == 100
    assert full.blocks["encoder"].precision
    made = update()
    made.extra = {"encoder.0.weight": torch.ones(5, 6)}
    sent, _, report = apply(PrivacyPolicy(clip=1.0, noise_multiplier=1.0, seed=0), made)
    facts = (sent.samples, sent.metrics, sent.counters, sent.extra, sent.steps, sent.seconds)
    assert facts == ({}, {}, {}, {}, 0, 0.0)
    assert {name: block.num_examples for name, block in sent.blocks.items()} == dict.fromkeys(made.blocks, 1)
    assert not any(block.precision or block.scale for block in sent.blocks.values())
    assert {key for block in sent.blocks.values() for key in block.delta} == {k for k in TRAINED if k[:4] != "loss"}
    assert report.norm is None, "the norm after clipping is not reported either"
    assert report.clipped is None
    assert Expected(0, sent.base, toy()[1]).refusal(sent.site, sent) is None


def test_frozen_weights_are_not_sent_with_noise():
    frozen = TRAINED - {"encoder.0.weight"}
    policy = PrivacyPolicy(clip=1.0, noise_multiplier=1.0, seed=0)
    assert "encoder.0.weight" not in apply(policy, trained=frozen)[0].blocks["encoder"].delta


# --- what it is worth -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.6, 1.0, 4.0])
def test_epsilon_is_that_of_opacus_called_directly_and_grows(noise):
    policy, memory, found = PrivacyPolicy(clip=1.0, noise_multiplier=noise, seed=0), PrivacyMemory(), []
    for r in range(4):
        _, memory, report = apply(policy, update(round=r), memory)
        found.append(report.site)
        assert report.site.epsilon == pytest.approx(directly(noise / 2, r + 1), rel=1e-9)
        assert report.site.epsilon_zeroed == pytest.approx(directly(noise, r + 1), rel=1e-9)
        assert (report.site.unit, report.site.delta, report.site.releases) == ("site", 1e-5, r + 1)
        assert report.plain()["epsilon"] == report.site.epsilon
    assert sorted(g.epsilon for g in found) == [g.epsilon for g in found]
    assert all(g.epsilon > g.epsilon_zeroed for g in found)


def test_epsilon_bounds_the_closed_form_of_one_gaussian_release_from_above():
    """Balle and Wang 2018: δ(ε) = Φ(1/2σ − εσ) − e^ε Φ(−1/2σ − εσ) exactly; the accountant's ε must give no more δ."""
    for noise in (0.5, 1.0, 3.0, 30.0):
        found = epsilon([[noise, 1]], 1e-5)
        exact = stats.norm.cdf(0.5 / noise - found * noise)
        exact -= math.exp(found) * stats.norm.cdf(-0.5 / noise - found * noise)
        assert 0 < exact <= 1e-5


def test_one_release_without_noise_ends_the_guarantee():
    policy = PrivacyPolicy(clip=1.0, noise_multiplier=1.0, seed=0)
    _, memory, _ = apply(PrivacyPolicy(clip=1.0))
    report = apply(policy, update(round=1), memory)[2]
    assert (report.site.epsilon, report.site.epsilon_zeroed) == (None, None)
    assert report.site.releases == 2
    assert apply(PrivacyPolicy(clip=1.0))[2].site is None


def test_changed_noise_is_counted_with_its_own_multiplier():
    _, memory, _ = apply(PrivacyPolicy(clip=1.0, noise_multiplier=1.0, seed=0))
    _, memory, report = apply(PrivacyPolicy(clip=1.0, noise_multiplier=2.0, seed=0), update(round=1), memory)
    accountant = RDPAccountant()
    accountant.step(noise_multiplier=0.5, sample_rate=1.0)
    accountant.step(noise_multiplier=1.0, sample_rate=1.0)
    assert report.site.epsilon == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-9)


def test_the_memory_survives_a_checkpoint(tmp_path):
    policy = PrivacyPolicy(clip=1.0, noise_multiplier=1.0, rounding="int8")
    _, memory, _ = apply(policy)
    torch.save(memory.plain(), tmp_path / "memory.pt")
    again = PrivacyMemory(**torch.load(tmp_path / "memory.pt", weights_only=True))
    one, _, told = apply(policy, update(1, round=1), memory)
    other, _, retold = apply(policy, update(1, round=1), again)
    assert sha256(one) == sha256(other)
    assert told.site == retold.site
    assert told.site.releases == 2


# --- rounding ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=30),
    st.sampled_from(["int8", "fp16"]),
    st.integers(-30, 10),
)
def test_rounding_stays_within_its_bound_and_encodes_again_to_the_same_bits(values, rounding, power):
    value = torch.tensor(values) * 2.0**power
    step = step_of(value, rounding)
    crossed = encoded(value, step, rounding)
    back = decoded(crossed, step)
    error = (back.double() - value.double()).abs()
    bound = torch.full_like(error, step / 2) if rounding == "int8" else value.double().abs() / 2**11 + step / 2**25
    assert bool((error <= bound * (1 + 1e-6) + 1e-44).all())
    assert torch.equal(encoded(back, step, rounding), crossed)
    assert crossed.element_size() == {"int8": 1, "fp16": 2}[rounding]


@pytest.mark.parametrize("rounding, size", [("none", 4), ("fp16", 2), ("int8", 1)])
def test_bytes_are_counted_as_sent_and_the_file_gives_float32_back(tmp_path, rounding, size):
    made = update(precision="element")
    sent, _, report = apply(PrivacyPolicy(rounding=rounding), made)
    save_update(sent, tmp_path / "update.safetensors")
    back = load_update(tmp_path / "update.safetensors")
    weights = sum(v.numel() for b in sent.blocks.values() for v in b.delta.values())
    measured = sum(v.numel() for b in sent.blocks.values() for v in b.precision.values())
    counters = sum(v.numel() * 8 for v in sent.counters.values())
    assert report.bytes == size * weights + max(size, 2) * measured + counters == back.nbytes()
    assert {v.dtype for b in back.blocks.values() for v in (*b.delta.values(), *b.precision.values())} == {
        torch.float32
    }
    assert all(bool((v > 0).all()) for b in back.blocks.values() for v in b.precision.values())
    for name, block in sent.blocks.items():
        for kind in ("delta", "precision"):
            for key, value in getattr(block, kind).items():
                assert torch.equal(getattr(back.blocks[name], kind)[key], value)
    assert sha256(back) == report.sha256
    assert Expected(0, back.base, toy()[1]).refusal(back.site, back) is None


@pytest.mark.parametrize("rounding", ["fp16", "int8"])
def test_error_feedback_keeps_the_sum_of_sent_changes_close_to_the_exact_sum(rounding):
    policy, memory = PrivacyPolicy(rounding=rounding), PrivacyMemory()
    meant, sent, forgetful = torch.zeros(0), torch.zeros(0), torch.zeros(0)
    for r in range(60):
        made = update(r % 3, round=r)
        one, memory, _ = apply(policy, made, memory)
        alone, _, _ = apply(policy, made)
        parts = [flat(x).double() for x in (made, one, alone)]
        meant, sent, forgetful = (p if r == 0 else a + p for a, p in zip((meant, sent, forgetful), parts, strict=True))
    largest = max(step for block in one.blocks.values() for step in block.step.values())
    limit = largest * (0.51 if rounding == "int8" else 2.0**-11)
    assert float((sent - meant).abs().max()) <= limit
    assert float((forgetful - meant).abs().max()) > 5 * limit, "without it the error adds up"


def test_rounding_works_on_the_noised_change_alone():
    """Post-processing: what is sent is a function of noised changes, whatever was cut off before."""
    policy = PrivacyPolicy(clip=1.0, noise_multiplier=1.0, seed=3)
    noised = [flat(apply(policy, update(r, round=r))[0]).double() for r in range(3)]
    memory, residual = PrivacyMemory(), 0.0
    for r in range(3):
        sent, memory, _ = apply(PrivacyPolicy(1.0, 1.0, rounding="int8", seed=3), update(r, round=r), memory)
        wanted = noised[r] + residual
        residual = wanted - flat(sent).double()
        kept = torch.cat([memory.residual[k].flatten() for b in sent.blocks.values() for k in b.delta])
        torch.testing.assert_close(residual.float(), kept, atol=1e-6, rtol=0)


# --- what may leave ---------------------------------------------------------------------------------------------------


def test_excluded_blocks_are_not_sent():
    made = update()
    made.extra = {"heads.lungs.weight": torch.ones(3, 5), "encoder.0.weight": torch.ones(5, 6), "else": torch.ones(1)}
    sent, _, report = apply(PrivacyPolicy(blocks=["encoder"]), made)
    assert set(sent.blocks) == {"encoder"}
    assert set(sent.extra) == {"encoder.0.weight"}
    assert not any("heads" in name for name in report.names)
    sent, _, _ = apply(PrivacyPolicy(blocks=["heads.lungs"]), made)
    assert set(sent.blocks) == {"heads.lungs"}
    assert sent.counters == {}, "counters of the encoder's norm stay with it"


def test_precision_may_be_kept_without_noise_and_is_refused_with_it():
    sent, _, _ = apply(PrivacyPolicy(precision=False))
    assert not any(block.precision or block.scale for block in sent.blocks.values())
    with pytest.raises(ConfigError, match=r"privacy\.precision=true"):
        PrivacyPolicy(clip=1.0, noise_multiplier=1.0, precision=True)


def test_the_hash_covers_every_bit_sent():
    sent, _, report = apply(PrivacyPolicy())
    assert len(report.sha256) == 64
    for change in (
        lambda u: u.blocks["encoder"].delta["encoder.0.bias"].mul_(1 + 1e-6),
        lambda u: u.samples.update(lungs=5),
        lambda u: setattr(u, "round", 1),
    ):
        other = copy.deepcopy(sent)
        change(other)
        assert sha256(other) != report.sha256


def test_the_report_is_json_with_names_norms_and_bytes():
    _, _, report = apply(PrivacyPolicy(clip=0.1, noise_multiplier=1.0, rounding="int8", seed=0))
    told = json.loads(json.dumps(report.plain(), allow_nan=False))
    assert told["names"] == report.names
    assert told["norms"].keys() == {"encoder", "heads.finding", "heads.lungs"}
    assert told["epsilon"] == told["site"]["epsilon"] > 0
    plain = apply(PrivacyPolicy())[2].plain()
    assert plain["norms"] == norms_of(apply(PrivacyPolicy())[0])
    assert (plain["epsilon"], plain["site"], plain["example"]) == (None, None, None)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values, words",
    [
        ({"clip": 0.0}, "privacy.clip is 0.0"),
        ({"clip": float("inf")}, "privacy.clip is inf"),
        ({"noise_multiplier": -1.0, "clip": 1.0}, "privacy.noise_multiplier is -1.0"),
        ({"noise_multiplier": 1.0}, "in units of privacy.clip"),
        ({"delta": 0.0}, "privacy.delta is 0.0"),
        ({"rounding": "int4"}, "privacy.rounding is 'int4'"),
        ({"blocks": []}, "privacy.blocks is empty"),
    ],
)
def test_values_out_of_range_are_refused(values, words):
    with pytest.raises(ConfigError, match=words):
        PrivacyPolicy(**values)


def test_noise_without_opacus_is_refused_with_the_way_to_install_it(monkeypatch):
    monkeypatch.setattr(accounting, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'mtmedformer\[privacy\]'"):
        PrivacyPolicy(clip=1.0, noise_multiplier=1.0)
    PrivacyPolicy(clip=1.0, rounding="int8")


def test_policies_are_assigned_by_site_name():
    one, other = PrivacyPolicy(clip=1.0), PrivacyPolicy(clip=2.0)
    assert policies_by_site(None, ["a", "b"], FedAvg()) == {}
    assert policies_by_site(one, ["a", "b"], FedAvg()) == {"a": one, "b": one}
    assert policies_by_site({"b": other}, ["a", "b"], FedAvg()) == {"b": other}
    with pytest.raises(ConfigError, match=r"federation.privacy: no site is called z; there are a, b"):
        policies_by_site({"z": one}, ["a", "b"], FedAvg())


def test_sites_without_counts_beside_sites_with_counts_are_refused():
    guarded = PrivacyPolicy(**NOISE)
    for aggregator in (FedAvg(), BayesianAggregator()):
        with pytest.raises(ConfigError, match="b would weigh as one image"):
            policies_by_site({"b": guarded}, ["a", "b"], aggregator)
        policies_by_site({"a": guarded, "b": guarded}, ["a", "b"], aggregator)
    for aggregator in (FedAvg("equal"), BayesianAggregator(a=0.0)):
        policies_by_site({"b": guarded}, ["a", "b"], aggregator)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(3, 3)
        self.heads = nn.ModuleDict({"lungs": nn.Linear(3, 1)})


@pytest.mark.parametrize(
    "policy, module, aggregator, words",
    [
        ({"blocks": ["heads.heart"]}, Plain, FedAvg, "no block is called heads.heart; there are encoder, heads.lungs"),
        ({"clip": 1.0}, Plain, Pooled, "all data in one place"),
        (NOISE, Plain, Scaffold, "Scaffold sends more than the change"),
        (NOISE, Plain, lambda: BayesianAggregator(between=True), "needs the sites' curvature"),
        ({"precision": False}, Plain, lambda: BayesianAggregator(between=True), "needs the sites' curvature"),
        (NOISE, Toy, FedAvg, r"encoder.2 is a BatchNorm1d"),
    ],
)
def test_models_and_aggregators_outside_the_policy_are_refused(policy, module, aggregator, words):
    built = module()
    with pytest.raises(ConfigError, match=words):
        PrivacyPolicy(**policy).check(built, schema_of(built), aggregator())


@pytest.mark.parametrize(
    "policy, module, aggregator",
    [(NOISE, Plain, BayesianAggregator), (NOISE, Toy, FedBN), ({"clip": 1.0}, Toy, Scaffold)],
)
def test_supported_models_and_aggregators_pass(policy, module, aggregator):
    built = module()
    PrivacyPolicy(**policy).check(built, schema_of(built), aggregator())
