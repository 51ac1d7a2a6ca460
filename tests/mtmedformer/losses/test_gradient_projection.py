"""The projection of UPGrad and DualProj without a GPL or LGPL solver."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torchjd import aggregation, linalg

from mtmedformer.losses.gradient_aggregation import GradientAggregation, NNLSProjector


def gramian(tasks: int, seed: int, rank: int = 20) -> torch.Tensor:
    jacobian = torch.randn(tasks, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return jacobian @ jacobian.T


@pytest.mark.parametrize("tasks, rank", [(2, 20), (3, 20), (5, 3), (8, 4)])
def test_weights_equal_those_of_quadprog(tasks, rank):
    pytest.importorskip("quadprog")
    pytest.importorskip("qpsolvers")
    for seed in range(20):
        g, u = gramian(tasks, seed, rank), torch.eye(tasks, dtype=torch.float64) / tasks
        expected = linalg.QuadprogProjector()(u, g)
        torch.testing.assert_close(NNLSProjector()(u, g), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tasks", [2, 3, 6])
def test_weights_satisfy_the_optimality_conditions(tasks):
    """v >= u, G v >= 0, and (v - u) . G v = 0."""
    for seed in range(20):
        g, u = gramian(tasks, seed), torch.eye(tasks, dtype=torch.float64) / tasks
        v = NNLSProjector(norm_eps=0, reg_eps=0)(u, g)
        assert (v >= u).all()
        assert (v @ g).min() > -1e-9 * g.trace()
        assert ((v - u) * (v @ g)).sum().abs() < 1e-9 * g.trace()


def test_gradients_of_zero_keep_their_weights():
    u = torch.tensor([0.5, 0.5])
    torch.testing.assert_close(NNLSProjector()(u, torch.zeros(2, 2)), u)


def test_gradients_that_agree_keep_their_weights():
    np.testing.assert_array_equal(NNLSProjector()(torch.tensor([0.5, 0.5]), torch.ones(2, 2)), [0.5, 0.5])


@pytest.mark.parametrize("name", ["UPGrad", "DualProj"])
def test_torchjd_aggregators_use_the_projector(name):
    assert isinstance(GradientAggregation(name).aggregator.projector, NNLSProjector)
    own = NNLSProjector(reg_eps=1e-3)
    assert GradientAggregation(name, {"projector": own}).aggregator.projector is own
    assert not hasattr(aggregation.MGDA(), "projector")


def test_upgrad_runs_where_quadprog_and_qpsolvers_are_absent():
    code = """
import sys
sys.modules["quadprog"] = sys.modules["qpsolvers"] = None  # import raises ImportError
import torch
from mtmedformer.losses.gradient_aggregation import GradientAggregation
for name in ("UPGrad", "DualProj"):
    out = GradientAggregation(name).aggregator(torch.tensor([[1.0, 0.2], [-0.5, 1.0]]))
    assert out.isfinite().all()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=200)
