import doctest

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn
from torchjd import aggregation

from mtmedformer.encoders.shared import SharedEncoder
from mtmedformer.errors import ConfigError
from mtmedformer.losses import gradient_aggregation as gradients
from mtmedformer.losses import hybrid
from mtmedformer.losses.gradient_aggregation import GradientAggregation
from mtmedformer.losses.hybrid import HybridLoss
from mtmedformer.losses.weighting import FAMOWeighting, FixedWeighting, UncertaintyWeighting


def built(loss: HybridLoss, tasks: str = "abc") -> HybridLoss:
    loss.build(list(tasks))
    return loss


def test_the_value_is_the_weighted_sum_over_labelled_tasks():
    loss = built(HybridLoss({"a": 2.0, "c": 0.5}, FixedWeighting(normalise=False)))
    losses = {"c": torch.tensor(4.0), "a": torch.tensor(3.0), "b": torch.tensor(100.0)}
    assert loss(losses, {"a": 1, "b": 0, "c": 7}).item() == pytest.approx(2 * 3 + 0.5 * 4)
    assert loss(losses, {"a": 1, "b": 1, "c": 7}).item() == pytest.approx(108)
    del losses["b"]
    assert loss(losses, {"a": 1, "b": 1, "c": 7}).item() == pytest.approx(8)
    assert loss.factors() == {"a": 2.0, "b": 1.0, "c": 0.5}


def test_by_default_every_task_has_the_same_share_at_the_start():
    loss = built(HybridLoss())
    heads = {t: torch.tensor(v, requires_grad=True) for t, v in {"a": 100.0, "b": 0.02, "c": 3.0}.items()}
    total = loss(heads, {"a": 1, "b": 1, "c": 1})
    assert total.item() == pytest.approx(3)
    total.backward()
    assert {t: float(h.grad * h.detach()) for t, h in heads.items()} == pytest.approx({"a": 1, "b": 1, "c": 1})
    assert loss.factors() == pytest.approx({"a": 0.01, "b": 50, "c": 1 / 3})


def test_half_precision_losses_are_added_in_single_precision():
    loss = built(HybridLoss(weighting=FixedWeighting(normalise=False)), "ab")
    total = loss({"a": torch.tensor(256.0, dtype=torch.bfloat16), "b": torch.tensor(1.0)}, {"a": 1, "b": 1})
    assert total.dtype == torch.float32
    assert total.item() == 257


def test_weights_of_unknown_tasks_and_invalid_weights_are_refused():
    with pytest.raises(ConfigError, match=r"loss\.weights\.lung: no such task .*'lungs'.*nodules"):
        HybridLoss({"lung": 1.0}).build(["lungs", "nodules"])
    with pytest.raises(ConfigError, match=r"loss\.weights\.lungs is -1"):
        HybridLoss({"lungs": -1.0})
    with pytest.raises(ConfigError, match=r"loss\.weights\.lungs is nan"):
        HybridLoss({"lungs": float("nan")})
    with pytest.raises(ConfigError, match="every task has weight 0"):
        HybridLoss({"lungs": 0.0}).build(["lungs"])
    HybridLoss({"lungs": 2.0}).build(["nodules"], dropped=["lungs"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run_and_is_named(value):
    loss = built(HybridLoss())
    losses = {"a": torch.tensor(1.0), "b": torch.tensor(value), "c": torch.tensor(1.0)}
    with pytest.raises(ConfigError, match=r"task 'b' is -?(nan|inf): training has diverged; lower the learning rate"):
        loss(losses, {"a": 1, "b": 1, "c": 1})
    assert loss(losses, {"a": 1, "b": 0, "c": 1}).isfinite()


def test_a_negative_loss_is_refused_only_by_weightings_of_positive_losses():
    losses = {"a": torch.tensor(-0.5)}
    for weighting in (FixedWeighting(), UncertaintyWeighting(), FAMOWeighting()):
        with pytest.raises(ConfigError, match=r"task 'a' is -0\.5.*at least 0"):
            built(HybridLoss(weighting=weighting), "a")(losses, {"a": 1})
    assert built(HybridLoss(weighting=FixedWeighting(normalise=False)), "a")(losses, {"a": 1}).item() == -0.5


def test_wrong_calls_raise_an_error():
    with pytest.raises(RuntimeError, match="build"):
        HybridLoss()({"a": torch.tensor(1.0)}, {"a": 1})
    with pytest.raises(RuntimeError, match="unknown tasks"):
        built(HybridLoss(), "a")({"x": torch.tensor(1.0)}, {"x": 1})
    with pytest.raises(RuntimeError, match="gradient aggregators"):
        built(HybridLoss(), "a").backward({"a": torch.tensor(1.0)}, {"a": 1}, [], [])


def test_weights_of_the_configuration_hold_after_a_resume():
    old, new = built(HybridLoss({"a": 1.0})), built(HybridLoss({"a": 5.0}))
    new.load_state_dict(old.state_dict())
    assert new.weight.tolist() == [5.0, 1.0, 1.0]


def test_log_variances_have_no_weight_decay():
    assert built(HybridLoss(weighting=UncertaintyWeighting()), "ab").no_weight_decay() == {
        "weighting.uncertainty.a.log_var",
        "weighting.uncertainty.b.log_var",
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_hybrid_loss_is_built_from_yaml():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(HybridLoss, "loss")
    config = parser.parse_string(
        """
        loss:
          class_path: mtmedformer.losses.HybridLoss
          init_args:
            weights: {lungs: 2, nodules: 0.5}
            weighting: {class_path: mtmedformer.losses.GradientAggregation, init_args: {aggregator: PCGrad}}
        """
    )
    loss = parser.instantiate_classes(config).loss
    assert loss.weights == {"lungs": 2.0, "nodules": 0.5}
    assert isinstance(loss.weighting.aggregator, aggregation.PCGrad)


def test_the_example_in_the_docstring_holds():
    assert doctest.testmod(hybrid).failed == 0


# Gradient aggregation, on a real pyramid whose levels depend on one another.


class Net(nn.Module):
    """A timm pyramid and three heads that read different levels, so that the cut at the features would be wrong."""

    def __init__(
        self, weighting: GradientAggregation | FixedWeighting, weights: dict[str, float] | None = None
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = SharedEncoder("mtmedformer_tiny", channels=16)
        self.heads = nn.ModuleDict({t: nn.Conv2d(16, 2, 1) for t in "abc"})
        self.loss = built(HybridLoss(weights, weighting))
        self.image = torch.rand(2, 1, 48, 64)

    def losses(self) -> dict[str, torch.Tensor]:
        pyramid = self.encoder(self.image)
        read = {"a": pyramid[:2], "b": pyramid[2:], "c": pyramid}
        return {
            t: torch.stack([(self.heads[t](level) - i).square().mean() for level in read[t]]).sum()
            for i, t in enumerate("abc")
        }

    def gradients(self, present: dict[str, int], scale: float = 1.0, times: int = 1) -> dict[str, torch.Tensor]:
        self.zero_grad()
        for _ in range(times):
            losses = self.losses()
            if self.loss.aggregates_gradients:
                shared, own = list(self.encoder.parameters()), list(self.heads.parameters())
                self.loss.backward(losses, present, shared, own, scale)
            else:
                (self.loss(losses, present) * scale).backward()
        missing = [name for name, p in self.named_parameters() if p.grad is None]
        assert missing == []
        return {name: p.grad.clone() for name, p in self.named_parameters()}


ALL = {"a": 2, "b": 1, "c": 2}


def close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], factor: float = 1.0) -> None:
    for name, grad in theirs.items():
        scale = grad.abs().max() * factor + 1e-8
        assert ((ours[name] - factor * grad).abs().max() / scale) < 1e-5, name


@pytest.mark.parametrize("present", [ALL, {"a": 2, "b": 0, "c": 1}, {"a": 0, "b": 0, "c": 1}])
def test_the_sum_of_gradients_is_the_gradient_of_the_sum(present):
    weights = {"a": 0.3, "c": 2.0}
    plain = Net(FixedWeighting(normalise=False), weights).gradients(present)
    close(Net(GradientAggregation("Sum"), weights).gradients(present), plain)


def test_the_mean_of_gradients_is_a_third_of_it_for_the_encoder_and_plain_for_the_heads():
    plain = Net(FixedWeighting(normalise=False)).gradients(ALL)
    ours = Net(GradientAggregation("Mean")).gradients(ALL)
    close({k: v for k, v in ours.items() if "encoder" in k}, {k: v for k, v in plain.items() if "encoder" in k}, 1 / 3)
    close({k: v for k, v in ours.items() if "heads" in k}, {k: v for k, v in plain.items() if "heads" in k})


def test_accumulated_gradients_add_up():
    once = Net(GradientAggregation("UPGrad")).gradients(ALL)
    thrice = Net(GradientAggregation("UPGrad")).gradients(ALL, scale=1 / 3, times=3)
    close(thrice, once)


def two_losses(agree: bool, weighting: nn.Module) -> torch.Tensor:
    """Return the gradient of a vector that two quadratic losses pull the same way or against each other."""
    x = nn.Parameter(torch.tensor([1.0, 2.0]))
    loss = built(HybridLoss(weighting=weighting), "ab")
    sign = 1.0 if agree else -0.5
    losses = {"a": (x * torch.tensor([1.0, 0.2])).sum() + 5, "b": (x * torch.tensor([sign, 1.0])).sum() + 5}
    if loss.aggregates_gradients:
        loss.backward(losses, {"a": 1, "b": 1}, [x], [])
    else:
        loss(losses, {"a": 1, "b": 1}).backward()
    return x.grad


def test_pcgrad_is_the_plain_sum_when_gradients_agree():
    plain = two_losses(True, FixedWeighting(normalise=False))
    torch.testing.assert_close(two_losses(True, GradientAggregation("PCGrad")), plain)


def test_pcgrad_projects_gradients_that_conflict():
    ours = two_losses(False, GradientAggregation("PCGrad"))
    a, b = torch.tensor([1.0, 0.2]), torch.tensor([-0.5, 1.0])  # a . b = -0.3
    expected = (a - (a @ b) / (b @ b) * b) + (b - (a @ b) / (a @ a) * a)
    torch.testing.assert_close(ours, expected)
    assert not torch.allclose(ours, a + b)


def test_frozen_parameters_get_no_gradient():
    net = Net(GradientAggregation("UPGrad"))
    frozen = next(net.encoder.parameters()).requires_grad_(False)
    losses = net.losses()
    net.loss.backward(losses, ALL, list(net.encoder.parameters()), list(net.heads.parameters()))
    assert frozen.grad is None
    assert all(p.grad is not None for p in list(net.encoder.parameters())[1:])


@pytest.mark.parametrize("name", ["UPGrad", "PCGrad", "MGDA", "IMTLG", "AlignedMTL", "GradDrop", "DualProj", "ConFIG"])
def test_aggregators_of_torchjd_run_and_the_factors_are_known(name):
    net = Net(GradientAggregation(name))
    assert all(grad.isfinite().all() for grad in net.gradients(ALL).values())
    assert all(torch.tensor(f).isfinite() for f in net.loss.factors().values())


def test_aggregator_objects_are_accepted():
    assert Net(GradientAggregation(aggregation.MGDA())).loss.aggregates_gradients


def test_invalid_aggregators_are_refused_with_a_message(monkeypatch):
    with pytest.raises(ConfigError, match=r"'PCgrad' is unknown; choose one of .*PCGrad"):
        GradientAggregation("PCgrad")
    with pytest.raises(ConfigError, match="keeps a state"):
        GradientAggregation("GradVac")
    with pytest.raises(ConfigError, match="options do not fit Krum"):
        GradientAggregation("Krum")
    with pytest.raises(ConfigError, match="options do not fit UPGrad"):
        GradientAggregation("UPGrad", {"nonsense": 1})
    monkeypatch.setattr("torchjd._mixins.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"CAGrad needs a missing package.*torchjd\[cagrad\]"):
        GradientAggregation("CAGrad", {"c": 0.5})


def test_every_aggregator_named_in_messages_exists():
    assert {"UPGrad", "PCGrad", "MGDA", "CAGrad", "Sum", "Mean"} <= set(gradients.choices())
    assert not {"GradVac", "NashMTL", "Aggregator", "WeightedAggregator"} & set(gradients.choices())
