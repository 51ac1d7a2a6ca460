"""The LightningModule: one shared encoder, any number of task heads, one hybrid loss. No task is named here."""

from __future__ import annotations

import math
import os
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torchmetrics import MeanMetric, Metric

from mtmedformer.batch import Batch, Target, Task, with_entries
from mtmedformer.calibration import TaskCalibration, plain, restored
from mtmedformer.encoders.pretrained import load_weights
from mtmedformer.encoders.shared import SharedEncoder
from mtmedformer.errors import ConfigError
from mtmedformer.heads.base import TaskHead
from mtmedformer.inference.tiling import predict_tiled
from mtmedformer.losses.hybrid import HybridLoss
from mtmedformer.metrics.base import TaskMetrics

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]
SchedulerFactory = Callable[[Optimizer], Any]


class MultiTaskModule(L.LightningModule):
    """Trains a shared encoder and its task heads together, on whatever part of each batch is labelled.

    Args:
        encoder: The shared encoder; its pyramid feeds every head.
        heads: Task heads by task name. The names are the keys of ``Batch.targets`` and of every logged metric.
        loss: How the task losses become one loss; ``None`` is fixed weights of 1, brought to one scale at the start.
        tasks: Keep only the heads of these names; ``None`` keeps all. ``[lungs]`` is the single-task baseline.
        init_weights: A file of weights to start from (``.safetensors``, or a pickle of tensors), own or encoder-only.
            Unlike ``--ckpt_path`` it restores no optimiser, epoch or metric.
        layer_decay: Learning-rate factor from one encoder depth to the next shallower one, in (0, 1]; 1 turns it off.
        tile: ``(height, width)`` of the sliding window for ``test`` and ``predict`` on images larger than it; ``None``
            takes every image whole.
        overlap: Overlap of neighbouring windows as a share of the window, in [0, 1).
        flip_tta: Average ``test`` and ``predict`` over each image and its left-right mirror.
        channels_last: Train in channels-last memory format (faster convolutions on GPUs).
        compile: Backend of ``torch.compile`` for the encoder, for example ``inductor``; ``None`` runs it as it is.

    Raises:
        ConfigError: When ``tasks`` or ``loss.weights`` names a task that has no head.
    """

    def __init__(
        self,
        encoder: SharedEncoder,
        heads: dict[str, TaskHead],
        loss: HybridLoss | None = None,
        tasks: list[str] | None = None,
        init_weights: str | None = None,
        layer_decay: float = 1.0,
        tile: tuple[int, int] | None = None,
        overlap: float = 0.25,
        flip_tta: bool = False,
        channels_last: bool = False,
        compile: str | None = None,
    ) -> None:
        super().__init__()
        if (
            _given_hyperparameters.get() is not None
        ):  # built from YAML: the checkpoint keeps the YAML, never the objects
            self.save_hyperparameters(logger=False)
        self.encoder = encoder
        self.heads = nn.ModuleDict(_kept(heads, tasks))
        base = int(torch.randint(2**31, ()))
        for name, head in self._heads().items():
            with _seeded_by(base, name):
                head.build(encoder.channels, encoder.strides)
        self.loss = loss or HybridLoss()
        self.loss.build(list(self.heads), dropped=[name for name in heads if name not in self.heads])
        self.layer_decay = layer_decay
        self.tile, self.overlap, self.flip_tta = tile, overlap, flip_tta
        self.channels_last = channels_last
        self.optimizer_factory: OptimizerFactory = lambda parameters: AdamW(parameters, lr=5e-4, weight_decay=0.05)
        self.scheduler_factory: SchedulerFactory | None = None
        self.val_metrics, self.test_metrics = self._metrics(), self._metrics()
        self.val_losses = nn.ModuleDict({name: MeanMetric() for name in self.heads})
        self.calibration: dict[str, TaskCalibration] = {}
        self.sampling: dict[str, Any] | None = None  # how a callback draws predictions, where one does
        self._reached: set[str] = set()
        self._seed = 0
        self._configured: list[tuple[float, float]] = []
        self._task_losses: tuple[dict[str, Tensor], dict[str, int]] = ({}, {})
        self.weights_report = load_weights(self, init_weights) if init_weights else None
        if channels_last:
            self.encoder.to(memory_format=torch.channels_last)
        if compile:
            self.encoder.compile(backend=compile)

    @property
    def tasks(self) -> dict[str, Task]:
        """The tasks this model answers, by name."""
        return {name: head.task(name) for name, head in self._heads().items()}

    def forward(self, image: Tensor) -> dict[str, Any]:
        """Return each head's raw outputs for ``image`` float (B, C, H, W) in [0, 1]."""
        pyramid = self._pyramid(image)
        return {name: head(pyramid, _size(image)) for name, head in self._heads().items()}

    def predict(self, image: Tensor, raw: bool = False) -> dict[str, Any]:
        """Return each head's predictions (see ``TaskHead.predict``) for ``image`` float (B, C, H, W) in [0, 1].

        Probabilities are calibrated where ``calibration`` has a temperature for the task; ``raw`` adds what they would
        be without, as ``raw/<task>``.
        """
        outputs = self(image)
        predictions = {}
        for name, head in self._heads().items():
            temperature = self.calibration[name].temperature if name in self.calibration else None
            scaled = outputs[name] if temperature is None else head.scaled(outputs[name], temperature)
            predictions[name] = head.predict(scaled, _size(image))
            if raw and temperature is not None:
                predictions[f"raw/{name}"] = head.predict(outputs[name], _size(image))
        return predictions

    def predict_whole(self, image: Tensor, raw: bool = False) -> dict[str, Any]:
        """Predict as ``predict`` does, with the sliding window and flips this module was configured with."""
        predict = partial(self.predict, raw=raw)
        if self.tile is None and not self.flip_tta:
            return predict(image)
        tasks = self.tasks
        if raw:
            calibrated = [name for name, one in self.calibration.items() if one.temperature is not None]
            tasks |= {f"raw/{name}": tasks[name] for name in calibrated if name in tasks}
        tile = self.tile or _size(image)
        return predict_tiled(predict, image, tasks, tile, overlap=self.overlap, flip_tta=self.flip_tta)

    def labelled(self, batch: Batch) -> tuple[dict[str, Any], dict[str, Target]]:
        """Return each head's raw outputs and target for the images labelled for it, which are all that its loss reads.

        A head for which no image is labelled reads the first one, so that its parameters get their zero gradient; one
        with BatchNorm reads all images.
        """
        pyramid, size = self._pyramid(batch.image), _size(batch.image)
        outputs, targets = {}, {}
        for name, head in self._heads().items():
            target, levels = batch.targets[name], pyramid
            rows = target.present.nonzero().flatten()
            if len(rows) < len(batch) and not _mixes_images(head):
                rows = rows if len(rows) else rows.new_zeros(1)
                target, levels = target[rows], [level[rows] for level in pyramid]
            outputs[name], targets[name] = head(levels, size), target
        return outputs, targets

    def task_losses(
        self, outputs: dict[str, Any], targets: dict[str, Target]
    ) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]], dict[str, int]]:
        """Return, by task, the loss, its named terms and the number of labelled samples."""
        terms = {name: head.loss(outputs[name], targets[name]) for name, head in self._heads().items()}
        losses = {name: torch.stack(list(t.values())).sum() for name, t in terms.items()}
        return losses, terms, {name: int(targets[name].present.sum()) for name in losses}

    def setup(self, stage: str) -> None:
        """Check that the data set, the trainer and the heads fit one another."""
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is not None and hasattr(datamodule, "tasks"):
            _check_tasks(stage, self.tasks, datamodule.tasks)
        if stage == "fit" and self.loss.aggregates_gradients:
            if self.trainer.world_size > 1:
                raise ConfigError(
                    "model.loss.weighting: gradient aggregation needs the batch on one device; set trainer.devices=1"
                )
            if self.trainer.precision == "16-mixed":
                raise ConfigError(
                    "trainer.precision=16-mixed scales the loss, which gradient aggregation cannot follow; "
                    "choose bf16-mixed or 32-true"
                )

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Add that nothing is labelled for a head whose task the data set does not have."""
        judged = self.trainer.testing or self.trainer.validating
        return with_entries(batch, self.tasks) if judged else batch

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the hybrid loss of a batch; log each task's raw terms where they were labelled."""
        losses, terms, present = self.task_losses(*self.labelled(batch))
        loss: Tensor = self.loss(losses, present)
        self._task_losses = losses, present
        self._reached.update(name for name, count in present.items() if count)
        for name, count in present.items():
            if count:
                logged = {f"train/{name}/{term}": value.detach() for term, value in terms[name].items()}
                self.log_dict(
                    {**logged, f"train/{name}/loss": losses[name].detach()},
                    on_step=False,
                    on_epoch=True,
                    batch_size=count,
                )
        self.log("train/loss", loss.detach(), prog_bar=True, on_step=True, on_epoch=True, batch_size=len(batch))
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Backpropagate the hybrid loss, or aggregate the tasks' gradients where the weighting asks for it."""
        if not self.loss.aggregates_gradients:
            self._task_losses = {}, {}  # it holds the graph, with which a module cannot be copied
            loss.backward(*args, **kwargs)  # type: ignore[no-untyped-call]
            return
        (losses, present), self._task_losses = self._task_losses, ({}, {})
        shared = [p for p in self.encoder.parameters() if p.requires_grad]
        own = [p for p in self.heads.parameters() if p.requires_grad]
        self.loss.backward(losses, present, shared, own, scale=1.0 / self.trainer.accumulate_grad_batches)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the calibration of these weights beside them, where there is one."""
        if self.calibration:
            checkpoint["calibration"] = plain(self.calibration)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another architecture in words; take its calibration, unless training goes on.

        Raises:
            ConfigError: Names or shapes of the weights differ.
        """
        _check_weights(self.state_dict(), checkpoint["state_dict"])
        trains_on = self._trainer is not None and self._trainer.state.fn == "fit"
        self.calibration = {} if trains_on else restored(checkpoint.get("calibration", {}))

    def on_train_start(self) -> None:
        """Keep the seed of the run, from which every step draws its own; refuse to change the optimiser on resume.

        Raises:
            ConfigError: The optimiser was resumed with another learning rate or weight decay than is configured.
        """
        for optimizer in self.trainer.optimizers if self.automatic_optimization else []:
            _check_resumed(optimizer, self._configured)
        self._seed = int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed() % 2**31))

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed dropout and stochastic depth from (run, epoch, step, rank), so that a resumed run draws the same."""
        key = f"{self._seed} {self.current_epoch} {batch_idx} {self.global_rank}"
        torch.manual_seed(zlib.crc32(key.encode()))

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Compute the losses again for a weighting that uses the effect of the step (FAMO); not at a server."""
        if self.loss.needs_update and self.automatic_optimization:  # a federation's server has no images
            with torch.no_grad():
                losses, _, present = self.task_losses(*self.labelled(batch))
            self.loss.update(losses, present)

    def on_train_epoch_end(self) -> None:
        """Log the current weights, and end the epoch of an epoch-wise weighting (DWA); not at a federation's server."""
        if not self.automatic_optimization:
            return
        self.log_dict({f"loss_weight/{name}": value for name, value in self.loss.factors().items()})
        self.loss.on_epoch_end()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Keep the optimiser off the heads that no label reached, whose weights would decay all the same.

        The test is on the gradients and not on this process's labels alone, so that all processes agree.
        """
        for name, head in self._heads().items():
            if name not in self._reached:
                grads = [p.grad for p in head.parameters() if p.grad is not None]
                if not any(bool(g.any()) for g in grads):
                    head.zero_grad(set_to_none=True)
        self._reached.clear()

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Add a batch to the validation metrics and losses of every task it is labelled for; return the raw outputs.

        Validation never uses a calibration, which is fitted on it.
        """
        outputs = self(batch.image)
        losses, _, present = self.task_losses(outputs, batch.targets)
        for name, head in self._heads().items():
            if present[name]:
                _metrics_of(self.val_losses)[name].update(losses[name], weight=present[name])
                predictions = head.predict(outputs[name], _size(batch.image))
                self._metric(self.val_metrics, name).update(predictions, batch.targets[name], batch.meta)
        return dict(outputs)

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Add a batch to the test metrics of every task it is labelled for; return its predictions.

        Where a task is calibrated its raw predictions are returned too, as ``raw/<task>``.
        """
        predictions = self.predict_whole(batch.image, raw=True)
        for name in self.heads:
            self._metric(self.test_metrics, name).update(predictions[name], batch.targets[name], batch.meta)
        return predictions

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Return the predictions of a batch by task, in pixels of the network's input."""
        return self.predict_whole(batch.image)

    def on_validation_epoch_start(self) -> None:
        """Forget the last epoch's validation metrics."""
        for metric in (*_metrics_of(self.val_metrics).values(), *_metrics_of(self.val_losses).values()):
            metric.reset()

    def on_test_epoch_start(self) -> None:
        """Forget the last run's test metrics."""
        for metric in _metrics_of(self.test_metrics).values():
            metric.reset()

    def on_validation_epoch_end(self) -> None:
        """Log ``val/<task>/<metric>`` and ``val/score``, the mean of the tasks' primary metrics."""
        with warnings.catch_warnings():  # what nobody labelled is NaN, on every process alike
            warnings.filterwarnings("ignore", "The ``compute`` method of metric")
            self.log_dict({f"val/{name}/loss": loss.compute() for name, loss in _metrics_of(self.val_losses).items()})
            self._log_metrics("val", self.val_metrics)

    def on_test_epoch_end(self) -> None:
        """Log ``test/<task>/<metric>`` and ``test/score``."""
        self._log_metrics("test", self.test_metrics)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimiser over ``parameter_groups`` and, where set, its schedule."""
        optimizer = self.optimizer_factory([{"params": []}])
        base, decay = optimizer.defaults["lr"], optimizer.defaults.get("weight_decay", 0.0)
        groups = self.parameter_groups(float(base), float(decay))
        self._configured = [(group["lr"], group["weight_decay"]) for group in groups]
        optimizer = self.optimizer_factory(groups)
        if self.scheduler_factory is None:
            return optimizer
        scheduler = self.scheduler_factory(optimizer)
        interval = "epoch"
        if hasattr(scheduler, "spread"):  # a schedule over the whole training rather than over epochs
            scheduler.spread(int(self.trainer.estimated_stepping_batches))
            interval = "step"
        entry: dict[str, Any] = {"scheduler": scheduler, "interval": interval}
        if hasattr(scheduler, "monitor"):
            entry["monitor"] = scheduler.monitor
        return {"optimizer": optimizer, "lr_scheduler": entry}  # type: ignore[return-value]

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Return parameter groups: no weight decay on vectors, a smaller rate the shallower an encoder layer lies.

        Args:
            lr: Learning rate of the heads and of the encoder's deepest layer.
            weight_decay: Weight decay of matrices and kernels; norms, biases and loss parameters have none.
        """
        depths = {f"encoder.{name}": depth for name, depth in self.encoder.layer_depths().items()}
        deepest = max(depths.values(), default=0)
        spared = {f"encoder.{name}" for name in self.encoder.no_weight_decay()}
        spared |= {f"loss.{name}" for name in self.loss.no_weight_decay()}
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            rate = lr * self.layer_decay ** (deepest - depths.get(name, deepest))
            decayed = parameter.ndim > 1 and name not in spared
            groups.setdefault((rate, weight_decay if decayed else 0.0), []).append(parameter)
        return [{"params": p, "lr": rate, "weight_decay": decay} for (rate, decay), p in groups.items()]

    def _pyramid(self, image: Tensor) -> list[Tensor]:
        if self.channels_last:
            image = image.contiguous(memory_format=torch.channels_last)
        pyramid: list[Tensor] = self.encoder(image)
        return pyramid

    def _heads(self) -> dict[str, TaskHead]:
        return {name: head for name, head in self.heads.items() if isinstance(head, TaskHead)}

    def _metrics(self) -> nn.ModuleDict:
        return nn.ModuleDict({name: head.metrics() for name, head in self._heads().items()})

    @staticmethod
    def _metric(metrics: nn.ModuleDict, name: str) -> TaskMetrics:
        metric = metrics[name]
        assert isinstance(metric, TaskMetrics)
        return metric

    def _log_metrics(self, split: str, metrics: nn.ModuleDict) -> None:
        score = []
        for name in metrics:
            metric = self._metric(metrics, name)
            values = {key: float(value) for key, value in metric.compute().items()}
            self.log_dict({f"{split}/{name}/{key}": value for key, value in values.items()})
            score.append(values.get(metric.primary, math.nan))
        known = [s for s in score if not math.isnan(s)]
        self.log(f"{split}/score", sum(known) / len(known) if known else math.nan, prog_bar=split == "val")


def _metrics_of(modules: nn.ModuleDict) -> dict[str, Metric]:
    return {name: module for name, module in modules.items() if isinstance(module, Metric)}


def _mixes_images(head: TaskHead) -> bool:
    """Return whether what the head says of an image depends on the others of the batch."""
    return any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in head.modules())


def _size(image: Tensor) -> tuple[int, int]:
    return int(image.shape[-2]), int(image.shape[-1])


@contextmanager
def _seeded_by(base: int, name: str) -> Iterator[None]:
    """Draw from a stream of its own: a head starts from the same weights whichever other heads there are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(base + zlib.crc32(name.encode()))
        yield


def _kept(heads: dict[str, TaskHead], tasks: list[str] | None) -> dict[str, TaskHead]:
    if not heads:
        raise ConfigError(
            "model.heads is empty; name at least one, for example {lungs: {class_path: SegmentationHead}}"
        )
    unknown = sorted(set(tasks or []) - set(heads))
    if unknown:
        raise ConfigError(f"model.tasks={tasks}: no head is called {', '.join(unknown)}; heads are {', '.join(heads)}")
    return {name: head for name, head in heads.items() if tasks is None or name in tasks}


def _check_tasks(stage: str, model: dict[str, Task], data: dict[str, Task]) -> None:
    """Check that heads and data mean the same; data without a head's task cannot train it, but may be tested on."""
    absent = [name for name in model if name not in data]
    if absent and (stage == "fit" or len(absent) == len(model)):
        raise ConfigError(
            f"model.heads.{absent[0]}: the data set has no task of this name; it has {', '.join(data) or 'none'}. "
            f"Rename the head, or drop it with model.tasks."
        )
    for name, task in model.items():
        known = data.get(name, task)
        if (task.kind, task.classes) != (known.kind, known.classes):
            raise ConfigError(
                f"model.heads.{name}.classes={list(task.classes)} ({task.kind}) do not fit the data set's "
                f"{list(known.classes)} ({known.kind}); make them equal, in the same order."
            )
    if absent:
        rank_zero_info(f"Not judged, since these data have no labels for it: {', '.join(absent)}")


def _check_resumed(optimizer: Optimizer, configured: list[tuple[float, float]]) -> None:
    """Compare a restored optimiser's groups with the configured (lr, weight_decay), and say which key differs."""
    for group, (lr, decay) in zip(optimizer.param_groups, configured, strict=True):
        restored = group.get("initial_lr", group["lr"])
        for key, now, then in (("lr", lr, restored), ("weight_decay", decay, group.get("weight_decay", decay))):
            if not math.isclose(float(now), float(then), rel_tol=1e-6):
                raise ConfigError(
                    f"optimizer.{key}={now:g}, but the run you resume was trained with {then:g}. Keep that value, or "
                    "start a new run from its weights with model.init_weights=PATH instead of --ckpt_path."
                )


def _check_weights(own: dict[str, Tensor], stored: dict[str, Tensor]) -> None:
    wrong = [
        f"{name} is {_shape(stored[name])}, not {_shape(own[name])}"
        for name in own
        if name in stored and stored[name].shape != own[name].shape
    ]
    missing, surplus = sorted(own.keys() - stored.keys()), sorted(stored.keys() - own.keys())
    if not (wrong or missing or surplus):
        return
    found = [*wrong, *(f"{name} is missing" for name in missing), *(f"{name} is not in the model" for name in surplus)]
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    raise ConfigError(
        f"--ckpt_path holds another model than the configuration describes: {'; '.join(found[:3])}{more}. "
        "Use the configuration it was trained with, or load what fits with model.init_weights=PATH."
    )


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"
