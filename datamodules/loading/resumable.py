"""A DataLoader that a resumed run starts at the very next batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from datamodules.loading.dataset import EpochSampler


class ResumableLoader(DataLoader[Any]):
    """Counts the batches it has served, so that a checkpoint in mid-epoch can be resumed with the next one.

    Lightning stores ``state_dict`` in the checkpoint and gives it back before the first batch. The count is of batches
    handed out, not of those that workers have prepared ahead.
    """

    served = 0
    pending = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield the batches of an epoch, from where ``load_state_dict`` said."""
        self.served, self.pending = self.pending, 0
        if self.served:
            assert isinstance(self.sampler, EpochSampler)
            self.sampler.skip = self.served * (self.batch_size or 1)
        for batch in super().__iter__():
            self.served += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the number of batches served in this epoch."""
        return {"served": self.served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin the next epoch after as many batches."""
        self.pending = state["served"]
