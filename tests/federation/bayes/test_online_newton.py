"""Variational online Newton: its equations step by step, and the known posterior of a quadratic."""

import copy
import math

import lightning as L
import pytest
import torch
from torch import nn

from federation import BayesianAggregator, NewtonCurvature, OnlineNewton
from federation.client.train import SiteState, train_site
from mtmedformer.errors import ConfigError
from tests.fixtures.toy_sites import ToyModule, ToySite, toy_plan


def run(parameters, loss, steps, **settings):
    """Take steps; return the optimiser and, for each step, the drawn weights and the gradients there."""
    optimizer = OnlineNewton(parameters, **settings)
    seen = []
    for _ in range(steps):

        def closure():
            optimizer.zero_grad()
            value = loss()
            value.backward()
            seen.append([(p.detach().clone(), p.grad.clone()) for p in parameters])
            return value

        optimizer.step(closure)
    return optimizer, seen


def test_three_steps_equal_hand_computed_values():
    """Plain numbers, written out from algorithm 1 of the paper, against the tensors of the optimiser."""
    lr, b1, b2, ess, h0, decay = 0.2, 0.9, 0.95, 50.0, 0.4, 0.01
    w = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
    optimizer, seen = run(
        [w], lambda: (w**4) / 4 + w, 3, lr=lr, betas=(b1, b2), ess=ess, hess_init=h0, weight_decay=decay, rescale=False
    )
    m, g, h = 1.5, 0.0, h0
    for t, [(theta, _)] in enumerate(seen, start=1):
        theta = float(theta)
        sigma = 1 / math.sqrt(ess * (h + decay))
        assert abs(theta - m) < 6 * sigma
        assert theta != m
        gradient = theta**3 + 1
        h_hat = gradient * (theta - m) / sigma**2
        g = b1 * g + (1 - b1) * gradient
        h = b2 * h + (1 - b2) * h_hat + 0.5 * (1 - b2) ** 2 * (h - h_hat) ** 2 / (h + decay)
        m = m - lr * (g / (1 - b1**t) + decay * m) / (h + decay)
    assert w.item() == pytest.approx(m, rel=1e-12)
    assert float(optimizer.state[w]["hessian"]) == pytest.approx(h, rel=1e-12)
    assert float(optimizer.state[w]["gradient"]) == pytest.approx(g, rel=1e-12)


def test_rescaling_multiplies_the_rate_and_clipping_limits_the_step():
    def first_step(**changes):
        settings = {"lr": 0.1, "hess_init": 0.5, "weight_decay": 0.1, **changes}
        w = nn.Parameter(torch.tensor([1.0, -1.0]))
        run([w], lambda: (w * torch.tensor([1e-3, 1e3])).sum(), 1, betas=(0.9, 1 - 1e-9), **settings)
        return w.detach() - torch.tensor([1.0, -1.0])

    plain = first_step(rescale=False)
    torch.testing.assert_close(first_step(rescale=True), plain * 0.6)
    clipped = first_step(rescale=False, clip=0.25)
    torch.testing.assert_close(clipped, torch.tensor([float(plain[0]), -0.025]))


def test_on_a_quadratic_it_finds_the_minimum_and_the_curvature():
    curvature, minimum = torch.tensor([0.5, 2.0, 8.0]), torch.tensor([1.0, -2.0, 0.5])
    w = nn.Parameter(torch.zeros(3))
    optimizer, seen = run(
        [w],
        lambda: 0.5 * (curvature * (w - minimum) ** 2).sum(),
        4000,
        lr=0.05,
        betas=(0.9, 0.995),
        ess=1000,
        hess_init=1.0,
        weight_decay=1e-3,
        rescale=False,
    )
    torch.testing.assert_close(w.detach(), curvature * minimum / (curvature + 1e-3), rtol=0.05, atol=0.05)
    torch.testing.assert_close(optimizer.state[w]["hessian"], curvature, rtol=0.35, atol=0.05)
    drawn = torch.stack([step[0][0] for step in seen[-1000:]])
    torch.testing.assert_close(drawn.std(0), 1 / (1000 * curvature).sqrt(), rtol=0.35, atol=0.0)


def test_curvature_plus_damping_never_reaches_zero():
    w = nn.Parameter(torch.zeros(100))
    optimizer, _ = run([w], lambda: -50 * (w**2).sum(), 30, lr=1e-4, betas=(0.9, 0.5), ess=10, hess_init=0.1)
    assert (optimizer.state[w]["hessian"] + 1e-4 > 0).all(), "the loss curves downwards everywhere"
    assert w.isfinite().all()


def test_between_steps_parameters_hold_the_mean_and_those_without_gradient_stay():
    used, idle = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    optimizer, seen = run([used, idle], lambda: (used**2).sum() + 0 * 1, 0)
    drawn = []

    def closure():
        drawn.append(idle.detach().clone())
        used.grad, idle.grad = torch.ones(3), None
        return torch.zeros(())

    optimizer.step(closure)
    assert not torch.equal(drawn[0], torch.ones(2)), "it was drawn like the others"
    assert torch.equal(idle, torch.ones(2))
    assert optimizer.state[idle]["step"] == 0
    assert torch.equal(optimizer.state[idle]["hessian"], torch.full((2,), 0.1))
    assert not torch.equal(used, torch.ones(3))
    assert seen == []


def test_a_closure_that_fails_leaves_the_mean():
    w = nn.Parameter(torch.ones(4))
    optimizer = OnlineNewton([w])

    def closure():
        raise RuntimeError("no batch")

    with pytest.raises(RuntimeError, match="no batch"):
        optimizer.step(closure)
    assert torch.equal(w, torch.ones(4))


def test_it_resumes_to_the_same_bits_and_seeds_differ():
    def train(w, optimizer, steps):
        for _ in range(steps):

            def closure():
                optimizer.zero_grad()
                loss = (w - 3).square().sum()
                loss.backward()
                return loss

            optimizer.step(closure)

    straight = nn.Parameter(torch.zeros(5))
    train(straight, OnlineNewton([straight], seed=1), 6)
    first = nn.Parameter(torch.zeros(5))
    optimizer = OnlineNewton([first], seed=1)
    train(first, optimizer, 3)
    second = nn.Parameter(first.detach().clone())
    resumed = OnlineNewton([second], seed=1)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(second, resumed, 3)
    assert torch.equal(straight, second)
    other = nn.Parameter(torch.zeros(5))
    train(other, OnlineNewton([other], seed=2), 6)
    assert not torch.equal(straight, other)


def test_groups_can_disable_decay_but_not_damping():
    kept, pulled = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = OnlineNewton([{"params": [kept], "weight_decay": 0.0}, {"params": [pulled]}], weight_decay=0.5)

    def closure():
        kept.grad, pulled.grad = torch.zeros(2), torch.zeros(2)

    optimizer.step(closure)
    assert torch.equal(kept, torch.ones(2))
    assert (pulled < 1).all()
    assert [group["damping"] for group in optimizer.param_groups] == [0.5, 0.5]


@pytest.mark.parametrize(
    "settings, key",
    [
        ({"ess": 0}, "ess"),
        ({"hess_init": -1}, "hess_init"),
        ({"weight_decay": 0}, "weight_decay"),
        ({"lr": -1}, "lr"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"clip": 0}, "clip"),
    ],
)
def test_settings_out_of_range_are_refused(settings, key):
    with pytest.raises(ConfigError, match=key):
        OnlineNewton([nn.Parameter(torch.ones(1))], **settings)


def test_a_step_without_closure_raises_with_the_fix():
    with pytest.raises(ConfigError, match="16-mixed"):
        OnlineNewton([nn.Parameter(torch.ones(1))]).step()


class Trained(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.used, self.idle = nn.Linear(3, 2), nn.Linear(3, 2)
        self.trainer = type("Trainer", (), {"optimizers": [make(self.parameters())]})()


def test_the_curvature_is_the_optimizers_for_trained_parameters_only():
    module = Trained(OnlineNewton)
    (optimizer,) = module.trainer.optimizers
    for _ in range(3):

        def closure():
            optimizer.zero_grad()
            module.used(torch.ones(4, 3)).square().sum().backward()

        optimizer.step(closure)
    found = NewtonCurvature().finish(module, trainer=module.trainer)
    assert found.keys() == {"used.weight", "used.bias"}
    assert torch.equal(found["used.weight"], optimizer.state[module.used.weight]["hessian"].clamp(min=0))


def test_the_curvature_of_another_optimizer_is_refused():
    with pytest.raises(ConfigError, match="OnlineNewton"):
        NewtonCurvature().finish(module := Trained(torch.optim.SGD), trainer=module.trainer)


class NewtonToy(ToyModule):
    def configure_optimizers(self):
        return OnlineNewton(self.parameters(), lr=0.01, betas=(0.9, 0.9))


def test_a_site_trains_with_it_and_sends_its_curvature():
    torch.manual_seed(0)
    module = NewtonToy()

    def trainer():
        quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
        return L.Trainer(accelerator="cpu", max_epochs=2, enable_progress_bar=False, **quiet)

    def result(granularity):
        aggregator = BayesianAggregator(NewtonCurvature(), granularity=granularity)
        return train_site("north", module, ToySite(), toy_plan(module), SiteState(), aggregator, trainer)

    first, again = result("element"), result("element")
    sent, twice = first.update.tensors(), again.update.tensors()
    assert all(torch.equal(sent[key], twice[key]) for key in sent)
    assert set(first.update.blocks) == {"encoder", "heads.left", "heads.right"}
    for block in first.update.blocks.values():
        trained = [key for key in block.delta if block.delta[key].any()]
        assert trained
        assert set(trained) <= set(block.precision)
        assert any(len(value.unique()) > 1 for value in block.precision.values())
        assert all(value > 0 for value in block.scale.values())
