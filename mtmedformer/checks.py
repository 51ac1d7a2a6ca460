"""Checks that the model, its data, its trainer and a checkpoint fit together, before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from mtmedformer.batch import Task
from mtmedformer.errors import ConfigError


def check_tasks(stage: str, model: Mapping[str, Task], data: Mapping[str, Task]) -> None:
    """Check that heads and data set have the same tasks; a task without data is allowed except in ``fit``.

    Args:
        stage: Stage of the trainer: ``fit``, ``validate``, ``test`` or ``predict``.
        model: Tasks of the model by name.
        data: Tasks of the data set by name.

    Raises:
        ConfigError: A task is missing, or its kind or classes differ.
    """
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
        rank_zero_info(f"Not evaluated, because the data have no labels for it: {', '.join(absent)}")


def check_gradient_aggregation(trainer: L.Trainer) -> None:
    """Check that the trainer supports a weighting that combines the gradients of the tasks.

    Raises:
        ConfigError: The trainer runs on several devices, or scales the loss.
    """
    if trainer.world_size > 1:
        raise ConfigError(
            "model.loss.weighting: gradient aggregation needs the batch on one device; set trainer.devices=1"
        )
    if trainer.precision == "16-mixed":
        raise ConfigError(
            "trainer.precision=16-mixed scales the loss, which gradient aggregation cannot follow; "
            "choose bf16-mixed or 32-true"
        )


def check_resumed(stored: Sequence[Mapping[str, Any]], configured: Sequence[Mapping[str, Any]]) -> None:
    """Check that the optimizer in a checkpoint has the configured hyperparameters.

    Args:
        stored: Parameter groups of the optimizer in the checkpoint.
        configured: Parameter groups of the model, with ``lr`` and ``weight_decay``.

    Raises:
        ConfigError: Number of groups, or learning rate or weight decay of a group differs.
    """
    if len(stored) != len(configured):
        raise ConfigError(
            f"--ckpt_path: its optimizer has {len(stored)} parameter groups, but the configured one has "
            f"{len(configured)}. Use the configuration it was trained with, or start a new run from its weights with "
            "model.init_weights=PATH instead of --ckpt_path."
        )
    for before, group in zip(stored, configured, strict=True):
        lr, weight_decay = before.get("initial_lr", before["lr"]), before.get("weight_decay", group["weight_decay"])
        for key, now, then in (("lr", group["lr"], lr), ("weight_decay", group["weight_decay"], weight_decay)):
            if not math.isclose(float(now), float(then), rel_tol=1e-6):
                raise ConfigError(
                    f"optimizer.{key}={now:g}, but the run you resume was trained with {then:g}. Keep that value, or "
                    "start a new run from its weights with model.init_weights=PATH instead of --ckpt_path."
                )


def check_weights(own: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    """Check that two states have the same names and shapes.

    Args:
        own: State of the model.
        stored: State in a checkpoint.

    Raises:
        ConfigError: They differ (the message names the first three differences), or a weight is not finite.
    """
    broken = [name for name, one in stored.items() if not name.startswith("loss.") and not one.isfinite().all()]
    if broken:
        raise ConfigError(
            f"--ckpt_path: {broken[0]} contains NaN or infinite values ({len(broken)} tensors do); the training had "
            "diverged. Use an earlier checkpoint"
        )
    wrong = [
        f"{name} is {_shape(stored[name])}, not {_shape(own[name])}"
        for name in own
        if name in stored and stored[name].shape != own[name].shape
    ]
    missing, surplus = sorted(own.keys() - stored.keys()), sorted(stored.keys() - own.keys())
    if not (wrong or missing or surplus):
        return
    differences = [
        *wrong,
        *(f"{name} is missing" for name in missing),
        *(f"{name} is not in the model" for name in surplus),
    ]
    more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
    raise ConfigError(
        f"--ckpt_path holds another model than the configuration describes: {'; '.join(differences[:3])}{more}. "
        "Use the configuration it was trained with, or load what fits with model.init_weights=PATH."
    )


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"
