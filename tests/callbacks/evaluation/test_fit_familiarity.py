"""Which data the familiarity is fitted on."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from callbacks import Familiarity, Federation
from callbacks.evaluation.fit_familiarity import _batches, _sources
from federation import PrivacyPolicy
from mtmedformer.batch import Batch, Meta
from mtmedformer.errors import ConfigError


class OwnData(L.LightningDataModule):
    """A data module of a user, without records, that serves batches."""

    def train_dataloader(self) -> DataLoader:
        """Return five batches of four images."""
        images = torch.zeros(20, 1, 8, 8)
        return DataLoader(
            images, 4, collate_fn=lambda rows: Batch(torch.stack(rows), meta=[Meta("x", "p")] * len(rows))
        )


def test_under_a_privacy_policy_no_sums_are_computed():
    data = OwnData()
    trainer = SimpleNamespace(datamodule=data, callbacks=[Federation()])
    assert _sources(trainer) == {"": data}
    for privacy in (PrivacyPolicy(clip=1.0), {"north": PrivacyPolicy(clip=1.0)}):
        assert _sources(SimpleNamespace(datamodule=data, callbacks=[Federation(privacy=privacy)])) == {}


def test_data_of_a_user_are_read_by_their_own_loader_up_to_the_limit():
    assert [len(batch) for batch in _batches(OwnData(), "train", 8)] == [4, 4]
    assert len(list(_batches(OwnData(), "train", 1000))) == 5


def test_numbers_out_of_their_range_are_refused():
    for wrong in ({"images": -1}, {"quantile": 1.0}, {"quantile": 0.2}):
        with pytest.raises(ConfigError, match="Familiarity"):
            Familiarity(**wrong)
