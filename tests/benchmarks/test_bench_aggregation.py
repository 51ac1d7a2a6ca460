"""Memory and time of merging ten sites of 25 million weights, as shares of the model and of the same sums in torch."""

from __future__ import annotations

import ctypes
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from federation.aggregators import Aggregator, FedAvg
from federation.aggregators.bayesian import BayesianAggregator
from federation.exchange.schema import Block, Schema, State
from federation.exchange.update import BlockUpdate, Update

SITES, DEPTH, WIDTH = 10, 8, 512
COPIES = 3.0  # limit: copies of the model in memory, one more with momentum
# the time, at most 4 times the plain sums, is printed

Grain = str | None
CASES: dict[str, tuple[Callable[[], Aggregator], Grain]] = {
    "fedavg": (FedAvg, None),
    "bayesian-off": (lambda: BayesianAggregator(rho=0.0), None),
    "bayesian-row": (lambda: BayesianAggregator(granularity="row"), "row"),
    "bayesian-element": (BayesianAggregator, "element"),
}


def model() -> tuple[State, Schema]:
    """Return the shapes of a transformer of 25 million weights, filled with noise."""
    generator = torch.Generator().manual_seed(0)
    layer = {"qkv": (3, 1), "proj": (1, 1), "fc1": (4, 1), "fc2": (1, 4)}
    state = {
        f"encoder.{i}.{name}": torch.randn(rows * WIDTH, columns * WIDTH, generator=generator)
        for i in range(DEPTH)
        for name, (rows, columns) in layer.items()
    }
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    return state, Schema((Block("encoder", tuple(state)),), shapes, frozenset(state), frozenset(), ())


def make_update(state: State, grain: Grain) -> Update:
    """Return a site's update; its arrays are the same for every site, so that only the server's memory is measured."""
    delta = {key: value * 1e-3 for key, value in state.items()}
    precision: dict[str, Tensor] = {}
    if grain:
        precision = {key: torch.rand(len(v), 1 if grain == "row" else v.shape[1]) + 0.5 for key, v in state.items()}
    return Update("site00", 0, "", "", {"encoder": BlockUpdate(120, delta, precision, dict.fromkeys(precision, 1.0))})


def merged(aggregator: Aggregator, state: State, schema: Schema, update: Update) -> State:
    aggregator.start(state, schema)
    for i in range(SITES):
        aggregator.add(dataclasses.replace(update, site=f"site{i:02}"))
    return aggregator.finish()


def plain(state: State, update: Update) -> State:
    """Return the same mean by the shortest torch: float64 sums of weight times change, and of weight."""
    block = update.blocks["encoder"]
    tops = {key: torch.zeros_like(value, dtype=torch.float64) for key, value in state.items()}
    bottoms = {key: torch.zeros((), dtype=torch.float64) for key in state}
    for _ in range(SITES):
        for key, delta in block.delta.items():
            weight = block.precision[key].double() if key in block.precision else torch.ones((), dtype=torch.float64)
            tops[key] += weight * delta
            bottoms[key] = bottoms[key] + weight
    return {key: (value + tops[key] / bottoms[key]).float() for key, value in state.items()}


def resident(field: str) -> int:
    """Return this process's resident memory now (``VmRSS``) or at its peak (``VmHWM``), in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("case", list(CASES))
def test_ten_sites_of_25_million_weights_stream(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    make, grain = CASES[case]
    state, schema = model()
    update = make_update(state, grain)
    weights = sum(value.numel() for value in state.values())
    assert 24e6 < weights < 26e6
    small = {key: value[:8, :8] for key, value in state.items()}
    merged(make(), small, schema, make_update(small, grain))  # whatever torch loads once is not the aggregator's
    ctypes.CDLL(None).malloc_trim(0)  # what earlier cases freed goes back to the system, or the peak would hide in it
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    merged(make(), state, schema, update)
    copies = (resident("VmHWM") - before) / (4 * weights)
    ours, theirs = [], []
    for _ in range(3):
        begun = time.perf_counter()
        one = merged(make(), state, schema, update)
        ours.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        other = plain(state, update)
        theirs.append(time.perf_counter() - begun)
    torch.testing.assert_close(one, other)
    ratio = min(ours) / min(theirs)
    with capsys.disabled():
        print(f"\n{case}: {copies:.2f} copies of the model, {min(ours):.2f} s, {ratio:.2f} times the plain sums")
    assert copies < COPIES + (getattr(make().server, "momentum", 0.0) > 0)
