"""The examples of docs/extending.md, trained and merged with."""

import re
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from torch.utils.data import DataLoader

from federation import FedAvg, merge
from mtmedformer import MultiTaskModule, SegmentationHead, SharedEncoder
from mtmedformer.batch import Batch, ClassificationTarget, Meta, SegmentationTarget
from tests.fixtures.toy_federation import make_update, toy

TEXT = Path("docs/extending.md").read_text()


@pytest.fixture(scope="module")
def parts():
    """Every class of the page."""
    space: dict = {}
    for code in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(compile(code, "docs/extending.md", "exec"), space)
    return space


def batch(n=4, size=64):
    present = torch.tensor([True] * (n - 1) + [False])
    labels = torch.eye(2)[torch.arange(n) % 2]
    labels[~present] = float("nan")
    masks = torch.zeros(n, 1, size, size, dtype=torch.uint8)
    masks[:, :, 16:40, 16:40] = 1
    image = masks.float() * 0.5 + 0.1 * torch.rand(n, 1, size, size)
    targets = {"finding": ClassificationTarget(labels, present), "lungs": SegmentationTarget(masks, present)}
    return Batch(image, targets, [Meta(f"i{i}", f"p{i}") for i in range(n)])


def test_the_head_and_the_loss_train_together(parts):
    torch.manual_seed(0)
    heads = {
        "finding": parts["MeanHead"](["clear", "opacity"]),
        "lungs": SegmentationHead(["lung"], terms={"tversky": parts["Tversky"](misses=0.8)}),
    }
    module = MultiTaskModule(SharedEncoder("mtmedformer_tiny", channels=16), heads)
    data = batch()
    module.eval()
    before, _, _ = module.task_losses(module(data.image), data.targets)
    module.train()
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(accelerator="cpu", max_epochs=40, enable_model_summary=False, **settings)
    loader = DataLoader([data], batch_size=None)
    trainer.fit(module, loader, loader)
    module.eval()
    after, _, _ = module.task_losses(module(data.image), data.targets)
    assert all(after[name] < before[name] for name in ("finding", "lungs"))
    assert float(trainer.callback_metrics["val/lungs/dice"]) > 0.5
    assert "val/finding/auroc" in trainer.callback_metrics


def test_pixels_that_are_unknown_do_not_reach_the_loss(parts):
    logits, target = torch.randn(2, 1, 8, 8), torch.rand(2, 1, 8, 8) > 0.5
    valid = torch.rand(2, 1, 8, 8) > 0.3
    term = parts["Tversky"]()
    torch.testing.assert_close(term(logits, target, valid), term(logits, target ^ ~valid, valid))
    assert term(logits, target, torch.zeros_like(valid)) == 0


def test_the_aggregator_lies_between_counts_and_equal_sites(parts):
    state, schema = toy()
    updates = [
        make_update("a", state, schema, seed=1, num_examples=100),
        make_update("b", state, schema, seed=2, num_examples=4),
    ]
    counts, root, equal = (
        merge(made, state, schema, updates)["encoder.0.bias"]
        for made in (FedAvg(), parts["RootAvg"](), FedAvg("equal"))
    )
    share = (root - equal).norm() / (counts - equal).norm()
    assert share == pytest.approx((10 / 12 - 1 / 2) / (100 / 104 - 1 / 2), rel=1e-4)


def test_the_configurations_of_the_page_name_what_there_is(parts):
    for text in re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL):
        yaml.safe_load(text)
        for name in re.findall(r"my_parts\.(\w+)", text):
            assert name in parts
