"""Tune the posterior of a federation for predictions after the last round, from sums over each site's images."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks.federation.callback import Federation
from callbacks.federation.checks import federated_data
from callbacks.federation.console import print_line
from callbacks.federation.site_trainers import processes_of
from federation.aggregators.bayesian import BayesianAggregator
from federation.bayes.posterior import Posterior
from federation.bayes.sampling import TruthLikelihood
from federation.bayes.uncertainty import Tuning, likelihood_sums, tune_scale
from federation.client.lightning_internals import copy_module
from federation.client.train import state_of
from federation.exchange.collectives import Processes
from federation.exchange.schema import schema_of
from mtmedformer.batch import Batch
from mtmedformer.calibration import restored
from mtmedformer.errors import ConfigError
from mtmedformer.module import MultiTaskModule

FILE = "posterior.safetensors"
GRID = (0.0, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1)
"""Default scales; the useful ones are far below 1, because squared gradients of batches underestimate the curvature."""


class TunePosterior(Callback):
    """After the last round of a federation, tunes its posterior for predictions and writes ``posterior.safetensors``.

    Each site predicts its own validation images with samples at every scale. It shares, for each task, only a sum of
    negative log likelihoods per scale and a count. The server adds the sums and takes the best scale of each task. If
    no scale is better than the mean model, sampling is refused for the task. The result is printed and written to the
    file.

    Args:
        grid: Scales that are tried; 0, the mean model, must be one.
        samples: Samples averaged at each scale.
        blocks: Blocks that are sampled, for example ``[encoder]``; ``null`` samples all.
        least_gain: Least relative decrease of the negative log likelihood; with a smaller one, sampling is refused.
        images: Largest number of validation images per site; they are kept in memory, one site at a time.
        checkpoint: ``best``: the posterior of the best checkpoint, if there is one; ``last``: of the last round.
        seed: Seed of the samples.

    Raises:
        ConfigError: The grid has no 0 or a negative scale, or ``samples`` or ``images`` is below 1.
    """

    def __init__(
        self,
        grid: list[float] | None = None,
        samples: int = 8,
        blocks: list[str] | None = None,
        least_gain: float = 0.01,
        images: int = 256,
        checkpoint: str = "best",
        seed: int = 0,
    ) -> None:
        self.grid = sorted(GRID if grid is None else grid)
        self.samples, self.blocks, self.least_gain = samples, blocks, least_gain
        self.images, self.checkpoint, self.seed = images, checkpoint, seed
        if 0 not in self.grid or self.grid[0] < 0 or samples < 1 or images < 1:
            raise ConfigError(
                f"TunePosterior: grid={self.grid} needs 0, the mean model, and no negative scale; samples={samples} "
                f"and images={images} must be at least 1"
            )
        if checkpoint not in ("best", "last"):
            raise ConfigError(f"TunePosterior.checkpoint={checkpoint!r}: choose best or last")
        self.tunings: dict[str, Tuning] = {}
        """Result of the tuning by task."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the run has a posterior.

        Raises:
            ConfigError: The run is not a federation, or its aggregator or module has no posterior.
        """
        if stage != "fit":
            return
        aggregator = _federation(trainer).aggregator
        if not isinstance(aggregator, BayesianAggregator) or not aggregator.exchange.precision:
            raise ConfigError(
                f"TunePosterior: {type(aggregator).__name__} keeps no precision, so there is no posterior; use "
                "federation.BayesianAggregator with a curvature and rho above 0"
            )
        if not isinstance(pl_module, MultiTaskModule):
            raise ConfigError(f"TunePosterior: a {type(pl_module).__name__} has no tasks to tune for")
        names = [block.name for block in schema_of(pl_module).blocks]
        unknown = sorted(set(self.blocks or ()) - set(names))
        if unknown:
            raise ConfigError(f"TunePosterior.blocks: {', '.join(unknown)} unknown; there are {', '.join(names)}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tune the posterior, print the result and write the file."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        module = copy_module(pl_module)
        assert isinstance(module, MultiTaskModule)
        posterior = self._posterior(trainer, module)
        processes = processes_of(trainer)
        self.tunings = self._tuned(trainer, module, posterior, processes)
        posterior.tuning = {
            "blocks": self.blocks,
            "seed": self.seed,
            "tasks": {
                name: {"scale": t.scale, "message": t.message, "nll": {f"{s:g}": v for s, v in t.nll.items()}}
                for name, t in self.tunings.items()
            },
        }
        if trainer.is_global_zero:
            for name, tuning in self.tunings.items():
                print_line(trainer, f"{name}: {tuning.message}")
            posterior.save(Path(trainer.default_root_dir, FILE))

    def _posterior(self, trainer: Trainer, module: MultiTaskModule) -> Posterior:
        """Return the posterior of the chosen checkpoint's weights; the module gets them and their calibration."""
        federation = _federation(trainer)
        aggregator = copy.deepcopy(federation.aggregator)
        assert isinstance(aggregator, BayesianAggregator)
        kept = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor]
        best = [Path(callback.best_model_path) for callback in kept]
        if self.checkpoint == "best" and best and best[0].is_file():
            stored = torch.load(best[0], weights_only=True, map_location="cpu")
            module.load_state_dict(stored["state_dict"])
            module.calibration = restored(stored.get("calibration", {}))
            aggregator.load_state_dict(stored["callbacks"][federation.state_key]["aggregator"])
        return aggregator.posterior(state_of(module), schema_of(module))

    def _tuned(
        self, trainer: Trainer, module: MultiTaskModule, posterior: Posterior, processes: Processes
    ) -> dict[str, Tuning]:
        """Return the tuning of every task that any site has validation labels for."""
        device = trainer.strategy.root_device
        module.to(device).eval()
        sums_by_site: dict[str, dict[str, tuple[list[float], int]]] = {}
        for i, (name, site) in enumerate(federated_data(trainer).sites.items()):
            sums: dict[str, tuple[list[float], int]] | None = None
            if i % processes.world == processes.rank:
                batches = [batch.to(device) for batch in _first(site.val_dataloader(), self.images)]
                likelihood = TruthLikelihood(module, batches, posterior.mean)
                sums = likelihood_sums(posterior, likelihood, self.grid, self.samples, self.seed, self.blocks)
            sums_by_site[name] = processes.share(sums, i % processes.world)
        tasks = [task for task in module.tasks if any(task in sums for sums in sums_by_site.values())]
        return {
            task: tune_scale(
                {site: sums[task][0] for site, sums in sums_by_site.items() if task in sums},
                {site: sums[task][1] for site, sums in sums_by_site.items() if task in sums},
                self.grid,
                self.least_gain,
            )
            for task in tasks
        }


def _first(loader: Iterable[Batch], images: int) -> Iterator[Batch]:
    """Yield complete batches until they have at least ``images`` images."""
    seen = 0
    for batch in loader:
        yield batch
        seen += len(batch)
        if seen >= images:
            return


def _federation(trainer: Trainer) -> Federation:
    """Return the callback that runs the rounds.

    Raises:
        ConfigError: There is none.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Federation):
            return callback
    raise ConfigError("TunePosterior: this run is no federation, so there is no posterior; set the federation key")
