"""Predictions by samples of the posterior: the mean model at scale 0, averages above it."""

import pytest
import torch
import torch.nn.functional as F

from federation.bayes.posterior import Posterior
from federation.bayes.sampling import SampledModel, TruthLikelihood, averaged
from federation.bayes.uncertainty import likelihood_sums, uncertainty
from federation.client.train import state_of
from federation.exchange.schema import schema_of
from mtmedformer.batch import Task
from tests.fixtures.square_sites import SquareSite, square_model


@pytest.fixture(scope="module")
def module():
    return square_model().eval()


@pytest.fixture(scope="module")
def posterior(module):
    state, schema = state_of(module), schema_of(module)
    precision = {name: torch.full((), 1e3) for name, _ in module.named_parameters()}
    blocks = {block.name: block.keys for block in schema.blocks if not block.personal}
    return Posterior(state, precision, blocks)


@pytest.fixture(scope="module")
def batches():
    return list(SquareSite(8).val_dataloader())


def same(a, b):
    if isinstance(a, list):
        return all(torch.equal(x[k], y[k]) for x, y in zip(a, b, strict=True) for k in ("boxes", "scores", "labels"))
    return torch.equal(a, b)


@torch.no_grad()
def test_scale_0_equals_the_mean_model_bit_for_bit(module, posterior, batches):
    plain = module.predict_whole(batches[0].image)
    found = SampledModel(module, posterior, dict.fromkeys(module.tasks, 0.0))(module.predict_whole, batches[0].image)
    assert found.uncertainties == {}
    assert all(same(found.predictions[name], plain[name]) for name in plain)
    one = SampledModel(module, posterior, {"health": 1.0, "organ": 0.0}, samples=2)
    found = one(module.predict_whole, batches[0].image)
    assert set(found.uncertainties) == {"health"}
    assert all(same(found.predictions[name], plain[name]) for name in ("signs", "nodules", "organ"))
    assert not torch.equal(found.predictions["health"], plain["health"])
    assert all(torch.equal(value, posterior.mean[key]) for key, value in module.state_dict().items())


@torch.no_grad()
def test_each_task_is_the_mean_over_its_own_samples(module, posterior, batches):
    image = batches[0].image
    scales = {"health": 1.0, "signs": 3.0, "nodules": 1.0, "organ": 3.0}
    found = SampledModel(module, posterior, scales, samples=3, seed=5)(module.predict_whole, image)
    drawn = {}
    for scale in (1.0, 3.0):
        drawn[scale] = []
        for seed in (5, 6, 7):
            module.load_state_dict(posterior.sample(seed, scale))
            drawn[scale].append(module.predict_whole(image))
    module.load_state_dict(posterior.mean)
    for name in ("health", "signs", "organ"):
        samples = torch.stack([p[name] for p in drawn[scales[name]]])
        expected = uncertainty(samples, 2 if name == "health" else None)
        torch.testing.assert_close(found.predictions[name], samples.mean(0))
        torch.testing.assert_close(found.uncertainties[name].entropy, expected.entropy)
        torch.testing.assert_close(found.uncertainties[name].mutual_information, expected.mutual_information)
        assert (found.uncertainties[name].mutual_information > 1e-6).any()
    assert found.uncertainties["organ"].entropy.shape == found.predictions["organ"].shape
    for boxes, plain in zip(found.predictions["nodules"], module.predict_whole(image)["nodules"], strict=True):
        assert len(boxes["scores"]) == len(plain["scores"]) == len(boxes["entropy"])
        assert (boxes["scores"].diff() <= 0).all()
        assert {tuple(b.tolist()) for b in boxes["boxes"]} == {tuple(b.tolist()) for b in plain["boxes"]}


@torch.no_grad()
def test_raw_predictions_are_averaged_beside_the_calibrated(module, posterior, batches):
    def predict(image):
        found = module.predict_whole(image)
        return found | {"raw/health": found["health"].flip(1)}

    found = SampledModel(module, posterior, {"health": 1.0}, samples=2)(predict, batches[0].image)
    torch.testing.assert_close(found.predictions["raw/health"], found.predictions["health"].flip(1))
    assert set(found.uncertainties) == {"health"}


def test_exclusive_masks_have_the_background_in_their_entropy():
    task = Task("organs", "segmentation", ("liver", "spleen"))
    samples = [torch.randn(2, 3, 4, 4).softmax(1)[:, 1:] for _ in range(4)]
    mean, doubt = averaged(task, samples[0], samples)
    torch.testing.assert_close(mean, torch.stack(samples).mean(0))
    whole = torch.cat([1 - mean.sum(1, keepdim=True), mean], dim=1)
    torch.testing.assert_close(doubt.entropy, torch.special.entr(whole).sum(1))
    assert doubt.entropy.shape == (2, 4, 4)


def test_the_likelihood_of_the_truth_is_that_of_torch(module, posterior, batches):
    found = TruthLikelihood(module, batches, posterior.mean)(posterior.mean)
    health, signs, organ = [], [], []
    for batch in batches:
        with torch.no_grad():
            outputs = module(batch.image)
        rows = batch.targets["health"].present
        health.append(F.cross_entropy(outputs["health"].logits[rows], batch.targets["health"].labels[rows],
                                      reduction="none"))  # fmt: skip
        labels = batch.targets["signs"].labels
        bce = F.binary_cross_entropy_with_logits(outputs["signs"].logits, labels.nan_to_num(0.0), reduction="none")
        signs.append(bce[~labels.isnan()])
        rows = batch.targets["organ"].present
        logits = module.heads["organ"].class_logits(outputs["organ"], (32, 32))[rows]
        masks = batch.targets["organ"].masks[rows].float()
        organ.append(F.binary_cross_entropy_with_logits(logits, masks, reduction="none").flatten())
    for name, expected in (("health", health), ("signs", signs), ("organ", organ)):
        expected = torch.cat(expected)
        assert len(found[name]) == len(expected)
        assert float(-found[name].double().log().sum()) == pytest.approx(float(expected.sum()), rel=1e-4)
    assert ((found["nodules"] >= 0) & (found["nodules"] <= 1)).all()
    module.load_state_dict(posterior.mean)


def test_sums_of_several_tasks_equal_those_of_single_tasks(posterior):
    true = (torch.rand(50, generator=torch.Generator().manual_seed(0)) < 0.3).float()
    key = "heads.health.classifier.1.bias"
    assert key in posterior.mean

    def predict(state):
        return torch.sigmoid(state[key][0] * torch.linspace(-2, 2, 50))

    def likelihood(state):
        p = predict(state).double()
        return {"one": torch.where(true == 1, p, 1 - p), "two": p[:7]}

    grid = [0.0, 1.0, 10.0]
    sums = likelihood_sums(posterior, likelihood, grid, samples=4)
    alone, count = likelihood_sums(posterior, lambda state: {"one": likelihood(state)["one"]}, grid, samples=4)["one"]
    assert sums["one"] == (pytest.approx(alone, rel=1e-9), count)
    assert sums["two"][1] == 7
