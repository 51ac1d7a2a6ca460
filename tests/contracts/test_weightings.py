"""What every weighting strategy owes, whatever it does inside."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mtmedformer.losses.gradient_aggregation import GradientAggregation
from mtmedformer.losses.hybrid import HybridLoss
from mtmedformer.losses.weighting import (
    DynamicWeightAverage,
    FAMOWeighting,
    FixedWeighting,
    RandomWeighting,
    UncertaintyWeighting,
    Weighting,
)

TASKS = ("a", "b", "c")
EVERY: dict[str, Callable[[], Weighting]] = {
    "fixed": lambda: FixedWeighting(warmup=3),
    "raw": lambda: FixedWeighting(normalise=False),
    "uncertainty": UncertaintyWeighting,
    "dwa": DynamicWeightAverage,
    "random": lambda: RandomWeighting(seed=3),
    "famo": FAMOWeighting,
    "pcgrad": lambda: GradientAggregation("PCGrad", seed=3),
    "upgrad": lambda: GradientAggregation("UPGrad"),
}


class Toy(nn.Module):
    """Three tasks that pull one shared vector apart, each with a scale of its own."""

    def __init__(self, weighting: Weighting, tasks: tuple[str, ...] = TASKS) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.shared = nn.Parameter(torch.randn(6, generator=generator))
        self.heads = nn.ParameterDict({t: nn.Parameter(torch.randn(6, generator=generator)) for t in TASKS})
        self.heads = nn.ParameterDict({t: p for t, p in self.heads.items() if t in tasks})
        self.loss = HybridLoss(weighting=weighting)
        self.loss.build(tasks)

    def losses(self, x: Tensor) -> dict[str, Tensor]:
        return {
            t: 10.0 ** -TASKS.index(t) * ((x * self.shared).tanh() * p - 1 - TASKS.index(t)).square().mean()
            for t, p in self.heads.items()
        }

    def optimiser(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)

    def step(self, optimiser: torch.optim.Optimizer, batch: int, present: dict[str, int] | None = None) -> Tensor:
        x = torch.randn(6, generator=torch.Generator().manual_seed(batch))
        present = dict.fromkeys(TASKS, 2) if present is None else present
        losses = self.losses(x)
        total = self.loss(losses, present)
        optimiser.zero_grad()
        if self.loss.aggregates_gradients:
            self.loss.backward(losses, present, [self.shared], list(self.heads.parameters()))
        else:
            total.backward()
        optimiser.step()
        if self.loss.needs_update:
            with torch.no_grad():
                self.loss.update(self.losses(x), present)
        if batch % 4 == 3:
            self.loss.on_epoch_end()
        return total.detach()


def same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.fixture(params=list(EVERY), ids=list(EVERY))
def make(request: pytest.FixtureRequest) -> Callable[[], Weighting]:
    return EVERY[request.param]


def run(toy: Toy, batches: range, **kwargs: dict[str, int]) -> None:
    optimiser = toy.optimiser()
    for batch in batches:
        toy.step(optimiser, batch, **kwargs)


def test_the_loss_of_an_absent_task_reaches_neither_value_nor_gradient_nor_state(make):
    toys = [Toy(make()) for _ in range(3)]
    for toy in toys:
        run(toy, range(9))
    x, present = torch.linspace(-1, 1, 6), {"a": 2, "b": 0, "c": 1}
    values, grads, states = [], [], []
    for toy, absent in zip(toys, (1.0, 1e6, float("nan")), strict=True):
        toy.zero_grad()
        losses = toy.losses(x)
        losses["b"] = losses["b"] * 0 + absent
        values.append(toy.loss(losses, present))
        if toy.loss.aggregates_gradients:
            toy.loss.backward(losses, present, [toy.shared], list(toy.heads.parameters()))
        else:
            values[-1].backward()
        grads.append([p.grad for p in (toy.shared, *toy.heads.values())])
        if toy.loss.needs_update:
            toy.loss.update({**toy.losses(x), "b": torch.tensor(absent)}, present)
        toy.loss.on_epoch_end()
        states.append(toy.loss.state_dict())
    for value, grad, state in zip(values[1:], grads[1:], states[1:], strict=True):
        assert torch.equal(value, values[0])
        for one, other in zip(grad, grads[0], strict=True):
            assert one is not None
            assert torch.equal(one, other)
        for key in state:
            same(state[key], states[0][key])
    assert not grads[0][2].any()  # the head of the absent task: connected, with a gradient of zero


def test_a_task_never_labelled_is_as_if_it_did_not_exist(make):
    """Eight batches without task c move the rest as eight batches of a model that has no task c."""
    full, part = Toy(make()), Toy(make(), ("a", "b"))
    part.load_state_dict({k: v for k, v in full.state_dict().items() if "loss" not in k}, strict=False)
    for toy in (full, part):
        run(toy, range(8), present={"a": 2, "b": 1, "c": 0})
    torch.testing.assert_close(full.shared, part.shared, rtol=0, atol=1e-6)
    torch.testing.assert_close(full.heads["b"], part.heads["b"], rtol=0, atol=1e-6)
    assert torch.equal(full.heads["c"], Toy(make()).heads["c"])
    factors, expected = full.loss.factors(), part.loss.factors()
    assert {t: factors[t] for t in "ab"} == pytest.approx(expected, rel=1e-5)


def test_a_batch_with_no_label_at_all_gives_a_zero_that_depends_on_everything(make):
    toy = Toy(make())
    run(toy, range(5))
    before = copy.deepcopy(toy.loss.state_dict())
    toy.zero_grad()
    losses = toy.losses(torch.ones(6))
    total = toy.loss(losses, dict.fromkeys(TASKS, 0))
    assert total == 0
    if toy.loss.aggregates_gradients:
        toy.loss.backward(losses, dict.fromkeys(TASKS, 0), [toy.shared], list(toy.heads.parameters()))
    else:
        total.backward()
    for parameter in (toy.shared, *toy.heads.values()):
        assert parameter.grad is not None
        assert not parameter.grad.any()
    for key, value in toy.loss.state_dict().items():
        same(value, before[key])


def test_a_resumed_run_is_the_uninterrupted_run(make):
    whole, first = Toy(make()), Toy(make())
    run(whole, range(14))
    run(first, range(7))
    second = Toy(make())
    second.load_state_dict(first.state_dict())
    torch.manual_seed(99)  # the strategy's draws must not lean on the global stream
    run(second, range(7, 14))
    assert torch.equal(whole.shared, second.shared)
    assert whole.loss.factors() == second.loss.factors()


def test_draws_leave_the_global_random_stream_alone(make):
    toy = Toy(make())
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(toy, range(2))
    assert torch.equal(torch.rand(3), expected)


def test_evaluation_leaves_the_state_alone(make):
    toy = Toy(make())
    run(toy, range(5))
    before = copy.deepcopy(toy.loss.state_dict())
    toy.eval()
    with torch.no_grad():
        assert toy.loss(toy.losses(torch.ones(6)), dict.fromkeys(TASKS, 1)).isfinite()
    for key, value in toy.loss.state_dict().items():
        same(value, before[key])


def test_losses_fall(make):
    """Every strategy gets each of the losses down on one batch that can be learned."""
    toy, x = Toy(make()), torch.randn(6, generator=torch.Generator().manual_seed(8))
    before = {t: v.item() for t, v in toy.losses(x).items()}
    optimiser = torch.optim.Adam(toy.parameters(), lr=0.05)
    for _ in range(40):
        toy.step(optimiser, 8)
    assert all(v.item() < 0.5 * before[t] for t, v in toy.losses(x).items())


def test_copies_and_pickles_go_on_as_the_original(make):
    toy = Toy(make())
    run(toy, range(5))
    for other in (copy.deepcopy(toy), pickle.loads(pickle.dumps(toy))):
        again = copy.deepcopy(toy)
        run(other, range(5, 9))
        run(again, range(5, 9))
        assert torch.equal(other.shared, again.shared)


def test_a_weight_of_zero_is_a_task_left_out(make):
    toy = Toy(make())
    toy.loss = HybridLoss(weights={"b": 0.0}, weighting=make())
    toy.loss.build(TASKS)
    run(toy, range(6))
    assert torch.equal(toy.heads["b"], Toy(make()).heads["b"])
    assert not torch.equal(toy.heads["a"], Toy(make()).heads["a"])


def test_the_order_in_which_tasks_are_named_does_not_matter(make):
    one, other = Toy(make()), Toy(make())
    other.loss = HybridLoss(weighting=make())
    other.loss.build(TASKS[::-1])
    for toy in (one, other):
        run(toy, range(6))
    assert torch.equal(one.shared, other.shared)
    assert one.loss.factors() == other.loss.factors()


def test_everything_persistent_is_a_tensor(make):
    toy = Toy(make())
    run(toy, range(5))
    assert all(isinstance(v, Tensor) for v in toy.loss.state_dict().values())
