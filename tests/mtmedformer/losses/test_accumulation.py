"""Accumulated gradients: the gradient of a step is the mean of its batches' gradients, with every weighting."""

from collections.abc import Callable
from functools import partial

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.optim import SGD
from torch.utils.data import DataLoader

from mtmedformer.batch import Batch
from mtmedformer.errors import ConfigError
from mtmedformer.losses.gradient_aggregation import GradientAggregation, choices
from mtmedformer.losses.hybrid import HybridLoss
from mtmedformer.losses.weighting import Weighting
from tests.contracts.test_weightings import EVERY
from tests.mtmedformer.test_module import batch, model, trainer

OPTIONS = {
    "CAGrad": {"c": 0.5},
    "Constant": {"weights": torch.tensor([0.2, 0.3, 0.5])},
    "FairGrad": {"alpha": 1.0},
    "Krum": {"n_byzantine": 0},
    "TrimmedMean": {"trim_number": 1},
}
"""Arguments of the aggregators that have no defaults, for three tasks."""

ALL = {name: [True, True] for name in ("health", "nodules", "organ")}


def weightings() -> dict[str, Callable[[], Weighting]]:
    """Return every weighting, and every gradient aggregator that this installation can make."""
    made = dict(EVERY)
    for name in choices():
        make = partial(GradientAggregation, name, OPTIONS.get(name))
        try:
            make()
        except ConfigError as error:
            assert "missing package" in str(error)  # noqa: PT017 (an aggregator of an extra of torchjd)
        else:
            made[name] = make
    return made


class Gradients(L.Callback):
    """Keep the gradients of each step; a parameter without one counts as 0."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        grads = {name: p.grad for name, p in pl_module.named_parameters()}
        shapes = dict(pl_module.named_parameters())
        self.steps.append({k: torch.zeros_like(shapes[k]) if g is None else g.clone() for k, g in grads.items()})


def gradients(loss: HybridLoss, batches: list[Batch], accumulated: int) -> list[dict[str, Tensor]]:
    """Return the gradients of each step of an epoch whose learning rate is 0, so that the weights stay."""
    keep = Gradients()
    module = model(loss=loss, optimizer=lambda groups: SGD(groups, lr=0.0))
    fitting = trainer(callbacks=[keep], accumulate_grad_batches=accumulated, logger=False, num_sanity_val_steps=0)
    fitting.fit(module, DataLoader(batches, batch_size=None))
    return keep.steps


@pytest.mark.parametrize("name", weightings())
def test_the_gradient_of_a_step_is_the_mean_over_its_batches(name):
    weights = None if name in {"Constant", "Krum"} else {"organ": 1e-4}
    batches = [batch(ALL, seed=1), batch(ALL, seed=2), batch(ALL, seed=3)]
    single = gradients(HybridLoss(weights, weightings()[name]()), batches, accumulated=1)
    (step, rest) = gradients(HybridLoss(weights, weightings()[name]()), batches, accumulated=2)
    for key, grad in step.items():
        torch.testing.assert_close(grad, (single[0][key] + single[1][key]) / 2, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(rest[key], single[2][key] / 2, rtol=1e-4, atol=1e-7)  # the epoch ends half-way
    assert any(bool(grad.any()) for grad in step.values())


@pytest.mark.parametrize("name", ["UPGrad", "DualProj"])
def test_small_losses_are_aggregated_alike_with_and_without_accumulation(name):
    grads = []
    for scale in (1.0, 0.5):  # unscaled, the trace of the Gramian is 2e-4: twice the smallest that is projected
        x = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        loss = HybridLoss({"a": 0.00934, "b": 0.00934}, GradientAggregation(name))
        loss.build(["a", "b"])
        losses = {"a": (x * torch.tensor([1.0, 0.2])).sum(), "b": (x * torch.tensor([-0.5, 1.0])).sum()}
        loss.backward(losses, {"a": 1, "b": 1}, [x], [], scale)
        grads.append(x.grad / scale)
    torch.testing.assert_close(grads[0], grads[1])
