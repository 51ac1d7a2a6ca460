"""What a round costs beside the sites' own training, what a second process gains, and a framework to compare with.

Ratios of medians within one run; read them in the ``ratio`` column of the benchmark's extra info.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import lightning as L
import pytest

from callbacks.federation.callback import Federation
from datamodules import PhantomDataModule, PhantomSite
from federation import BayesianAggregator, FedAvg, FederatedDataModule
from mtmedformer import ClassificationHead, DetectionHead, MultiTaskModule, SegmentationHead, SharedEncoder

ROUNDS = 3

alone = pytest.mark.skipif(
    "PYTEST_XDIST_WORKER" in os.environ, reason="times whole processes: pytest tests/benchmarks -n 0 -s"
)
two_cores = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")


def module() -> MultiTaskModule:
    L.seed_everything(0, verbose=False)
    heads = {
        "finding": ClassificationHead(["clear", "ground_glass", "consolidation"]),
        "lesions": DetectionHead(["ground_glass", "consolidation"], width=32),
        "lungs": SegmentationHead(["lung"]),
    }
    return MultiTaskModule(SharedEncoder("mtmedformer_tiny", channels=64), heads)


def data(folder: Path, patients: int = 48) -> FederatedDataModule:
    phantoms = PhantomDataModule(
        root=folder / "phantoms",
        image_size=128,
        batch_size=8,
        num_workers=0,
        sites={name: PhantomSite("chest", patients=patients) for name in ("north", "south", "east", "west")},
    )
    return FederatedDataModule(data=phantoms, by="site")


def train(folder: Path, federation: Federation) -> Federation:
    """Train without validation: what is measured is the round."""
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=ROUNDS,
        limit_val_batches=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        callbacks=[federation],
    )
    trainer.fit(module(), datamodule=data(folder))
    return federation


@alone
def test_overhead_of_a_round(benchmark, tmp_path):
    """A round over the bare ``Trainer.fit`` of the same sites; each site's own seconds are in its update."""
    federation = benchmark.pedantic(train, (tmp_path, Federation(BayesianAggregator())), rounds=1)
    bare = []
    sites = data(tmp_path)
    sites.prepare_data()
    sites.setup("fit")
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for site in sites.sites.values():
            silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
            trainer = L.Trainer(
                accelerator="cpu",
                devices=1,
                max_epochs=1,
                limit_val_batches=0,
                enable_checkpointing=False,
                **silent,
            )
            trainer.fit(module(), train_dataloaders=site.train_dataloader())
        bare.append(time.perf_counter() - began)
    rounds = [record.seconds for record in federation.history]
    local = [sum(site.seconds for site in record.sites.values()) for record in federation.history]
    benchmark.extra_info["ratio_to_bare_training"] = median(rounds) / median(bare)
    benchmark.extra_info["ratio_to_the_sites_own_seconds"] = median(rounds) / median(local)
    print(f"\nround {median(rounds):.2f} s, bare {median(bare):.2f} s: {median(rounds) / median(bare):.3f}")


@alone
@two_cores
def test_two_isolated_sites_at_once(benchmark, tmp_path):
    """Sites in turn over two at once, in one command each: a fork after a backward pass of this process would fail."""
    seconds = {}
    for name, options in (("turn", []), ("pairs", ["--federation.sites_at_once=2"])):
        seconds[name] = _rounds(tmp_path / name, ["--federation.placement=isolated", *options])
    benchmark.extra_info["speedup"] = seconds["turn"] / seconds["pairs"]
    benchmark.pedantic(lambda: None, rounds=1)
    print(f"\nisolated: {seconds['turn']:.2f} s a round in turn, {seconds['pairs']:.2f} s two at once")


@alone
@two_cores
def test_per_rank_over_sequential(benchmark, tmp_path):
    """Sites in turn in one process over sites in parallel in two, one thread each."""
    one = _rounds(tmp_path / "one", [])
    two = _rounds(tmp_path / "two", ["--trainer.devices=2", "--trainer.strategy=ddp"])
    benchmark.extra_info["speedup"] = one / two
    benchmark.pedantic(lambda: None, rounds=1)
    print(f"\nper_rank: {one:.2f} s a round with one process, {two:.2f} s with two")


def _rounds(folder: Path, options: list[str]) -> float:
    """Return the median seconds of a round of the quickstart's four sites, of one size."""
    folder.mkdir()
    sites = {name: {"patients": 48} for name in ("north", "south", "east", "west")}
    command = [sys.executable, "-m", "mtmedformer", "fit", "--config", str(Path("configs/federation/quickstart.yaml"))]
    settings = [
        f"--trainer.default_root_dir={folder / 'run'}",
        f"--data.data.sites={json.dumps(sites)}",
        f"--data.data.root={folder.parent / 'phantoms'}",
        f"--trainer.max_epochs={ROUNDS}",
        "--trainer.accelerator=cpu",
        "--trainer.limit_val_batches=0",
        "--data.data.num_workers=0",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    subprocess.run([*command, *settings, *options], env=environment, check=True, capture_output=True, timeout=580)
    report = json.loads((folder / "run/report.json").read_text())
    return median(entry["seconds"] for entry in report["history"])


@alone
@pytest.mark.skipif(importlib.util.find_spec("flwr") is None, reason="pip install 'flwr[simulation]>=1.20'")
def test_against_flowers_simulation(benchmark, tmp_path):
    """The same tiny work, two sites and three rounds of FedAvg, from start to finish in a process of its own."""
    seconds = {}
    for engine in ("ours", "flower"):
        began = time.perf_counter()
        script = str(Path("tests/benchmarks/flower_work.py"))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
        done = subprocess.run([sys.executable, script, engine], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        seconds[engine] = time.perf_counter() - began
    benchmark.extra_info["ratio"] = seconds["flower"] / seconds["ours"]
    benchmark.pedantic(lambda: None, rounds=1)
    print(f"\nours {seconds['ours']:.1f} s, Flower {seconds['flower']:.1f} s from start to finish")


def test_the_work_is_the_same():
    assert FedAvg().power == 1, "Flower's FedAvg weighs by samples, as ours does by default"
