"""Samples of the posterior, uncertainty from them, and the refusal where sampling is not better."""

import math

import pytest
import scipy.stats
import torch

from federation.bayes.posterior import Posterior, SiteMemory
from federation.bayes.uncertainty import box_probabilities, entropy, likelihood_sums, tune_scale, uncertainty
from federation.exchange.schema import Block, Schema
from federation.exchange.update import BlockUpdate, Update
from mtmedformer.errors import ConfigError, DataError
from tests.fixtures.toy_federation import make_update, toy


@pytest.fixture
def posterior():
    mean = {"w": torch.zeros(400, 50), "v": torch.ones(3), "count": torch.tensor(4)}
    precision = {"w": torch.linspace(1, 100, 400)[:, None]}
    return Posterior(mean, precision, {"encoder": ("w",), "heads.lungs": ("v",)}, {"a": {"encoder": {"age": 0}}})


def test_samples_have_the_posterior_spread(posterior):
    drawn = posterior.sample(seed=0, scale=0.5, damping=0.1)["w"]
    expected = 0.5 / (posterior.precision["w"] + 0.1 * posterior.precision["w"].mean()).sqrt()
    z = drawn / expected
    assert abs(float(z.mean())) < 0.03
    assert float(z.std()) == pytest.approx(1, abs=0.02)
    assert float(z[:40].std()) == pytest.approx(1, abs=0.05)
    assert drawn[:40].std() > 3 * drawn[-40:].std()


def test_samples_follow_their_seed_and_leave_the_rest(posterior):
    one, again, other = (posterior.sample(seed)["w"] for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    torch.testing.assert_close(posterior.sample(1, 2.0)["w"], 2 * one)
    assert torch.equal(posterior.sample(1, blocks=["encoder"])["w"], one)
    assert torch.equal(posterior.sample(1, blocks=["heads.lungs"])["w"], posterior.mean["w"])
    drawn = posterior.sample(1)
    assert torch.equal(drawn["v"], posterior.mean["v"])  # no precision: certain
    assert drawn["count"] == 4
    assert all(torch.equal(v, posterior.mean[k]) for k, v in posterior.sample(1, 0).items())
    with pytest.raises(ConfigError, match=r"heads\.lungs"):
        posterior.sample(1, blocks=["heads.lung"])


def test_a_posterior_without_any_data_is_certain():
    zero = Posterior({"w": torch.ones(3)}, {"w": torch.zeros(3)}, {"encoder": ("w",)})
    assert torch.equal(zero.sample(0)["w"], torch.ones(3))


def test_a_posterior_goes_through_a_file(posterior, tmp_path):
    file = tmp_path / "posterior.safetensors"
    posterior.save(file)
    loaded = Posterior.load(file)
    assert loaded.blocks == posterior.blocks
    assert loaded.sites == posterior.sites
    assert torch.equal(loaded.sample(5)["w"], posterior.sample(5)["w"])
    assert [f.name for f in tmp_path.iterdir()] == [file.name]
    for content in (b"", b"\x80\x04not", file.read_bytes()[:200]):
        (tmp_path / "broken").write_bytes(content)
        with pytest.raises(DataError, match="broken: not a posterior"):
            Posterior.load(tmp_path / "broken")


def test_the_memory_keeps_one_number_per_row_and_nothing_personal():
    state, schema = toy()
    memory = SiteMemory()
    memory.replace(make_update("a", state, schema), state, schema)
    factor = memory.factors["a"]["encoder"]
    assert factor.curvature["encoder.0.weight"].shape == (5, 1)
    assert factor.curvature["encoder.3.weight"].shape == (4, 1, 1, 1)
    assert factor.weights == {}
    assert set(factor.curvature) == set(schema.block("encoder").keys) & schema.parameters
    whole = SiteMemory(weights=True)
    update = make_update("a", state, schema)
    whole.replace(update, state, schema)
    assert whole.factors["a"]["encoder"].curvature["encoder.0.weight"].shape == (5, 6)
    delta = update.blocks["encoder"].delta["encoder.0.weight"]
    torch.testing.assert_close(
        whole.factors["a"]["encoder"].weights["encoder.0.weight"], state["encoder.0.weight"] + delta
    )
    assert set(whole.factors["a"]) == {"encoder", "heads.finding", "heads.lungs"}


def test_posterior_precision_is_examples_times_curvature_summed_over_the_owners():
    schema = Schema((Block("encoder", ("w",)),), {"w": (2,)}, frozenset({"w"}), frozenset(), ())
    memory = SiteMemory()
    for site, n, scale, relative in (("a", 10, 3.0, [0.5, 1.5]), ("b", 4, 0.5, [1.0, 1.0])):
        block = BlockUpdate(n, {"w": torch.zeros(2)}, {"w": torch.tensor(relative)}, {"w": scale})
        memory.replace(Update(site, 0, "", "", {"encoder": block}), {"w": torch.zeros(2)}, schema)
    torch.testing.assert_close(memory.precision(0.9)["w"], torch.tensor([15.0 + 2.0, 45.0 + 2.0]))


def test_entropies_equal_scipy():
    p = torch.softmax(torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0)), 1).double()
    torch.testing.assert_close(entropy(p, 1), torch.tensor(scipy.stats.entropy(p.numpy(), axis=1)))
    both = torch.stack([p, 1 - p])
    torch.testing.assert_close(entropy(p), torch.tensor(scipy.stats.entropy(both.numpy(), axis=0)))
    assert entropy(torch.tensor([0.0, 1.0])).tolist() == [0, 0]


def test_mutual_information_measures_disagreement_of_samples():
    torn = torch.tensor([[1.0, 0.5, 0.2], [0.0, 0.5, 0.2]])  # two samples, three pixels
    found = uncertainty(torn)
    torch.testing.assert_close(found.mean, torch.tensor([0.5, 0.5, 0.2]))
    torch.testing.assert_close(found.mutual_information, torch.tensor([math.log(2), 0.0, 0.0]))
    torch.testing.assert_close(found.entropy[:2], torch.full((2,), math.log(2)))
    classes = torch.softmax(torch.randn(7, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0)), 2)
    for dim in (2, -3):
        found = uncertainty(classes, dim)
        assert found.entropy.shape == found.mutual_information.shape == (2, 4, 4)
        assert ((found.mutual_information >= 0) & (found.mutual_information <= found.entropy)).all()
    assert [x.shape for x in found.per_image()] == [(2,), (2,)]
    torch.testing.assert_close(found.per_image()[0], found.entropy.mean((1, 2)))


def test_boxes_are_scored_by_overlapping_boxes_of_each_sample():
    boxes, labels = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]]), torch.tensor([0, 1])
    near = torch.tensor([[1.0, 0, 10, 10], [20, 20, 30, 30], [0, 0, 10, 9]])
    sampled = [
        (near, torch.tensor([0, 0, 0]), torch.tensor([0.9, 0.8, 0.95])),
        (torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), torch.zeros(0)),
    ]
    found = box_probabilities(boxes, labels, sampled)
    torch.testing.assert_close(found, torch.tensor([[0.95, 0.0], [0.0, 0.0]]))  # the second box has another label
    assert uncertainty(found).mutual_information[0] > 0.2
    assert box_probabilities(torch.zeros(0, 4), torch.zeros(0), sampled).shape == (2, 0)


GRID = [0.0, 0.5, 1.0, 2.0]


def overconfident(seed):
    """Return a posterior over a shift with a wrong mean, the likelihood of the known labels, and the labels."""
    generator = torch.Generator().manual_seed(seed)
    posterior = Posterior({"w": torch.full((1,), 4.0)}, {"w": torch.ones(1)}, {"encoder": ("w",)})
    target = (torch.rand(400, generator=generator) < 0.8).float()
    target[::10] = math.nan
    known = target[~target.isnan()].double()

    def likelihood(state):
        p = torch.sigmoid(state["w"]).expand(len(known)).double()
        return {"task": p * known + (1 - p) * (1 - known)}

    return posterior, likelihood, target


def test_sums_of_the_sites_choose_the_scale():
    sums, counts = {}, {}
    for seed, site in enumerate("ab"):
        posterior, likelihood, target = overconfident(seed)
        sums[site], counts[site] = likelihood_sums(posterior, likelihood, GRID, samples=16)["task"]
    assert counts == {"a": 360, "b": 360}
    p = torch.sigmoid(torch.tensor(4.0)).item()
    known = target[~target.isnan()]
    expected = -float((known * math.log(p) + (1 - known) * math.log(1 - p)).sum())
    assert sums["b"][0] == pytest.approx(expected, rel=1e-5)
    tuning = tune_scale(sums, counts, GRID)
    assert not tuning.refused
    assert tuning.scale == min(GRID, key=lambda s: tuning.nll[s]) > 0
    assert tuning.nll[0] == pytest.approx((sums["a"][0] + sums["b"][0]) / 720)
    assert f"{tuning.scale:g}" in tuning.message
    assert likelihood_sums(posterior, likelihood, GRID, samples=16)["task"][0] == sums["b"]


def test_sampling_is_refused_where_the_mean_model_does_better():
    tuning = tune_scale({"a": [10.0, 11.0, 12.0, 30.0], "b": [5.0, 4.5, 4.9, 6.0]}, {"a": 100, "b": 50}, GRID)
    assert tuning.refused
    assert tuning.scale == 0
    assert "refused" in tuning.message
    assert f"{15.5 / 150:.4f}" in tuning.message
    assert f"{15 / 150:.4f}" in tuning.message
    assert tune_scale({"a": [1.0, math.nan, math.inf, 2.0]}, {"a": 1}, GRID).refused
    assert "largest" in tune_scale({"a": [4.0, 3.0, 2.0, 1.0]}, {"a": 1}, GRID).message


def test_a_gain_below_least_gain_is_refused():
    sums, counts = {"a": [100.0, 99.5, 98.0, 120.0]}, {"a": 100}
    assert tune_scale(sums, counts, GRID).scale == 1.0
    assert tune_scale(sums, counts, GRID, least_gain=0.02).scale == 1.0
    refused = tune_scale(sums, counts, GRID, least_gain=0.03)
    assert refused.refused
    assert "0.9800 per label, 1.0000 without it; at least 3 % less is required" in refused.message
    assert "asked for" not in tune_scale({"a": [1.0, 2.0, 3.0, 4.0]}, counts, GRID, least_gain=0.03).message


def test_sums_that_cannot_be_compared_raise():
    with pytest.raises(ConfigError, match="lack 0"):
        tune_scale({"a": [1.0]}, {"a": 1}, [0.5])
    with pytest.raises(ConfigError, match="site b"):
        tune_scale({"a": [1.0] * 4, "b": [1.0]}, {"a": 1, "b": 1}, GRID)
    with pytest.raises(ConfigError, match="no site"):
        tune_scale({"a": [0.0] * 4}, {"a": 0}, GRID)
