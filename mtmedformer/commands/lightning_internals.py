"""The private names of Lightning 2.6 that the command line needs, each with its reason."""

from __future__ import annotations

from lightning.pytorch.cli import LightningCLI


class CLIWithoutCheckpointParsing(LightningCLI):
    """LightningCLI whose command line takes precedence over the hyperparameters in a checkpoint."""

    def _parse_ckpt_path(self) -> None:
        """Do nothing.

        LightningCLI merges the hyperparameters of ``--ckpt_path`` into the parsed configuration here, without a
        message, so that they override the command line. It has no public switch for that. ``with_checkpoint_base`` puts
        them before the arguments of the command line instead.
        """
