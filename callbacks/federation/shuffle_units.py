"""A control experiment: sites whose hidden units and attention heads have another order than at the other sites."""

from __future__ import annotations

import zlib

import lightning as L

from federation.alignment.align import shuffle
from federation.alignment.groups import permutation_groups
from mtmedformer.errors import ConfigError
from mtmedformer.protocols import SiteData


class ShuffleUnits(L.Callback):
    """Permutes the units of some sites before their training in every round; the function they compute stays the same.

    Averaging without alignment fails on such sites; with alignment nothing changes. Belongs to
    ``federation.site_trainer.callbacks``.

    Args:
        sites: Names of the sites; the others train as usual.
        seed: Seed of the permutations; every round has others.
    """

    def __init__(self, sites: list[str], seed: int = 0) -> None:
        if not sites:
            raise ConfigError("ShuffleUnits.sites is empty; name the sites whose units are shuffled")
        self.sites, self.seed = list(sites), seed

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Shuffle the module in place, before its first step."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, SiteData) and data.site in self.sites:
            key = f"{self.seed} {trainer.global_step} {trainer.current_epoch} {data.site}"
            shuffle(pl_module, permutation_groups(pl_module), zlib.crc32(key.encode()))
