"""A module of two classification tasks that trains in milliseconds, and sites that label one or both of them."""

import lightning as L
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler
from torchmetrics import MeanMetric

from federation.client.train import RoundPlan, state_of
from federation.exchange.schema import schema_of, state_hash
from mtmedformer.batch import Meta, Sample, Task, collate

TASKS = {name: Task(name, "classification", ("no", "yes")) for name in ("left", "right")}


class ToyModule(L.LightningModule):
    """An encoder, a head a task, a loss with a personal counter; a head no label reached keeps no gradient."""

    def __init__(self, lr: float = 0.1, momentum: float = 0.0, warmup: int = 0) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.LayerNorm(6), nn.Dropout(0.2))
        self.heads = nn.ModuleDict({name: nn.Linear(6, 2) for name in TASKS})
        self.loss = nn.Module()
        self.loss.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.loss.register_buffer("mean", torch.zeros(()))
        self.val_loss = MeanMetric()
        self.lr, self.momentum, self.warmup = lr, momentum, warmup

    def losses(self, batch):
        features = self.encoder(batch.image)
        found = {}
        for name, head in self.heads.items():
            target = batch.targets[name]
            logits = head(features)
            rows = target.present
            found[name] = F.cross_entropy(logits[rows], target.labels[rows]) if rows.any() else 0 * logits.sum()
        return found

    def training_step(self, batch, batch_idx):
        loss = sum(self.losses(batch).values())
        self.loss.seen += 1
        self.loss.mean.lerp_(loss.detach(), 0.1)
        self.log("train/loss", loss, on_step=False, on_epoch=True, batch_size=len(batch))
        return loss

    def on_before_optimizer_step(self, optimizer):
        for head in self.heads.values():
            if not any(p.grad is not None and p.grad.any() for p in head.parameters()):
                head.zero_grad(set_to_none=True)

    def validation_step(self, batch, batch_idx):
        self.val_loss.update(sum(self.losses(batch).values()))

    def on_validation_epoch_end(self):
        self.log("val/score", -self.val_loss.compute())
        self.val_loss.reset()

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum)
        if not self.warmup:
            return optimizer
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / self.warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class ToySite(L.LightningDataModule):
    """``n`` images of one site, labelled for some tasks; the truth is the sign of the sum of the pixels."""

    def __init__(self, n: int = 12, tasks: tuple[str, ...] = ("left", "right"), seed: int = 0, batch_size: int = 4):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.tasks = {name: TASKS[name] for name in tasks}
        self.batch_size, self.samples = batch_size, []
        for i in range(n):
            image = torch.randn(1, 2, 2, generator=generator)
            truth = torch.tensor([0.0, 1.0]) if image.sum() > 0 else torch.tensor([1.0, 0.0])
            self.samples.append(Sample(image, dict.fromkeys(tasks, truth), Meta(f"im{i}", f"hash{i}", "home")))

    def train_dataloader(self):
        order = DistributedSampler(self.samples, 1, 0, shuffle=True)
        return DataLoader(self.samples, self.batch_size, sampler=order, collate_fn=self._batch)

    def val_dataloader(self):
        return DataLoader(self.samples, self.batch_size, collate_fn=self._batch)

    def _batch(self, samples):
        return collate(samples, self.tasks)


def toy_module(seed: int = 0, **settings) -> ToyModule:
    torch.manual_seed(seed)
    return ToyModule(**settings)


def toy_plan(module: L.LightningModule, round: int = 0, **changes) -> RoundPlan:
    """Return the plan of a round that starts from the module's weights."""
    state = state_of(module)
    settings = {"rounds": 4, "state": state, "base": state_hash(state), "schema": schema_of(module), **changes}
    return RoundPlan(round=round, **settings)
