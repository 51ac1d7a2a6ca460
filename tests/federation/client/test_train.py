"""One site in one round: what it sends, what it keeps, and that nothing else changes."""

import lightning as L
import pytest
import torch
from timm.layers import Mlp
from torch import Tensor

from federation.aggregators import FedAvg, FedBN, FedProx, Local, SiteObjective
from federation.aggregators.bayesian import BayesianAggregator
from federation.alignment.align import shuffle
from federation.alignment.groups import permutation_groups
from federation.bayes.curvature import SquaredGradients
from federation.client.lightning_internals import build_site_trainer
from federation.client.train import SiteState, TrainingInterrupt, local_keys, train_site, validate_site
from federation.site_loaders import Site
from mtmedformer.errors import ConfigError
from tests.fixtures.toy_sites import TASKS, ToyModule, ToySite, toy_module, toy_plan


def make(**settings):
    outer = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    return lambda: build_site_trainer(lambda **kw: L.Trainer(**settings, **kw), outer)


def site(**settings):
    return Site("north", ToySite(**settings), dict(TASKS))


def trained(module=None, data=None, memory=None, aggregator=None, stop=lambda: False, trainer=None, **plan):
    module = module or toy_module()
    return train_site(
        "north",
        module,
        data or site(),
        toy_plan(module, **plan),
        memory or SiteState(),
        aggregator or FedAvg(),
        trainer or make(),
        stop,
    )


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def deltas(result):
    return {key: value for block in result.update.blocks.values() for key, value in block.delta.items()}


def test_num_examples_counts_the_labelled_samples_per_block():
    data = site(n=10)
    for i in (0, 3, 4):
        data.source.samples[i].truth["left"] = None
    data.source.samples[4].truth["right"] = None
    update = trained(data=data).update
    assert {name: block.num_examples for name, block in update.blocks.items()} == {
        "encoder": 9,
        "heads.left": 7,
        "heads.right": 9,
    }
    assert update.samples == {"left": 7, "right": 9}
    assert update.steps == 3


def test_two_local_epochs_are_more_steps_and_no_more_evidence():
    update = trained(trainer=make(max_epochs=2)).update
    assert update.blocks["encoder"].num_examples == 12
    assert update.steps == 6


def test_a_head_without_labels_is_neither_sent_nor_changed():
    module = toy_module()
    result = trained(module, site(tasks=("right",)), aggregator=FedProx(mu=1.0))
    assert set(result.update.blocks) == {"encoder", "heads.right"}
    assert result.update.samples == {"left": 0, "right": 12}


def test_an_objective_does_not_change_a_head_without_labels():
    class Push(FedAvg):
        def site_objective(self, site):
            return Everywhere()

    class Everywhere(SiteObjective):
        def gradient(self, name, parameter, start):
            return torch.ones_like(parameter)

    seen = {}

    class Look(L.Callback):
        def on_train_end(self, trainer, module):
            seen.update({k: v.clone() for k, v in module.state_dict().items()})

    module = toy_module()
    trained(module, site(tasks=("right",)), aggregator=Push(), trainer=make(callbacks=[Look()]))
    assert torch.equal(seen["heads.left.weight"], module.state_dict()["heads.left.weight"])
    assert not torch.equal(seen["heads.right.weight"], module.state_dict()["heads.right.weight"])


def test_the_gradient_of_fedprox_is_mu_times_the_distance():
    """With a loss without gradient the pull alone is left: from where a step has put it, w - lr * mu * (w - w_g)."""
    module = toy_module(lr=0.5)
    free = trained(module, trainer=make(max_steps=2))
    pulled = trained(module, trainer=make(max_steps=2), aggregator=FedProx(mu=0.25))
    first = trained(module, trainer=make(max_steps=1))
    for key in ("encoder.1.weight", "heads.left.bias"):
        expected = deltas(free)[key] - 0.5 * 0.25 * deltas(first)[key]
        torch.testing.assert_close(deltas(pulled)[key], expected, atol=1e-6, rtol=1e-4)


def test_the_delta_is_the_change_of_the_weights_without_those_of_the_loss():
    module = toy_module()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    result = trained(module)
    assert set(result.update.blocks) == {"encoder", "heads.left", "heads.right"}
    assert not any("loss" in key for key in result.update.tensors())
    assert result.state.local["loss.seen"] == 3
    assert result.state.local["loss.mean"] > 0
    assert equal(module.state_dict(), before), "the template is not trained"
    again = trained(module, memory=result.state, round=1)
    assert again.state.local["loss.seen"] == 6, "what is personal goes on"


def test_fedbn_does_not_send_norms_and_local_sends_nothing():
    module = toy_module()
    schema = toy_plan(module).schema
    assert local_keys(schema, FedBN()) == {"encoder.2.weight", "encoder.2.bias", "loss.seen", "loss.mean"}
    assert local_keys(schema, Local()) == set(module.state_dict())
    result = trained(module, aggregator=FedBN())
    assert "encoder.2.weight" not in result.update.blocks["encoder"].delta
    assert not torch.equal(result.state.local["encoder.2.weight"], module.state_dict()["encoder.2.weight"])


def test_with_local_a_site_continues_from_its_own_weights():
    module = toy_module()
    first = trained(module, aggregator=Local())
    second = trained(module, aggregator=Local(), memory=first.state, round=1)
    moved = first.state.local["encoder.1.weight"] + deltas(second)["encoder.1.weight"]
    torch.testing.assert_close(second.state.local["encoder.1.weight"], moved)


def test_local_training_is_reproducible_per_round_and_site():
    module = toy_module()
    torch.manual_seed(1)
    one = trained(module)
    torch.manual_seed(2)
    assert equal(deltas(one), deltas(trained(module)))
    assert not equal(deltas(one), deltas(trained(module, round=1)))
    assert not equal(deltas(one), deltas(trained(module, seed=1)))


def test_precision_is_measured_if_the_aggregator_uses_it():
    assert trained().update.blocks["encoder"].precision == {}
    block = trained(aggregator=BayesianAggregator(granularity="row")).update.blocks["encoder"]
    assert block.precision["encoder.1.weight"].shape == (6, 1)
    assert bool((block.precision["encoder.1.weight"] > 0).all())
    assert block.scale["encoder.1.weight"] > 0
    assert equal(block.delta, trained().update.blocks["encoder"].delta), "measuring changes nothing"


def test_curvature_is_measured_before_clipping_and_the_objective():
    curves = []

    class Keep(SquaredGradients):
        def finish(self, module, loader=None, trainer=None):
            curves.append(super().finish(module, loader, trainer))
            return curves[-1]

    aggregator = BayesianAggregator(Keep(), beta=0.0)
    trained(aggregator=aggregator, trainer=make(max_steps=1))
    trained(aggregator=aggregator, trainer=make(max_steps=1, gradient_clip_val=1e-3))
    pulled = BayesianAggregator(Keep(), beta=5.0)
    trained(aggregator=pulled, trainer=make(max_steps=1))
    assert equal(curves[0], curves[1])
    assert equal(curves[0], curves[2])


@pytest.mark.parametrize("settings", [{"max_steps": 3}, {"max_epochs": 1}])
@pytest.mark.parametrize("keep", [False, True])
def test_optimizer_state_is_reset_or_kept(settings, keep):
    """Two rounds of three steps against momentum written out by hand would be long; against one Trainer it is exact."""
    module = toy_module(momentum=0.9)
    first = trained(module, trainer=make(**settings), keep_optimizer=keep)
    assert bool(first.state.optimizers) == keep
    seen = []

    class Look(L.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            buffers = [state.get("momentum_buffer") for state in optimizer.state.values()]
            seen.append(sum(float(b.abs().sum()) for b in buffers if b is not None))

    trained(module, memory=first.state, round=1, trainer=make(**settings, callbacks=[Look()]), keep_optimizer=keep)
    assert (seen[0] > 0) == keep


def test_schedules_run_over_all_rounds_with_either_optimizer_state():
    module = toy_module(lr=0.1, warmup=10)
    rates = []

    class Look(L.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            rates.append(round(optimizer.param_groups[0]["lr"], 6))

    memory = SiteState()
    for number in range(3):
        memory = trained(module, memory=memory, round=number, trainer=make(callbacks=[Look()])).state
    assert rates == [0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09]
    assert (memory.steps, memory.epochs) == (9, 3)


def test_another_learning_rate_on_resume_is_refused():
    first = trained(toy_module(lr=0.1, warmup=10))
    with pytest.raises(ConfigError, match=r"optimizer.lr=0.2.*trained with 0.1"):
        trained(toy_module(lr=0.2, warmup=10), memory=first.state, round=1)


def test_the_state_of_a_site_loads_with_weights_only(tmp_path):
    state = trained(toy_module(momentum=0.9, warmup=10), keep_optimizer=True).state
    torch.save(state.plain(), tmp_path / "site.pt")
    again = SiteState(**torch.load(tmp_path / "site.pt", weights_only=True))
    assert again.steps == 3
    assert equal(again.local, state.local)


def test_a_site_stops_on_request():
    count = iter(range(10))
    with pytest.raises(TrainingInterrupt):
        trained(stop=lambda: next(count) == 1)


def test_an_update_contains_only_arrays_counts_and_names():
    data = site()
    update = trained(data=data).update
    text = str(update.header())
    for sample in data.source.samples:
        assert sample.meta.id not in text
        assert sample.meta.patient not in text
    assert all(isinstance(value, Tensor) for value in update.tensors().values())


def test_a_site_is_validated_on_its_own_data():
    module = toy_module()
    state = {key: value.clone() for key, value in module.state_dict().items()}
    outer = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    found = validate_site(module, site(), state, lambda: build_site_trainer(L.Trainer, outer, validates=True))
    assert found["score"] < 0


class Shuffle(L.Callback):
    """Gives the units of a site other places, before or after its training, which changes no output."""

    def __init__(self, groups, when):
        self.groups, self.when = groups, when

    def on_train_start(self, trainer, module):
        if self.when == "before":
            shuffle(module, self.groups, seed=3)

    def on_train_end(self, trainer, module):
        if self.when == "after":
            shuffle(module, self.groups, seed=3)


class Blocks(ToyModule):
    """The toy with a transformer's MLP in its encoder."""

    def __init__(self):
        super().__init__(momentum=0.9)
        self.encoder.append(Mlp(6, 12))


@pytest.mark.parametrize("aggregator, when", [(FedAvg, "after"), (FedAvg, "before"), (BayesianAggregator, "before")])
def test_a_site_with_permuted_units_sends_the_same_update(aggregator, when):
    torch.manual_seed(0)
    module = Blocks()
    groups = permutation_groups(module)
    assert len(groups) == 1
    own, other = make(), make(callbacks=[Shuffle(groups, when)])
    plain = trained(module, aggregator=aggregator(), trainer=own, symmetries=groups, keep_optimizer=True)
    shuffled = trained(module, aggregator=aggregator(), trainer=other, symmetries=groups, keep_optimizer=True)
    astray = trained(module, aggregator=aggregator(), trainer=other, keep_optimizer=True)
    assert plain.moved == {}
    assert shuffled.moved[groups[0].name] > 0.5
    if when == "after":
        assert equal(plain.update.tensors(), shuffled.update.tensors())
    else:  # its own sums ran in another order
        torch.testing.assert_close(shuffled.update.tensors(), plain.update.tensors(), atol=1e-5, rtol=1e-3)
        buffers = [r.state.optimizers[0]["state"] for r in (plain, shuffled)]
        torch.testing.assert_close(buffers[1], buffers[0], atol=1e-5, rtol=1e-3)
    wrong = (astray.update.tensors()[k] - v for k, v in plain.update.tensors().items() if k.endswith("fc1.weight"))
    assert max(float(d.abs().max()) for d in wrong) > 0.1, "without alignment it would not be the same"
