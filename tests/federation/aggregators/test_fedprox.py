"""Proximal terms: their gradients against numerical ones, and the optimum they lead to."""

import pytest
import torch

from federation.aggregators import Ditto, FedProx
from federation.aggregators.fedprox import Proximal
from mtmedformer.errors import ConfigError


def penalty(w, start, mu, precision):
    return mu / 2 * (precision * (w - start).square()).sum()


@pytest.mark.parametrize("precision", [None, torch.tensor([[0.5], [2.0], [0.1]]), torch.rand(3, 4) + 0.1])
def test_the_pull_is_the_numerical_gradient_of_the_squared_distance(precision):
    generator = torch.Generator().manual_seed(0)
    w, start = (torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    objective = Proximal(0.7, {} if precision is None else {"w": precision})
    pull = objective.gradient("w", torch.nn.Parameter(w), start)
    weight = torch.ones(()) if precision is None else precision.double()
    numerical = torch.zeros_like(w)
    for index in range(w.numel()):
        step = torch.zeros(12, dtype=torch.float64)
        step[index] = 1e-5
        step = step.reshape(3, 4)
        up, down = penalty(w + step, start, 0.7, weight), penalty(w - step, start, 0.7, weight)
        numerical.view(-1)[index] = (up - down) / 2e-5
    torch.testing.assert_close(pull, numerical, rtol=1e-7, atol=1e-7)
    assert not pull.requires_grad


def test_the_pull_grows_with_the_distance():
    near, far = (Proximal(1.0).gradient("w", torch.full((2,), d), torch.zeros(2)) for d in (1.0, 3.0))
    assert torch.equal(far, 3 * near)  # of the un-squared norm it would be the same


def test_zero_strength_adds_no_gradient():
    assert FedProx(0.0).site_objective("a").gradient("w", torch.ones(2), torch.zeros(2)) is None
    assert Ditto(0.0).personal.objective.gradient("w", torch.ones(2), torch.zeros(2)) is None


def settle(objective, own, curvature, start):
    """Return where gradient descent on a quadratic loss ends under a objective."""
    w = start.clone()
    for _ in range(400):
        w = w - 0.1 * (curvature * (w - own) + (objective.gradient("w", w, start) if objective else 0))
    return w


@pytest.mark.parametrize("mu", [0.1, 1.0, 5.0])
def test_a_site_settles_between_its_own_optimum_and_the_global_weights(mu):
    own, start, curvature = torch.tensor([3.0, -2.0]), torch.tensor([1.0, 1.0]), torch.tensor([0.5, 2.0])
    expected = (curvature * own + mu * start) / (curvature + mu)
    torch.testing.assert_close(settle(FedProx(mu).site_objective("a"), own, curvature, start), expected)
    ditto = Ditto(mu)
    torch.testing.assert_close(settle(ditto.personal.objective, own, curvature, start), expected)
    torch.testing.assert_close(settle(None, own, curvature, start), own)
    assert ditto.personal.keeps == "weights"
    assert ditto.site_objective("a").gradient("w", own, start) is None  # the global model is plain FedAvg


def test_negative_strengths_are_refused():
    with pytest.raises(ConfigError, match="negative"):
        FedProx(-0.1)
    with pytest.raises(ConfigError, match="negative"):
        Ditto(-0.1)
