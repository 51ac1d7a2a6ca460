"""Losses of numbers and grades against torch, and the probabilities of a cumulative link model."""

import pytest
import torch
import torch.nn.functional as F

from mtmedformer.errors import ConfigError
from mtmedformer.heads import OrdinalHead, RegressionHead
from mtmedformer.losses import AbsoluteError, Coral, CumulativeLink, SmoothL1, SquaredError
from mtmedformer.losses.regression import grade_log_probabilities


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize(
    ("term", "reference"),
    [
        (SmoothL1(beta=0.7), lambda a, b: F.smooth_l1_loss(a, b, beta=0.7)),
        (SquaredError(), F.mse_loss),
        (AbsoluteError(), F.l1_loss),
    ],
)
def test_losses_of_numbers_are_torchs(rng, term, reference):
    outputs, target = torch.randn(7, 1, generator=rng), torch.randn(7, generator=rng)
    torch.testing.assert_close(term(outputs, target), reference(outputs[:, 0], target))


def test_probabilities_of_grades_are_differences_of_sigmoids_and_sum_to_one(rng):
    boundaries = torch.randn(5, 3, generator=rng).sort(1, descending=True).values.double()
    p = grade_log_probabilities(boundaries).exp()
    above = torch.cat([torch.ones(5, 1), boundaries.sigmoid(), torch.zeros(5, 1)], dim=1)
    torch.testing.assert_close(p, above[:, :-1] - above[:, 1:])
    torch.testing.assert_close(p.sum(1), torch.ones(5).double())
    far = torch.tensor([[90.0, 80.0], [-80.0, -90.0]])  # differences of sigmoids would cancel to 0
    assert grade_log_probabilities(far).isfinite().all()
    same = torch.tensor([[1e9, 1e9]], requires_grad=True)
    grade_log_probabilities(same).sum().backward()
    assert same.grad.isfinite().all()


def test_cumulative_link_is_the_likelihood_of_the_grade(rng):
    boundaries = torch.randn(5, 3, generator=rng).sort(1, descending=True).values
    target = torch.tensor([0.0, 3.0, 1.0, 2.0, 2.0])
    expected = F.nll_loss(grade_log_probabilities(boundaries), target.long())
    torch.testing.assert_close(CumulativeLink()(boundaries, target), expected)


def test_coral_is_the_cross_entropy_of_every_boundary():
    boundaries, target = torch.tensor([[2.0, -1.0]]), torch.tensor([1.0])
    expected = -torch.tensor(2.0).sigmoid().log() - (1 - torch.tensor(-1.0).sigmoid()).log()
    torch.testing.assert_close(Coral()(boundaries, target), expected)


def test_boundaries_of_grades_stay_in_order_and_start_with_equal_probabilities():
    head = OrdinalHead(["A", "B", "C", "D"])
    head.build(32, (4, 8, 16, 32, 64))
    head.classifier[1].weight.data.zero_()
    head.classifier[1].bias.data.zero_()
    pyramid = [torch.randn(2, 32, 64 // s, 64 // s) for s in (4, 8, 16, 32, 64)]
    p = head.predict(head(pyramid, (64, 64)), (64, 64))
    torch.testing.assert_close(p, torch.full((2, 4), 0.25), atol=2e-3, rtol=0)
    head.boundaries.data[1:] = -50.0
    assert (head(pyramid, (64, 64)).boundaries.diff(dim=1) < 0).all()


@pytest.mark.parametrize("range", [(1, 1), (5, 0), (0, float("inf")), (float("nan"), 1)])
def test_a_range_that_is_none_is_refused(range):
    with pytest.raises(ConfigError, match="range"):
        RegressionHead(range)


def test_terms_of_the_other_head_are_refused():
    with pytest.raises(ConfigError, match="OrdinalHead"):
        RegressionHead((0, 1), terms={"coral": Coral()})
    with pytest.raises(ConfigError, match="RegressionHead"):
        OrdinalHead(["a", "b"], terms={"l1": SmoothL1()})
    with pytest.raises(ConfigError, match="two grades"):
        OrdinalHead(["a"])
    with pytest.raises(ConfigError, match="beta"):
        SmoothL1(beta=0.0)
