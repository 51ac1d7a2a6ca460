"""Each private name of Lightning the federation leans on, and each trap of a Trainer within a Trainer."""

import logging
import os
import random
import signal
import time

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader
from torchmetrics import SumMetric

from federation.client.lightning_internals import (
    ServerLoop,
    SiteBar,
    as_single_process,
    budget,
    build_site_trainer,
    continue_from,
    copy_module,
    keep_metrics_local,
    note_sigterm_per_process,
    quiet_lightning,
    seeded,
)
from federation.site_loaders import Site
from mtmedformer.errors import ConfigError
from tests.fixtures.toy_sites import TASKS, ToySite, toy_module


def server(**settings):
    return L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, **settings)


def site():
    return Site("north", ToySite(), dict(TASKS))


def test_a_copy_belongs_to_no_trainer_and_shares_nothing():
    module = toy_module()
    module.trainer = trainer = server()
    twin = copy_module(module)
    assert module.trainer is trainer
    assert twin._trainer is None
    assert not {p.data_ptr() for p in module.parameters()} & {p.data_ptr() for p in twin.parameters()}


def test_a_copy_compiles_what_was_compiled():
    module = toy_module()
    module.encoder.compile(backend="eager")
    twin = copy_module(module)
    assert twin.encoder._compiled_call_impl is not None
    assert twin.heads._compiled_call_impl is None


def test_metrics_of_a_single_process_module_use_no_process_group():
    module = toy_module()
    calls = []
    module.val_loss = SumMetric(dist_sync_fn=lambda value, group: calls.append(value) or [value, value + 100])
    module.val_loss.distributed_available_fn = lambda: True
    module.val_loss.update(1.0)
    assert module.val_loss.compute() == 102, "in a group of two the metric does mix processes"
    module.val_loss.reset()
    calls.clear()
    with as_single_process(module):
        module.val_loss.update(1.0)
        assert module.val_loss.compute() == 1
    assert calls == []
    assert copy_module(module).val_loss.distributed_available_fn() is False, "it can be copied"


def test_a_single_process_trainer_logs_on_every_rank(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = CSVLogger(tmp_path, name="", version="")
    logger.log_metrics({"a": 1.0}, step=0)
    logger.save()
    assert not (tmp_path / "metrics.csv").exists(), "on rank 1 a logger is silent"
    with as_single_process(toy_module()):
        logger.log_metrics({"a": 1.0}, step=0)
        logger.save()
    assert (tmp_path / "metrics.csv").read_text().startswith("a,step")
    assert rank_zero_only.rank == 1


def test_seeded_draws_depend_on_the_key_and_the_callers_state_is_restored(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    monkeypatch.delenv("PL_SEED_WORKERS", raising=False)

    def draw():
        return torch.rand(1).item(), np.random.rand(), random.random()

    L.seed_everything(7, verbose=False)
    os.environ["PL_GLOBAL_SEED"] = "5"
    expected = [draw(), draw()]
    L.seed_everything(7, verbose=False)
    os.environ["PL_GLOBAL_SEED"] = "5"
    del os.environ["PL_SEED_WORKERS"]
    first = draw()
    with seeded(0, 3, "north"):
        one, seed = draw(), os.environ["PL_GLOBAL_SEED"]
    assert [first, draw()] == expected
    assert os.environ["PL_GLOBAL_SEED"] == "5"
    assert "PL_SEED_WORKERS" not in os.environ
    assert seed != "5", "a Trainer that resets the seed resets to the site's"
    with seeded(0, 3, "north"):
        assert draw() == one
    with seeded(0, 4, "north"):
        assert draw() != one
    with seeded(0, 3, "south"):
        assert draw() != one


def test_quiet_trainers_print_no_information_but_warnings(caplog):
    log = logging.getLogger("lightning.pytorch")
    before = log.level
    with quiet_lightning():
        assert not logging.getLogger("lightning.pytorch.utilities.rank_zero").isEnabledFor(logging.INFO)
        assert logging.getLogger("lightning.pytorch.utilities.rank_zero").isEnabledFor(logging.WARNING)
    assert log.level == before


def test_a_site_trainer_uses_device_and_precision_of_the_server_and_keeps_its_other_settings(tmp_path):
    outer = server(precision="bf16-mixed", default_root_dir=tmp_path)
    trainer = build_site_trainer(lambda **kw: L.Trainer(max_epochs=3, gradient_clip_val=0.5, **kw), outer)
    assert trainer.precision == "bf16-mixed"
    assert (trainer.max_epochs, trainer.gradient_clip_val) == (3, 0.5)
    assert trainer.strategy.root_device == outer.strategy.root_device
    assert trainer.loggers == []
    assert trainer.checkpoint_callback is None
    assert trainer.default_root_dir == str(tmp_path)
    own = build_site_trainer(lambda **kw: L.Trainer(**{"precision": "64-true", **kw}), outer)
    assert own.precision == "64-true", "the site's own choice wins"


def test_each_site_has_a_progress_bar_below_that_of_the_rounds():
    bar = SiteBar("north")
    trainer = build_site_trainer(L.Trainer, server(), bar=bar)
    assert trainer.progress_bar_callback is bar
    assert bar.process_position == 1
    continue_from(trainer, 0, 0)
    trainer.fit(toy_module(), datamodule=site())


def test_a_site_trainer_keeps_the_signal_handlers_of_the_server():
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    seen = []

    class Look(L.Callback):
        def on_train_start(self, *args):
            seen.append({s: signal.getsignal(s) for s in handlers})

    plain = server(max_epochs=1, callbacks=[Look()], enable_progress_bar=False, enable_model_summary=False)
    plain.fit(toy_module(), datamodule=site())
    assert seen.pop()[signal.SIGTERM] != handlers[signal.SIGTERM], "a plain Trainer takes SIGTERM over"
    trainer = build_site_trainer(L.Trainer, server())
    continue_from(trainer, 0, 0)
    trainer.callbacks.append(Look())
    trainer.fit(toy_module(), datamodule=site())
    assert seen == [handlers]


def test_sigterm_is_noted_without_a_broadcast(monkeypatch):
    broadcasts = []

    class Kill(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 1:
                with monkeypatch.context() as group_of_two:
                    group_of_two.setattr(type(trainer), "world_size", 2)
                    group_of_two.setattr(torch.distributed, "is_initialized", lambda: True)
                    group_of_two.setattr(torch.distributed, "broadcast", lambda *a, **k: broadcasts.append(a))
                    os.kill(os.getpid(), signal.SIGTERM)
                    time.sleep(0.01)

    trainer = server(max_epochs=1, callbacks=[Kill()], enable_progress_bar=False, enable_model_summary=False)
    note_sigterm_per_process(trainer)
    with pytest.raises(SIGTERMException):
        trainer.fit(toy_module(), datamodule=site())
    assert trainer.received_sigterm
    assert broadcasts == []


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, (1, -1)),
        ({"max_epochs": 3}, (3, -1)),
        ({"max_steps": 5}, (-1, 5)),
        ({"max_epochs": 2, "max_steps": 5}, (2, 5)),
    ],
)
def test_the_budget_of_a_round(settings, expected):
    assert budget(server(**settings)) == expected


@pytest.mark.parametrize("settings", [{"max_epochs": -1}, {"max_epochs": 0}, {"max_steps": 0}])
def test_a_budget_of_zero_or_without_limit_is_refused(settings):
    with pytest.raises(ConfigError, match="site_trainer"):
        budget(server(**settings))


@pytest.mark.parametrize("settings, epochs, steps", [({"max_epochs": 2}, 2, 6), ({"max_steps": 4}, 2, 4)])
def test_a_fresh_trainer_continues_the_counters(settings, epochs, steps, tmp_path):
    """Twelve images in batches of four: three steps an epoch."""
    orders = []

    class Watch(L.Callback):
        def on_train_epoch_start(self, trainer, module):
            orders.append((trainer.current_epoch, tuple(trainer.train_dataloader.sampler)))

    logger = CSVLogger(tmp_path, name="", version="", flush_logs_every_n_steps=1)
    trainer = build_site_trainer(lambda **kw: L.Trainer(**settings, log_every_n_steps=1, **kw), server(), [logger])
    trainer.callbacks.append(Watch())
    continue_from(trainer, 10, 30)
    trainer.fit(toy_module(), datamodule=site())
    assert trainer.current_epoch == 10 + epochs
    assert trainer.global_step == 30 + steps
    assert [epoch for epoch, _ in orders] == [10, 11]
    assert orders[0][1] != orders[1][1], "every epoch has an order of its own"
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert "10" in rows[1].split(",")
    assert "32" in rows[1].split(","), "the loggers' axis goes on (last step of the epoch)"


def test_the_server_step_is_counted_and_checkpoints_are_written(tmp_path):
    class Put(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {"lr": 1.0})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.fill_(0.125)

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            raise AssertionError("the server calls no training_step")

        def configure_optimizers(self):
            return Put(self.parameters())

    saved = L.pytorch.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=3,
        logger=False,
        callbacks=[saved],
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )

    class Start(L.Callback):
        def on_fit_start(self, trainer, pl_module):
            self.loop = ServerLoop(trainer, trainer.optimizers[0])

    start = Start()
    trainer.callbacks.append(start)
    module = Module()
    own = trainer.fit_loop.epoch_loop.manual_optimization
    trainer.fit(module, DataLoader([0]))
    start.loop.release()
    assert trainer.fit_loop.epoch_loop.manual_optimization is own
    assert trainer.global_step == 3
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 3
    assert bool((module.layer.weight == 0.125).all())


def test_a_trainer_within_a_trainer_does_not_change_the_outer_one():
    seen = {}

    class Nest(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 0:
                before = (trainer.current_epoch, trainer.global_step, pl_module.trainer)
                inner = build_site_trainer(L.Trainer, trainer)
                continue_from(inner, 5, 15)
                twin = copy_module(pl_module)
                with seeded("inner"), as_single_process(twin):
                    inner.fit(twin, datamodule=site())
                seen[trainer.current_epoch] = inner.global_step
                assert before == (trainer.current_epoch, trainer.global_step, pl_module.trainer)
                assert torch.is_grad_enabled()

    def trained(callbacks):
        module = toy_module()
        trainer = server(max_epochs=2, callbacks=callbacks, enable_progress_bar=False, enable_model_summary=False)
        L.seed_everything(3, verbose=False)
        trainer.fit(module, datamodule=site())
        return module.state_dict()

    alone, nested = trained([]), trained([Nest()])
    assert seen == {0: 18, 1: 18}
    assert all(torch.equal(alone[key], nested[key]) for key in alone)


def test_many_trainers_in_a_row_do_not_change_the_server():
    module, data = toy_module(), site()
    outer, before = server(), {key: value.clone() for key, value in module.state_dict().items()}
    for _ in range(5):
        trainer = build_site_trainer(L.Trainer, outer)
        continue_from(trainer, 0, 0)
        trainer.fit(copy_module(module), datamodule=data)
        assert trainer.global_step > 0
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_metrics_are_kept_local_on_request():
    module = toy_module()
    keep_metrics_local(module)
    assert module.val_loss.distributed_available_fn() is False
