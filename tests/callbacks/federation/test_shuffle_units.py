"""The control with shuffled units: another order, the same function, and nothing that alignment cannot undo."""

from types import SimpleNamespace

import pytest
import torch

from callbacks.federation.shuffle_units import ShuffleUnits
from federation.alignment.align import align
from federation.alignment.groups import permutation_groups
from federation.client.train import state_of
from mtmedformer import MultiTaskModule, SegmentationHead, SharedEncoder
from mtmedformer.errors import ConfigError


@pytest.fixture
def module():
    torch.manual_seed(0)
    encoder = SharedEncoder("mtmedformer_tiny", channels=16)
    return MultiTaskModule(encoder, {"lungs": SegmentationHead(["lung"])}).eval()


def start(module, site, step=0):
    trainer = SimpleNamespace(datamodule=SimpleNamespace(site=site), global_step=step, current_epoch=0)
    ShuffleUnits(["far"]).on_train_start(trainer, module)


def test_a_named_site_is_shuffled_computes_the_same_and_can_be_aligned(module):
    image = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(1))
    before, said = state_of(module), module(image)["lungs"]
    start(module, "far")
    after = state_of(module)
    assert any(not torch.equal(before[key], after[key]) for key in before)
    torch.testing.assert_close(module(image)["lungs"], said, atol=1e-4, rtol=1e-4)
    back = align(after, before, permutation_groups(module))
    assert all(torch.equal(before[key], back.state[key]) for key in before)


def test_other_sites_train_as_usual(module):
    before = state_of(module)
    start(module, "near")
    assert all(torch.equal(before[key], value) for key, value in state_of(module).items())


def test_every_round_has_another_order(module):
    before = state_of(module)
    start(module, "far")
    first = state_of(module)
    module.load_state_dict(before)
    start(module, "far", step=9)
    assert any(not torch.equal(first[key], value) for key, value in state_of(module).items())


def test_no_site_is_a_mistake():
    with pytest.raises(ConfigError, match="empty"):
        ShuffleUnits([])
