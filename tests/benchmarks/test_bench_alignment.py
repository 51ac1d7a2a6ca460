"""Time of aligning a site of 25 million weights with the global model: shuffled, and already in order."""

from __future__ import annotations

import time

import pytest
import timm
import torch

from federation.alignment.align import align, permute
from federation.alignment.groups import permutation_groups


@pytest.mark.slow
@pytest.mark.parametrize("precise", [False, True], ids=["without-precision", "with-precision"])
def test_a_site_of_25_million_weights_is_aligned_in_seconds(precise: bool, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = timm.create_model("pvt_v2_b2", num_classes=0)
    groups, start = permutation_groups(model), model.state_dict()
    assert 24e6 < sum(value.numel() for value in start.values()) < 26e6
    generator = torch.Generator().manual_seed(1)
    site = {key: value + 0.002 * torch.randn(value.shape, generator=generator) for key, value in start.items()}
    known = {key: torch.rand(value.shape, generator=generator) for key, value in start.items()} if precise else {}
    orders = {group.name: torch.randperm(group.units, generator=generator) for group in groups}
    shuffled, moved = permute(site, groups, orders), permute(known, groups, orders)
    seconds = {}
    for case, (state, precision) in {"aligned": (site, known), "shuffled": (shuffled, moved)}.items():
        times = []
        for _ in range(3 if case == "aligned" else 1):
            begun = time.perf_counter()
            back = align(state, start, groups, precision)
            times.append(time.perf_counter() - begun)
        assert all(torch.equal(back.state[key], site[key]) for key in site)
        assert bool(back.permutations) == (case == "shuffled")
        seconds[case] = min(times)
    units = sum(group.units for group in groups)
    with capsys.disabled():
        print(
            f"\n{units} units and heads in {len(groups)} groups: already aligned {seconds['aligned']:.2f} s (goal .5), "
            f"shuffled {seconds['shuffled']:.2f} s (goal 10)"
        )
