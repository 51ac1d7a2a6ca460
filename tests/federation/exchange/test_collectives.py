"""Objects of one process are shared with all processes, tensors bit for bit."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from federation.client.train import SiteResult, SiteState
from federation.exchange.collectives import share
from federation.exchange.update import BlockUpdate, Update


def result() -> SiteResult:
    generator = torch.Generator().manual_seed(3)
    delta = {"w": torch.randn(3, 4, generator=generator).t(), "b": torch.randn((), generator=generator)}
    block = BlockUpdate(7, delta, {"w": torch.rand(4, 1, generator=generator)}, {"w": 0.5})
    update = Update("north", 2, "base", "schema", {"encoder": block}, {"seen": torch.tensor(5)}, samples={"lungs": 7})
    optimizer = {
        "state": {0: {"step": torch.tensor(2.0), "exp_avg": torch.zeros(0)}},
        "param_groups": [{"betas": (0.9, 1)}],
    }
    return SiteResult(
        update, SiteState(3, 9, {"mask": torch.tensor([True, False])}, optimizers=[optimizer]), {"loss": 1.5}
    )


def check(found: SiteResult) -> None:
    expected = result()
    mine, theirs = found.update.tensors(), expected.update.tensors()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[k], theirs[k]) and mine[k].dtype == theirs[k].dtype for k in mine)
    assert found.update.header() == expected.update.header()
    assert found.logged == {"loss": 1.5}
    assert found.state.optimizers[0]["param_groups"] == [{"betas": (0.9, 1)}]
    assert torch.equal(found.state.local["mask"], torch.tensor([True, False]))
    assert found.state.optimizers[0]["state"][0]["exp_avg"].shape == (0,)


def group(rank: int, world: int, file: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    for source in range(world):
        check(share(result() if rank == source else None, source, torch.device("cpu")))
        assert share(None, source, torch.device("cpu")) is None
        assert share({"a": 1.0} if rank == source else None, source, torch.device("cpu")) == {"a": 1.0}
    dist.destroy_process_group()


def test_one_process_gets_its_own_object(tmp_path):
    group(0, 1, str(tmp_path / "store"))


@pytest.mark.slow
def test_two_processes_get_the_same_objects(tmp_path):
    program = f"import runpy; runpy.run_path({str(Path(__file__))!r})['group']({{}}, 2, {str(tmp_path / 'store')!r})"
    running = [subprocess.Popen([sys.executable, "-c", program.format(rank)]) for rank in range(2)]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
