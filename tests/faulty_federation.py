"""A federation of toy sites whose sites and whose server can be made to fail; run as a script for real processes.

python tests/faulty_federation.py FOLDER '{"faults": {"b": {"1": "kill"}}, "placement": "isolated"}'
"""

import dataclasses
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

import lightning as L
import torch

from callbacks import AtomicCheckpoints, Federation, LastCheckpoint, ResumePoint
from federation import BayesianAggregator, FedAvg, FederatedDataModule
from federation.client.train import Interrupted
from federation.server.admission import Policy
from mtmedformer.errors import DataError, UserError
from tests.toy_sites import ToySite, toy_module

SECRET = "patient-4711.dcm"


class Faulty(Federation):
    """Sites fail as they are told to, by name and round."""

    def __init__(self, faults: dict[str, dict[str, str]], folder: Path, **settings) -> None:
        super().__init__(FedAvg(), **settings)
        self.faults, self.folder = faults, folder
        self.sent = {}

    def _train_here(self, trainer, plan, site, stop, quiet=False):
        kind = self.faults.get(site.site, {}).get(str(plan.round))
        if kind == "once":
            kind = None if (self.folder / "tried").exists() else "raise"
            (self.folder / "tried").touch()
        if kind == "raise":
            raise DataError(f"{SECRET}: broken")
        if kind == "out_of_memory":
            pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (pages + 2**28, resource.RLIM_INFINITY))
            torch.empty(2**34).fill_(1)
        if kind == "late":
            while not stop():
                time.sleep(0.02)
            raise Interrupted
        if kind == "hang":
            time.sleep(600)
        if kind == "disk":  # nothing as large as a checkpoint can be written any more
            size = (self.folder / "checkpoints/last.ckpt").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, resource.RLIM_INFINITY))
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        result = super()._train_here(trainer, plan, site, stop, quiet)
        last, self.sent[site.site] = self.sent.get(site.site), result.update
        return dataclasses.replace(result, update=_changed(result.update, kind, last))


def _changed(update, kind, last):
    weights = update.blocks["encoder"].delta
    if kind == "nan":
        weights["encoder.1.bias"][0] = float("nan")
    if kind == "shape":
        weights["encoder.1.bias"] = torch.zeros(99)
    if kind == "name":
        weights["encoder.9.bias"] = torch.zeros(6)
    if kind == "huge":
        for value in weights.values():
            value.mul_(1e4)
    return last if kind == "twice" else update


def killed(where: str, round: int) -> None:
    """Let the server kill itself in the middle of something in a round, counted from 0."""

    def die(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    if where == "aggregation":
        add = FedAvg.add

        def second(self, update):
            if update.round == round and update.site == "b":
                die()
            add(self, update)

        FedAvg.add = second
    if where in ("checkpoint", "before the checkpoint is in its place"):
        replace, save = os.replace, torch.save

        def cut_off(checkpoint, stream, **kwargs):
            if isinstance(checkpoint, dict) and checkpoint.get("epoch") == round and where == "checkpoint":
                stream.write(b"half of a checkpoint")
                stream.flush()
                die()
            save(checkpoint, stream, **kwargs)

        def not_moved(source, target):
            ours = str(target).endswith(".ckpt") and where != "checkpoint"
            if ours and torch.load(source, weights_only=True)["epoch"] == round:
                die()
            replace(source, target)

        torch.save, os.replace = cut_off, not_moved


def sites() -> FederatedDataModule:
    named = {"a": ToySite(n=12), "b": ToySite(n=8, tasks=("right",), seed=1), "c": ToySite(n=6, seed=2)}
    return FederatedDataModule(sites=named | {"d": ToySite(n=8, seed=3)})


def train(folder: Path, faults=None, rounds=4, resume=False, policy=None, bayes=False, **settings):
    """Train; return module and federation."""
    federation = Faulty(faults or {}, folder, policy=Policy(**(policy or {})), **settings)
    if bayes:
        federation.aggregator = BayesianAggregator(remember=True)
    checkpoints = folder / "checkpoints"
    module = toy_module(momentum=0.9, warmup=20)
    L.seed_everything(1, verbose=False)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=rounds,
        default_root_dir=folder,
        callbacks=[federation, ResumePoint(str(checkpoints)), LastCheckpoint(str(checkpoints))],
        plugins=[AtomicCheckpoints()],
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    trainer.fit(module, datamodule=sites(), ckpt_path=checkpoints / "last.ckpt" if resume else None)
    return module, federation


def main() -> int:
    folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    killed(*options.pop("kill", ("", 0)))
    try:
        return train(folder, **options)[1].exit_code
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
