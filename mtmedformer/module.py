"""The LightningModule: one shared encoder, any number of task heads, one hybrid loss. No task is named here."""

from __future__ import annotations

import os
import warnings
import zlib
from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import AdamW, Optimizer

from mtmedformer.batch import Batch, Task, add_entries
from mtmedformer.calibration import combined_calibration, plain, restored
from mtmedformer.checks import (
    check_digest,
    check_gradient_aggregation,
    check_resumed,
    check_tasks,
    check_weights,
    tasks_of,
)
from mtmedformer.encoders import familiarity
from mtmedformer.encoders.base import Encoder
from mtmedformer.encoders.pretrained import load_weights
from mtmedformer.errors import ConfigError
from mtmedformer.heads.base import TaskHead
from mtmedformer.heads.cases import check_case_batches
from mtmedformer.heads.from_tasks import heads_for
from mtmedformer.inference.predictor import TiledPredictor
from mtmedformer.inference.results import check_finite
from mtmedformer.losses.hybrid import HybridLoss
from mtmedformer.metrics.base import MetricsByTask, TaskMeans
from mtmedformer.network import MultiTaskNetwork, evaluation_step, image_size, new_tensors_in_float32
from mtmedformer.optim import Interval, check_schedule, follows_per_epoch, parameter_groups, scheduled, step_followers
from mtmedformer.protocols import TaskedData
from mtmedformer.storage.constructor_arguments import RecordsArguments, class_path, describe, hyperparameters


class MultiTaskModule(RecordsArguments, MultiTaskNetwork):
    """Trains a shared encoder and its task heads together, on the labelled part of each batch.

    Args:
        encoder: The shared encoder; its pyramid feeds every head.
        heads: Task heads by task name. The names are the keys of ``Batch.targets`` and of every logged metric.
            ``auto`` builds the default head of each task of the data when they are known: in ``setup``, or earlier by
            ``add_heads``. A checkpoint holds the heads as built.
        loss: How the task losses become one loss; ``None`` is fixed weights of 1, brought to one scale at the start.
        tasks: Keep only the heads of these names; ``None`` keeps all. ``[lungs]`` is the single-task baseline.
        optimizer: Makes the optimizer from parameter groups. The top-level section ``optimizer`` of a configuration
            sets it, too, and takes precedence.
        lr_scheduler: Makes the learning-rate schedule from the optimizer, likewise; ``None`` keeps the rate constant.
        lr_interval: When the schedule is stepped, ``step`` or ``epoch``; ``None``: per step for ``WarmupCosine``,
            ``OneCycleLR`` and ``CyclicLR``, per epoch for any other.
        lr_monitor: Name of the logged metric that the schedule follows; ``None`` is the schedule's own.
        init_weights: A file of weights to start from (``.safetensors``, or a pickle of tensors), own or encoder-only.
            Unlike ``--ckpt_path`` it restores no optimizer, epoch or metric.
        layer_decay: Learning-rate factor from one encoder depth to the next shallower one, in (0, 1]; 1 turns it off.
        tile: ``(height, width)`` of the sliding window for ``test`` and ``predict`` on images larger than it; ``None``
            takes every image whole.
        overlap: Overlap of neighbouring windows as a share of the window, in [0, 1).
        flip_tta: Average ``test`` and ``predict`` over each image and its left-right mirror.
        channels_last: Train in channels-last memory format (faster convolutions on GPUs).
        compile: Backend of ``torch.compile`` for the encoder, for example ``inductor``; ``None`` does not compile.

    Raises:
        ConfigError: When ``tasks`` or ``loss.weights`` names a task that has no head, or a number is out of its range.
    """

    not_recorded = frozenset({"optimizer", "lr_scheduler", "lr_interval", "lr_monitor"})

    def __init__(
        self,
        encoder: Encoder,
        heads: dict[str, TaskHead] | Literal["auto"] = "auto",
        loss: HybridLoss | None = None,
        tasks: list[str] | None = None,
        optimizer: OptimizerCallable = lambda parameters: AdamW(parameters, lr=5e-4, weight_decay=0.05),
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Interval | None = None,
        lr_monitor: str | None = None,
        init_weights: str | None = None,
        layer_decay: float = 1.0,
        tile: tuple[int, int] | None = None,
        overlap: float = 0.25,
        flip_tta: bool = False,
        channels_last: bool = False,
        compile: str | None = None,
    ) -> None:
        if not 0 < layer_decay <= 1:
            raise ConfigError(f"model.layer_decay is {layer_decay}; it must be above 0 and at most 1")
        super().__init__(encoder, heads, tasks, TiledPredictor(tile, overlap, flip_tta), channels_last)
        if self.init_args is not None:
            self.save_hyperparameters(hyperparameters(class_path(type(self)), self.init_args), logger=False)
        self.loss = loss or HybridLoss()
        self.only_tasks, self.init_weights = tasks, init_weights
        self.optimizer, self.lr_scheduler, self.layer_decay = optimizer, lr_scheduler, layer_decay
        self.lr_interval, self.lr_monitor = lr_interval, lr_monitor
        self._stage: str | None = None
        self._labelled_heads: set[str] = set()
        self._seed = 0
        self._last_batch: Batch | None = None
        self._task_losses: tuple[dict[str, Tensor], dict[str, int]] = ({}, {})
        if heads != "auto":
            self._complete(heads)
        if channels_last:
            self.encoder.to(memory_format=torch.channels_last)
        if compile:
            self.encoder.compile(backend=compile)

    @property
    def awaits_tasks(self) -> bool:
        """Whether the heads are still to be built from the tasks of the data (``heads: auto``)."""
        return not self.heads

    def add_heads(self, tasks: Mapping[str, Task]) -> None:
        """Build the heads of a model with ``heads: auto``; does nothing where they exist.

        Args:
            tasks: Tasks of the data by name.

        Raises:
            ConfigError: There is none, or ``tasks`` or ``loss.weights`` of the model names one that is not among them.
        """
        if not self.awaits_tasks:
            return
        heads = heads_for(tasks)
        self.heads = self._built(heads, self.only_tasks)
        self._complete(heads)
        if self.init_args is not None:
            self.init_args["heads"] = self.hparams["heads"] = {name: describe(head) for name, head in heads.items()}

    def _complete(self, heads: Mapping[str, TaskHead]) -> None:
        """Prepare the loss and the metrics of the heads, and load the first weights."""
        self.loss.build(list(self.heads), dropped=[name for name in heads if name not in self.heads])
        self.val_metrics, self.test_metrics = self._fresh_metrics(), self._fresh_metrics()
        self.val_losses = TaskMeans(self.heads)
        self.weights_report = load_weights(self, self.init_weights) if self.init_weights else None

    def setup(self, stage: str) -> None:
        """Build the heads where they are ``auto``; check that the data set, the trainer and the heads fit together."""
        self._stage = stage
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        if self.awaits_tasks:
            self.add_heads(tasks_of(datamodule))
        check_case_batches(self.heads.values(), datamodule, stage, self.predictor.settings.get("tile"))
        if self.trainer.precision == "64-true":
            self.double()  # before a checkpoint is loaded; Lightning converts afterwards
        if isinstance(datamodule, TaskedData):
            check_tasks(stage, self.tasks, datamodule.tasks)
        if stage == "fit" and self.loss.aggregates_gradients:
            check_gradient_aggregation(self.trainer)

    @new_tensors_in_float32()
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the hybrid loss of a batch; log each task's terms where they were labelled."""
        losses, terms, present = self.task_losses(*self.labelled(batch))
        loss: Tensor = self.loss(losses, present)
        self._task_losses = losses, present
        self._last_batch = batch if self.loss.needs_update else None
        self._labelled_heads.update(name for name, count in present.items() if count)
        for name, count in present.items():
            if count:
                logged = {f"train/{name}/{term}": value.detach() for term, value in terms[name].items()}
                logged[f"train/{name}/loss"] = losses[name].detach()
                self.log_dict(logged, on_step=False, on_epoch=True, batch_size=count)
        self.log("train/loss", loss.detach(), prog_bar=True, on_step=True, on_epoch=True, batch_size=len(batch))
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Backpropagate the hybrid loss, or combine the tasks' gradients where the weighting does so."""
        if not self.loss.aggregates_gradients:
            self._task_losses = {}, {}  # it holds the graph, with which a module cannot be copied
            loss.backward(*args, **kwargs)  # type: ignore[no-untyped-call]
            return
        (losses, present), self._task_losses = self._task_losses, ({}, {})
        shared = [p for p in self.encoder.parameters() if p.requires_grad]
        own = [p for p in self.heads.parameters() if p.requires_grad]
        self.loss.backward(losses, present, shared, own, scale=1.0 / self.trainer.accumulate_grad_batches)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the calibration of these weights with them, and what their training images were like."""
        if self.calibration:
            checkpoint["calibration"] = plain(self.calibration)
        if self.familiarity is not None:
            checkpoint["familiarity"] = familiarity.plain(self.familiarity)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint fits; restore its calibration and familiarity, except to resume training.

        Raises:
            ConfigError: As in ``check_checkpoint``.
        """
        self.check_checkpoint(checkpoint, resumed=self._stage == "fit" and self.automatic_optimization)
        own = {} if self._stage == "fit" else restored(checkpoint.get("calibration", {}))
        self.calibration = combined_calibration([own, *(one.calibration for one in self.members)])
        self.familiarity = None if self._stage == "fit" else familiarity.restored(checkpoint.get("familiarity"))

    def check_checkpoint(self, checkpoint: Mapping[str, Any], resumed: bool) -> None:
        """Check that a checkpoint fits this model and its configuration, before anything is restored from it.

        Args:
            checkpoint: The checkpoint as Lightning stores it.
            resumed: Whether its optimizer is restored too; not at a federation's server.

        Raises:
            ConfigError: Weights differ in name or shape, or the optimizer in its settings.
        """
        check_digest(checkpoint)
        check_weights(self.state_dict(), checkpoint["state_dict"])
        for optimizer in checkpoint.get("optimizer_states", ()) if resumed else ():
            check_resumed(optimizer["param_groups"], self._configured_groups())

    def on_train_start(self) -> None:
        """Keep the seed of the run, and remove the familiarity, because the weights change."""
        self.familiarity = None
        self._seed = int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed() % 2**31))

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed dropout and stochastic depth from (run, epoch, step, rank), so that a resumed run draws the same."""
        key = f"{self._seed} {self.current_epoch} {batch_idx} {self.global_rank}"
        torch.manual_seed(zlib.crc32(key.encode()))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take a step; then compute the losses again for a weighting that uses its effect (FAMO)."""
        super().optimizer_step(*args, **kwargs)
        if self._last_batch is not None:
            batch, self._last_batch = self._last_batch, None
            with torch.no_grad(), self.trainer.precision_plugin.train_step_context(), new_tensors_in_float32():
                losses, _, present = self.task_losses(*self.labelled(batch))
            self.loss.update(losses, present)

    def on_train_epoch_end(self) -> None:
        """Log the current weights, and end the epoch of weighting and schedule; not at a federation's server."""
        if self.automatic_optimization:
            self.log_dict({f"loss_weight/{name}": value for name, value in self.loss.factors().items()})
            self.loss.on_epoch_end()
            step_followers(self.trainer)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step a schedule, unless it was stepped at the end of the epoch already."""
        if not follows_per_epoch(scheduler, self.trainer):
            super().lr_scheduler_step(scheduler, metric)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Remove the gradients of heads without a label in this step, so that weight decay does not move them.

        The gradients of all processes count, not only this process's labels, so that all processes agree.
        """
        for name, head in self._heads().items():
            if name not in self._labelled_heads:
                grads = [p.grad for p in head.parameters() if p.grad is not None]
                if not any(bool(g.any()) for g in grads):
                    head.zero_grad(set_to_none=True)
        self._labelled_heads.clear()

    @evaluation_step
    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Update the validation metrics and losses of every labelled task; return the raw outputs.

        The batch gets an entry for every task. Validation never uses a calibration, because that is fitted on it.
        """
        add_entries(batch, self.tasks)
        outputs = self(batch.image)
        losses, _, present = self.task_losses(outputs, batch.targets)
        for name, head in self._heads().items():
            if present[name]:
                self.val_losses.of(name).update(losses[name], weight=present[name])
                predictions = head.predict(outputs[name], image_size(batch.image))
                self.val_metrics.of(name).update(predictions, batch.targets[name], batch.meta)
        return dict(outputs)

    @evaluation_step
    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Update the test metrics of every task; return the predictions, uncalibrated ones as ``raw/<task>``.

        The batch gets an entry for every task.

        Raises:
            DataError: An output is NaN or infinite: the metrics would be of some other images.
        """
        add_entries(batch, self.tasks)
        predictions = self.predict_whole(batch.image, raw=True)
        for i in range(len(batch)):
            check_finite(predictions, i, self.tasks)
        for name in self.heads:
            self.test_metrics.of(name).update(predictions[name], batch.targets[name], batch.meta)
        return predictions

    @evaluation_step
    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Return the predictions of a batch by task, in pixels of the network's input."""
        return self.predict_whole(batch.image)

    def on_validation_epoch_start(self) -> None:
        """Reset the validation metrics."""
        self.val_metrics.reset()
        self.val_losses.reset()

    def on_test_epoch_start(self) -> None:
        """Reset the test metrics."""
        self.test_metrics.reset()

    def on_validation_epoch_end(self) -> None:
        """Log ``val/<task>/<metric>`` and ``val/score``, the mean of the tasks' primary metrics."""
        with warnings.catch_warnings():  # a task without labels is NaN, on every process alike
            warnings.filterwarnings("ignore", "The ``compute`` method of metric")
            self.log_dict({f"val/{name}/loss": value for name, value in self.val_losses.compute().items()})
            self._log_metrics("val", self.val_metrics)

    def on_test_epoch_end(self) -> None:
        """Log ``test/<task>/<metric>`` and ``test/score``."""
        self._log_metrics("test", self.test_metrics)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer over ``parameter_groups`` and, where configured, its schedule."""
        optimizer = self.optimizer(self._configured_groups())
        if self.lr_scheduler is None:
            return optimizer
        return scheduled(optimizer, self.lr_scheduler(optimizer), self.trainer, self.lr_interval, self.lr_monitor)

    def check_optimizer(self) -> None:
        """Build optimizer and schedule once, so that a mistake in their settings is found before the data are read."""
        optimizer = self.optimizer(self._configured_groups())
        if self.lr_scheduler is not None:
            check_schedule(self.lr_scheduler(optimizer))

    def _configured_groups(self) -> list[dict[str, Any]]:
        defaults = self.optimizer([{"params": []}]).defaults
        return self.parameter_groups(float(defaults["lr"]), float(defaults.get("weight_decay", 0.0)))

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Return the parameter groups of this module; see ``mtmedformer.optim.parameter_groups``."""
        depths = {f"encoder.{name}": depth for name, depth in self.encoder.layer_depths().items()}
        without_decay = {f"encoder.{name}" for name in self.encoder.no_weight_decay()}
        without_decay |= {f"loss.{name}" for name in self.loss.no_weight_decay()}
        return parameter_groups(self, depths, without_decay, lr, weight_decay, self.layer_decay)

    def _fresh_metrics(self) -> MetricsByTask:
        return MetricsByTask({name: head.metrics() for name, head in self._heads().items()})

    def _log_metrics(self, split: str, metrics: MetricsByTask) -> None:
        values, score = metrics.compute()
        for name, one in values.items():
            self.log_dict({f"{split}/{name}/{key}": value for key, value in one.items()})
        self.log(f"{split}/score", score, prog_bar=split == "val")
