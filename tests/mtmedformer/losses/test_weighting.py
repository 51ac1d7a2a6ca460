import math

import pytest
import torch
from torch import nn
from torchjd import scalarization

from mtmedformer.errors import ConfigError
from mtmedformer.losses.weighting import (
    DynamicWeightAverage,
    FAMOWeighting,
    FixedWeighting,
    RandomWeighting,
    UncertaintyWeighting,
)

ALL = torch.tensor([True, True, True])


def test_fixed_normalised_terms_start_at_one_and_freeze_after_the_warmup():
    weighting = FixedWeighting(warmup=2)
    weighting.build("abc")
    first = weighting(torch.tensor([10.0, 0.1, 3.0]), ALL)
    assert torch.equal(first, torch.ones(3))
    weighting(torch.tensor([20.0, 0.3, 5.0]), ALL)
    expected = torch.tensor([1 / 15.0, 1 / 0.2, 1 / 4.0])
    torch.testing.assert_close(weighting.factors(), expected)
    weighting(torch.tensor([1.0, 1.0, 1.0]), ALL)
    torch.testing.assert_close(weighting.factors(), expected)


def test_fixed_scale_counts_only_batches_that_label_the_task_and_only_losses_above_zero():
    weighting = FixedWeighting(warmup=2)
    weighting.build("ab")
    both, one = torch.tensor([True, True]), torch.tensor([True, False])
    for losses, present in (([2.0, 0.0], one), ([4.0, 8.0], both), ([9.0, 0.0], both), ([9.0, 6.0], both)):
        weighting(torch.tensor(losses), present)
    torch.testing.assert_close(weighting.mean, torch.tensor([3.0, 7.0]))


def test_fixed_scale_has_a_lower_limit():
    weighting = FixedWeighting()
    weighting.build("a")
    weighting(torch.tensor([1e-9]), torch.tensor([True]))
    assert weighting.factors().item() == pytest.approx(1000)


def test_fixed_without_normalisation_changes_nothing():
    weighting = FixedWeighting(normalise=False)
    weighting.build("ab")
    losses = torch.tensor([5.0, -0.1])
    assert torch.equal(weighting(losses, torch.tensor([True, True])), losses)


def test_uncertainty_settles_at_the_logarithm_of_constant_losses():
    weighting = UncertaintyWeighting()
    weighting.build("abc")
    losses = torch.tensor([4.0, 0.2, 1.0])
    optimiser = torch.optim.LBFGS(weighting.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        total = weighting(losses, ALL).sum()
        total.backward()
        return total

    optimiser.step(closure)
    log_var = torch.cat([p.detach() for p in weighting.parameters()])
    torch.testing.assert_close(log_var, losses.log(), atol=1e-3, rtol=0)
    torch.testing.assert_close(weighting.factors(), 0.5 / losses, atol=1e-3, rtol=1e-3)


def test_uncertainty_does_not_move_the_log_variance_of_an_absent_task():
    weighting = UncertaintyWeighting()
    weighting.build("ab")
    weighting(torch.tensor([2.0, 0.0]), torch.tensor([True, False])).sum().backward()
    here, absent = weighting.parameters()
    assert here.grad is not None
    assert here.grad.item() == pytest.approx(0.5 - 0.5 * 2.0)
    assert absent.grad is not None
    assert absent.grad.item() == 0


def test_dwa_is_the_formula_of_liu_2019():
    weighting = DynamicWeightAverage(temperature=2.0)
    weighting.build("ab")
    both = torch.tensor([True, True])
    for epoch in ([[4.0, 1.0], [2.0, 3.0]], [[1.0, 1.9], [2.0, 1.9]]):
        assert torch.equal(weighting.factors(), torch.ones(2))  # the first two epochs
        for losses in epoch:
            weighting(torch.tensor(losses), both)
        weighting.on_epoch_end()
    ratios = [1.5 / 3.0, 1.9 / 2.0]
    shares = [math.exp(r / 2.0) for r in ratios]
    expected = [2 * s / sum(shares) for s in shares]
    assert weighting.factors().tolist() == pytest.approx(expected)


def test_dwa_agrees_with_torchjd_when_every_task_is_there():
    ours, theirs = DynamicWeightAverage(temperature=1.5), scalarization.DWA(temperature=1.5)
    ours.build("abc")
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        for _ in range(3):
            losses = torch.rand(3, generator=generator) + 0.1
            torch.testing.assert_close(ours(losses, ALL).sum(), theirs(losses))
        ours.on_epoch_end()
        theirs.step()


def test_dwa_averages_a_task_over_the_batches_that_label_it_and_keeps_its_history_over_a_bare_epoch():
    weighting = DynamicWeightAverage()
    weighting.build("ab")
    both, one = torch.tensor([True, True]), torch.tensor([True, False])
    for present, b in ((both, 2.0), (one, 0.0), (both, 4.0)):
        weighting(torch.tensor([1.0, b]), present)
    weighting.on_epoch_end()
    assert weighting.last.tolist() == [1.0, 3.0]
    weighting(torch.tensor([0.5, 0.0]), one)
    weighting.on_epoch_end()
    assert weighting.last.tolist() == [0.5, 3.0]
    assert weighting.before[0] == 1.0
    assert weighting.before[1].isnan()


def test_random_weights_sum_to_one_and_depend_on_the_seed():
    present = torch.tensor([True, False, True])
    draws = []
    for seed in (0, 0, 1):
        weighting = RandomWeighting(seed)
        weighting.build("abc")
        draws.append([weighting(torch.ones(3) * present, present) for _ in range(3)])
    for terms in draws[0]:
        assert terms.sum().item() == pytest.approx(1)
        assert terms[1] == 0
    assert not torch.equal(draws[0][0], draws[0][1])
    assert all(torch.equal(a, b) for a, b in zip(draws[0], draws[1], strict=True))
    assert not torch.equal(draws[0][0], draws[2][0])


def famo_toy(weighting: nn.Module, ours: bool, steps: int) -> list[float]:
    x = torch.tensor([1.0, -2.0, 0.5], requires_grad=True)
    optimiser = torch.optim.SGD([x], lr=0.02)

    def losses() -> torch.Tensor:
        return torch.stack([(x - 1).square().sum() + 0.1, 20 * (x + 1).square().sum() + 0.1, x.abs().sum() + 0.1])

    values = []
    for _ in range(steps):
        vector = losses()
        total = weighting(vector, ALL).sum() if ours else weighting(vector)
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
        with torch.no_grad():
            after = losses()
        weighting.update(after, ALL) if ours else weighting.update(after)
        values.append(float(total.detach()))
    return values


def test_famo_agrees_with_torchjd_when_every_task_is_there():
    ours, theirs = FAMOWeighting(lr=0.05, weight_decay=0.01), scalarization.FAMO(3, lr=0.05, weight_decay=0.01)
    ours.build("abc")
    assert famo_toy(ours, True, 25) == pytest.approx(famo_toy(theirs, False, 25), rel=1e-5)
    torch.testing.assert_close(ours.logits, theirs._w.detach())
    assert ours.logits.abs().max() > 0.1


def test_famo_does_not_change_logit_and_adam_state_of_an_absent_task():
    weighting = FAMOWeighting()
    weighting.build("abc")
    famo_toy(weighting, True, 5)
    before = [b.clone() for b in (weighting.logits, weighting.first_moment, weighting.second_moment, weighting.steps)]
    present = torch.tensor([True, False, True])
    weighting(torch.tensor([1.0, 0.0, 2.0]), present)
    weighting.update(torch.tensor([0.5, 0.0, 2.0]), present)
    after = [weighting.logits, weighting.first_moment, weighting.second_moment, weighting.steps]
    for old, new in zip(before, after, strict=True):
        assert old[1] == new[1]
        assert old[0] != new[0]


def test_famo_update_before_the_first_batch_is_an_error():
    weighting = FAMOWeighting()
    weighting.build("a")
    with pytest.raises(RuntimeError, match="before"):
        weighting.update(torch.ones(1), torch.tensor([True]))


@pytest.mark.parametrize(
    "make",
    [
        lambda: FixedWeighting(warmup=0),
        lambda: DynamicWeightAverage(temperature=0.0),
        lambda: FAMOWeighting(lr=-1.0),
    ],
)
def test_invalid_arguments_are_refused_with_a_message(make):
    with pytest.raises(ConfigError, match=r"loss\.weighting"):
        make()
