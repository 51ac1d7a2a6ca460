"""Curvature from a site's own gradients, and its normalisation."""

import pytest
import torch
from torch import nn

from federation.bayes.curvature import NoCurvature, SquaredGradients, normalise
from mtmedformer.errors import ConfigError


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 2)
        self.b = nn.Linear(3, 2)


def observed(curvature, gradients, batch_size=None):
    """Show a list of gradients, by parameter name, to a curvature; absent ones are None."""
    module = Two()
    curvature.start(module)
    for step in gradients:
        for name, parameter in module.named_parameters():
            parameter.grad = step.get(name)
        curvature.observe(module)
    loader = None if batch_size is None else type("Loader", (), {"batch_size": batch_size})()
    return curvature.finish(module, loader)


def test_the_running_mean_equals_adams_corrected_second_moment():
    torch.manual_seed(0)
    gradients = [torch.randn(2, 3) for _ in range(7)]
    module = Two()
    adam = torch.optim.Adam(module.parameters(), betas=(0.9, 0.95))
    for gradient in gradients:
        module.a.weight.grad = gradient
        adam.step()
    expected = adam.state[module.a.weight]["exp_avg_sq"] / (1 - 0.95**7)
    found = observed(SquaredGradients(0.95), [{"a.weight": g} for g in gradients])
    torch.testing.assert_close(found["a.weight"], expected)


def test_a_step_that_did_not_reach_a_parameter_does_not_count():
    one, zero = torch.full((2, 3), 2.0), torch.zeros(2, 3)
    reached = observed(SquaredGradients(0.5), [{"a.weight": one}])
    mixed = observed(SquaredGradients(0.5), [{"a.weight": one}, {"a.weight": zero, "b.weight": zero}, {}])
    assert torch.equal(mixed["a.weight"], reached["a.weight"])
    assert "b.weight" not in mixed, "without a gradient the curvature is unknown, not zero"


def test_the_batch_size_scales_to_curvature_per_sample():
    gradient = [{"a.weight": torch.full((2, 3), 2.0)}]
    assert torch.allclose(observed(SquaredGradients(), gradient, batch_size=8)["a.weight"], torch.full((2, 3), 32.0))


def test_constant_gradients_give_their_square_and_a_fresh_copy_starts_empty():
    curvature = SquaredGradients(0.9)
    found = observed(curvature, [{"a.bias": torch.tensor([1.0, 3.0])}] * 5)
    torch.testing.assert_close(found["a.bias"], torch.tensor([1.0, 9.0]))
    again = curvature.fresh()
    again.start(Two())
    assert again.finish(Two()) == {}
    assert again.decay == 0.9


def test_no_curvature_returns_nothing():
    assert observed(NoCurvature(), [{"a.bias": torch.ones(2)}]) == {}


@pytest.mark.parametrize(
    "granularity, shape", [("element", (4, 3, 2)), ("row", (4, 1, 1)), ("tensor", ())], ids=["element", "row", "tensor"]
)
def test_granularity_gives_the_shape_and_the_mean_is_kept_apart(granularity, shape):
    curvature = {"w": torch.rand(4, 3, 2) * 1e-6}
    relative, scale = normalise(curvature, granularity, rho=1.0)
    assert relative["w"].shape == shape
    assert relative["w"].mean() == pytest.approx(1, rel=1e-5)
    assert scale["w"] == pytest.approx(float(curvature["w"].mean()))


def test_the_scale_of_the_loss_changes_only_the_mean_curvature():
    curvature = {"w": torch.rand(5, 7), "b": torch.rand(5)}
    louder = {name: value * 1000 for name, value in curvature.items()}
    for granularity in ("element", "row", "tensor"):
        (quiet, low), (loud, high) = normalise(curvature, granularity), normalise(louder, granularity)
        for name in curvature:
            torch.testing.assert_close(loud[name], quiet[name])
            assert high[name] == pytest.approx(1000 * low[name], rel=1e-5)


def test_clipping_comes_before_tempering_and_nothing_is_zero():
    curvature = {"w": torch.tensor([0.0, 1.0, 1e6])}
    relative, _ = normalise(curvature, "element", rho=0.5, low=1 / 100, high=2.0)
    assert relative["w"].tolist() == pytest.approx([0.1, 0.1, 2**0.5])


def test_without_power_or_without_curvature_every_weight_counts_the_same():
    assert torch.equal(normalise({"w": torch.rand(3, 2)}, "element", rho=0)[0]["w"], torch.ones(3, 2))
    relative, scale = normalise({"w": torch.zeros(3, 2)}, "row")
    assert torch.equal(relative["w"], torch.ones(3, 1))
    assert scale["w"] == 0


def test_numbers_out_of_range_are_refused():
    with pytest.raises(ConfigError, match=r"decay: 1\.0"):
        SquaredGradients(1.0)
    with pytest.raises(ConfigError, match="'column'"):
        normalise({}, "column")
