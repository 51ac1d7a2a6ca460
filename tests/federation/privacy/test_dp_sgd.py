"""DP-SGD within a site, against gradients per patient and Opacus called directly."""

import copy
import itertools
from dataclasses import replace

import lightning as L
import pytest
import torch
from opacus.accountants import RDPAccountant
from torch import nn

from federation import ExamplePrivacy, FedAvg, PrivacyPolicy
from federation.client.lightning_internals import build_site_trainer
from federation.client.train import SiteState, train_site
from federation.exchange.schema import schema_of
from federation.privacy.dp_sgd import PrivateGradients, add_clipped
from federation.privacy.random_stream import key_of
from federation.site_loaders import Site
from mtmedformer import (
    ClassificationHead,
    DetectionHead,
    HybridLoss,
    MultiTaskModule,
    SegmentationHead,
    SharedEncoder,
)
from mtmedformer.batch import Batch, Boxes, Meta, Sample, Task, collate
from mtmedformer.errors import ConfigError
from mtmedformer.losses import FixedWeighting, UncertaintyWeighting
from tests.fixtures.toy_sites import TASKS, ToySite, toy_module, toy_plan

ALMOST_NONE = 1e-9


class Bench:
    """Stands for a Trainer: all that noised gradients ask of one."""

    precision = "32-true"
    accumulate_grad_batches = 1


def quiet(seed=0, **settings):
    module = toy_module(seed, **settings)
    module.encoder[3].p = 0.0
    module.log = lambda *args, **kwargs: None
    return module


def gradients(module, batch, settings, label="", steps=1):
    """Return the private gradient of a batch, the last of ``steps``."""
    module = copy.deepcopy(module)
    private = PrivateGradients(settings, key_of(0), label)
    private.attach(module, Bench())
    for _ in range(steps):
        module.zero_grad()
        module.backward(module.training_step(batch, 0))
    return {name: p.grad for name, p in module.named_parameters()}, private


def one_by_one(module, batch, clip, units):
    """Return the mean over units of their clipped gradients, taken in a plain loop."""
    total = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    for rows in units:
        module.zero_grad()
        part = Batch(
            image=batch.image[rows],
            targets={k: t[torch.tensor(rows)] for k, t in batch.targets.items()},
            meta=[batch.meta[row] for row in rows],
        )
        sum(module.losses(part).values()).backward()
        grads = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in module.named_parameters()}
        norm = torch.cat([g.flatten() for g in grads.values()]).norm()
        for name, grad in grads.items():
            total[name] += grad * min(1.0, clip / float(norm))
    return {name: value / len(units) for name, value in total.items()}


def batch_of(n=4, patients=None, **settings):
    site = ToySite(n=n, batch_size=n, **settings)
    batch = collate(site.samples, TASKS)
    if patients:
        batch.meta = [replace(meta, patient=patient) for meta, patient in zip(batch.meta, patients, strict=True)]
    return batch


@pytest.mark.parametrize("clip", [0.01, 0.4, 100.0])
@pytest.mark.parametrize("tasks", [("left", "right"), ("right",)])
def test_the_gradient_is_the_mean_of_clipped_gradients_of_single_patients(clip, tasks):
    module, batch = quiet(), batch_of(tasks=tasks)
    found, private = gradients(module, batch, ExamplePrivacy(clip, ALMOST_NONE))
    wanted = one_by_one(copy.deepcopy(module), batch, clip, [[0], [1], [2], [3]])
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-4)
    assert private.releases == 1


def test_without_clipping_it_is_the_gradient_of_the_batch():
    module, batch = quiet(), batch_of()
    found, _ = gradients(module, batch, ExamplePrivacy(1e6, 1e-15))
    sum(module.losses(batch).values()).backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-6, rtol=1e-4)


def test_no_patient_moves_the_sum_by_more_than_the_clip():
    module, batch = quiet(), batch_of(n=3)
    everyone, _ = gradients(module, batch, ExamplePrivacy(0.2, ALMOST_NONE))
    for gone in range(3):
        rows = [row for row in range(3) if row != gone]
        part = Batch(
            image=batch.image[rows],
            targets={k: t[torch.tensor(rows)] for k, t in batch.targets.items()},
            meta=[batch.meta[row] for row in rows],
        )
        others, _ = gradients(module, part, ExamplePrivacy(0.2, ALMOST_NONE))
        moved = torch.cat([(3 * everyone[k] - 2 * others[k]).flatten() for k in everyone])
        assert float(moved.norm()) == pytest.approx(0.2, rel=1e-4), "each of these gradients is longer than the clip"


def test_images_of_one_patient_are_clipped_together():
    module, batch = quiet(), batch_of(n=4, patients=["p", "q", "p", "p"])
    found, private = gradients(module, batch, ExamplePrivacy(0.1, ALMOST_NONE))
    wanted = one_by_one(copy.deepcopy(module), batch, 0.1, [[0, 2, 3], [1]])
    apart, _ = gradients(module, batch, ExamplePrivacy(0.1, ALMOST_NONE, unit="image"))
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-4)
    assert not torch.allclose(found["encoder.1.weight"], apart["encoder.1.weight"], atol=1e-4)
    assert private.releases == 1


def test_the_noise_has_the_stated_width_for_unlabelled_heads_too():
    module, batch = quiet(), batch_of(n=4, tasks=("right",))
    exact, _ = gradients(module, batch, ExamplePrivacy(0.5, 1e-15))
    drawn, heads = [], []
    for step in range(40):
        noised, _ = gradients(module, batch, ExamplePrivacy(0.5, 2.0), label=f"{step}")
        drawn.append(torch.cat([(noised[k] - exact[k]).flatten() for k in noised]))
        heads.append(noised["heads.left.weight"])
    width = 0.5 * 2.0 / 4
    assert float(torch.cat(drawn).std()) == pytest.approx(width, rel=0.04)
    assert float(torch.stack(heads).std()) == pytest.approx(width, rel=0.1)
    assert len(torch.cat(drawn).unique()) == 40 * len(drawn[0])


def test_every_batch_has_noise_of_its_own():
    module, batch = quiet(), batch_of()
    first, _ = gradients(module, batch, ExamplePrivacy(0.5, 1.0))
    second, _ = gradients(module, batch, ExamplePrivacy(0.5, 1.0), steps=2)
    assert not torch.isclose(first["encoder.1.weight"], second["encoder.1.weight"]).any()


def test_a_gradient_that_is_not_finite_adds_nothing():
    total = [torch.zeros(2), torch.zeros(1)]
    add_clipped(total, (torch.tensor([float("nan"), 1.0]), torch.ones(1)), 1.0)
    add_clipped(total, (torch.tensor([float("inf"), 1.0]), None), 1.0)
    add_clipped(total, (None, None), 1.0)
    add_clipped(total, (torch.zeros(2), torch.zeros(1)), 1.0)
    assert not torch.cat(total).any()
    add_clipped(total, (torch.tensor([3.0, 0.0]), torch.tensor([4.0])), 1.0)
    torch.testing.assert_close(torch.cat(total), torch.tensor([0.6, 0.0, 0.8]))


# --- within a site's round --------------------------------------------------------------------------------------------


def make(**settings):
    outer = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    return lambda: build_site_trainer(lambda **kw: L.Trainer(**settings, **kw), outer)


def trained(policy=None, module=None, data=None, memory=None, round=0, **settings):
    module = module or quiet_template()
    site = Site("north", data or ToySite(), dict(TASKS))
    plan = toy_plan(module, round)
    return train_site("north", module, site, plan, memory or SiteState(), FedAvg(), make(**settings), privacy=policy)


def quiet_template(**settings):
    module = toy_module(**settings)
    module.encoder[3].p = 0.0
    return module


def deltas(result):
    return {key: value for block in result.update.blocks.values() for key, value in block.delta.items()}


def private(clip=1e6, noise=1e-15, **more):
    return PrivacyPolicy(examples=ExamplePrivacy(clip, noise, **more), seed=0)


@pytest.mark.parametrize(
    "settings", [{}, {"accumulate_grad_batches": 3}, {"max_epochs": 2}, {"gradient_clip_val": 0.1}]
)
def test_without_clip_and_noise_a_round_is_unchanged(settings):
    plain, found = trained(**settings), trained(private(), **settings)
    for key, value in deltas(plain).items():
        torch.testing.assert_close(deltas(found)[key], value, atol=1e-6, rtol=1e-4)
    assert found.state.steps == plain.state.steps


def test_counts_are_not_sent_and_labels_decide_which_blocks_are():
    result = trained(private(1.0, 1.0), data=ToySite(tasks=("right",)))
    assert {name: block.num_examples for name, block in result.update.blocks.items()} == {
        "encoder": 1,
        "heads.right": 1,
    }
    assert (result.update.samples, result.update.steps, result.logged, result.moved) == ({}, 0, {}, {})


@pytest.mark.parametrize("epochs", [1, 3])
def test_epsilon_counts_the_batches_of_one_patient(epochs):
    policy, memory = private(1.0, 1.5), None
    for round in range(2):
        result = trained(policy, memory=memory, round=round, max_epochs=epochs)
        memory = result.state
        accountant = RDPAccountant()
        for _ in range((round + 1) * epochs):
            accountant.step(noise_multiplier=0.75, sample_rate=1.0)
        told = result.privacy["example"]
        assert told["epsilon"] == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-9)
        assert (told["unit"], told["releases"]) == ("patient", (round + 1) * epochs)
        assert result.privacy["site"] is None
        assert result.privacy["epsilon"] == told["epsilon"]


def test_a_patient_with_images_in_several_batches_takes_part_in_each():
    data = ToySite(n=12)
    for i in (0, 5, 7):
        data.samples[i].meta = replace(data.samples[i].meta, patient="often")
    most = trained(private(1.0, 1.0), data=data, max_epochs=4).privacy["example"]["releases"]
    images = trained(private(1.0, 1.0, unit="image"), data=data, max_epochs=4).privacy["example"]["releases"]
    assert 4 < most <= 12
    assert images == 4


def test_rounds_without_noise_before_end_the_guarantee_and_the_unit_cannot_change():
    first = trained()
    told = trained(private(1.0, 1.0), memory=first.state, round=1)
    assert told.privacy["example"]["epsilon"] is None
    with pytest.raises(ConfigError, match=r"privacy\.examples\.unit was patient"):
        trained(private(1.0, 1.0, unit="image"), memory=told.state, round=2)


def test_loss_scaling_is_refused():
    module = quiet_template()
    scaled = Bench()
    scaled.precision = "16-mixed"
    with pytest.raises(ConfigError, match="bf16-mixed or 32-true"):
        PrivateGradients(ExamplePrivacy(), key_of(0), "").attach(module, scaled)


# --- the whole model --------------------------------------------------------------------------------------------------

MEDICAL = {
    "health": Task("health", "classification", ("well", "sick")),
    "nodules": Task("nodules", "detection", ("nodule",)),
    "organ": Task("organ", "segmentation", ("organ",), multi_label=True),
}


def whole_model(**loss):
    torch.manual_seed(0)
    heads = {
        "health": ClassificationHead(["well", "sick"]),
        "nodules": DetectionHead(["nodule"]),
        "organ": SegmentationHead(["organ"]),
    }
    weighting = loss.get("weighting") or FixedWeighting(normalise=False)
    return MultiTaskModule(SharedEncoder("mtmedformer_tiny", channels=16), heads, loss=HybridLoss(weighting=weighting))


class MedicalSite(L.LightningDataModule):
    """Three small images: one labelled for all tasks, one for a mask, one for nothing."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        truths = [
            {
                "health": torch.tensor([0.0, 1.0]),
                "nodules": Boxes(torch.tensor([[8.0, 8.0, 30.0, 30.0]]), torch.zeros(1, dtype=torch.int64)),
                "organ": (torch.rand(1, 64, 64, generator=generator) > 0.5).to(torch.uint8),
            },
            {"organ": (torch.rand(1, 64, 64, generator=generator) > 0.5).to(torch.uint8)},
            {},
        ]
        images = torch.rand(3, 1, 64, 64, generator=generator)
        self.tasks = MEDICAL
        self.samples = [Sample(images[i], truth, Meta(f"im{i}", f"p{i}")) for i, truth in enumerate(truths)]

    def train_dataloader(self):
        return torch.utils.data.DataLoader(self.samples, 3, collate_fn=lambda found: collate(found, self.tasks))


def test_three_tasks_with_missing_labels_train_privately():
    module = whole_model()
    site = Site("north", MedicalSite(), dict(MEDICAL))
    arguments = ("north", module, site, toy_plan(module), SiteState(), FedAvg(), make())
    plain = train_site(*arguments)
    found = train_site(*arguments, privacy=private(0.1, 0.5))
    assert (
        set(found.update.blocks)
        == set(plain.update.blocks)
        == {"encoder", "heads.health", "heads.nodules", "heads.organ"}
    )
    assert all(bool(torch.isfinite(value).all()) for value in deltas(found).values())
    assert found.privacy["example"]["releases"] == 1


@pytest.mark.parametrize(
    "module, words",
    [
        (lambda: whole_model(weighting=FixedWeighting()), "FixedWeighting with normalise: false"),
        (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), "1 is a BatchNorm2d"),
    ],
)
def test_models_that_couple_patients_are_refused(module, words):
    built = module()
    with pytest.raises(ConfigError, match=words):
        private(1.0, 1.0).check(built, schema_of(built), FedAvg())


def test_gradient_aggregation_and_several_processes_a_site_are_refused():
    from mtmedformer.losses import GradientAggregation

    built = whole_model(weighting=GradientAggregation("UPGrad"))
    with pytest.raises(ConfigError, match="GradientAggregation computes weights"):
        private(1.0, 1.0).check(built, schema_of(built), FedAvg())
    built = whole_model(weighting=UncertaintyWeighting())
    private(1.0, 1.0).check(built, schema_of(built), FedAvg())
    with pytest.raises(ConfigError, match="placement=ddp"):
        private(1.0, 1.0).check(built, schema_of(built), FedAvg(), distributed=True)


@pytest.mark.parametrize(
    "values", [dict([pair]) for pair in itertools.product(["clip", "noise_multiplier"], [0.0, -1.0, float("nan")])]
)
def test_settings_out_of_range_are_refused(values):
    with pytest.raises(ConfigError, match=rf"privacy\.examples\.{next(iter(values))} is"):
        ExamplePrivacy(**values)
