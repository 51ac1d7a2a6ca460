"""A control: a site whose hidden units and attention heads lie in another order than everyone else's."""

from __future__ import annotations

import zlib

import lightning as L

from federation.alignment.align import shuffle
from federation.alignment.groups import permutation_groups
from mtmedformer.errors import ConfigError


class ShuffleUnits(L.Callback):
    """Permutes the units of some sites before their training of every round; what they compute stays the same.

    A federation that averages without alignment is destroyed by it, one that aligns does not notice. Belongs to
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
        site = getattr(trainer.datamodule, "site", None)  # type: ignore[attr-defined]
        if site in self.sites:
            key = f"{self.seed} {trainer.global_step} {trainer.current_epoch} {site}"
            shuffle(pl_module, permutation_groups(pl_module), zlib.crc32(key.encode()))
