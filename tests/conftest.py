"""Fixtures for every test: no W&B server, no leaked seeds, no leaked process group, real data by its own folder."""

import os
import signal

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run one process a core
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("MPLBACKEND", "agg")

LEAKS = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS", "MTMEDFORMER_RUN_DIR", "LOCAL_RANK", "WANDB_SWEEP_ID", "WANDB_RUN_ID")


@pytest.fixture(autouse=True)
def _no_leaks(monkeypatch, tmp_path):
    """Give back the environment, the rank and the number of threads a test may have changed."""
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a runner in the background passes on that it is ignored
    before = {name: os.environ.get(name) for name in LEAKS}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
