"""The private names of Lightning 2.6 that the callbacks of a run need, each with its reason."""

from __future__ import annotations

from lightning.pytorch import Trainer


def load_loader_states(trainer: Trainer) -> None:
    """Restore the position of the training loader from the checkpoint that is resumed.

    Lightning restores it only if nothing has used the loader before. A schedule over the whole training has:
    ``Trainer.estimated_stepping_batches`` creates the loader. There is no public way to restore it afterwards.
    """
    trainer.fit_loop._load_combined_loader_states()
